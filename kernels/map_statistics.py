# SPDX-License-Identifier: Apache-2.0
"""Feature maps that carry the statistics of their channels, for a U-Net's inference on a GPU.

A map is written once, with all that is added to it, and its statistics are made in the same pass;
the GroupNorm that follows combines them and reads the map once more. Maps are channels-last,
[N, L, C] with L positions. Statistics are of chunks of positions: mean and squared deviations of
each channel, [N, chunks, C] in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Positions of a chunk at most, channels of a program, and its warps.
CHUNK = 128
BLOCK_C = 64
WARPS = 4
NORM_WARPS = 8  # 42 us beside 45 on an H100, 32 maps of 4096 positions and 192 channels
COMBINED = 32  # chunks that are combined at once, at most
ACCUMULATOR = torch.float32


@triton.jit
def add_statistics_kernel(
    x_ptr,  # [N, L, C]
    other_ptr,  # [M, L, C], of sample n % M; or None
    bias_ptr,  # [C], or None
    out_ptr,  # [N, L, C]; or None
    mean_ptr,  # [N, chunks, C]
    m2_ptr,  # [N, chunks, C]
    positions,
    channels,
    chunks,
    others,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = x + other + bias of one chunk, and its statistics as it is stored."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    chunk = program // blocks % chunks
    n = program // blocks // chunks
    # Of 64 bits are the first positions alone: other numbers would take the registers.
    first = chunk * CHUNK
    row, c = tl.arange(0, CHUNK), c.to(tl.int32)
    there = (row < positions - first)[:, None] & (c < channels)[None, :]
    at = row[:, None] * channels + c[None, :]
    of_chunk = (n * positions + first) * channels
    y = tl.load(x_ptr + of_chunk + at, mask=there, other=0.0).to(tl.float32)
    if other_ptr is not None:
        beside = (n % others * positions + first) * channels
        y += tl.load(other_ptr + beside + at, mask=there, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    if out_ptr is not None:
        stored = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + of_chunk + at, stored, mask=there)
        y = stored.to(tl.float32)
    count = tl.minimum(positions - chunk * CHUNK, CHUNK).to(tl.float32)
    mean = tl.sum(tl.where(there, y, 0.0), axis=0) / count
    away = tl.where(there, y - mean[None, :], 0.0)
    to = (n * chunks + chunk) * channels + c
    tl.store(mean_ptr + to, mean, mask=c < channels)
    tl.store(m2_ptr + to, tl.sum(away * away, axis=0), mask=c < channels)


@triton.jit
def two(first_ptr, second_ptr, n, samples, others, step, width, rest, at, c, there):
    """Values at `at` of channels c of two tensors side by side; each may hold fewer samples."""
    first = first_ptr + (n % samples * step + at) * width + c
    out = tl.load(first, mask=there & (c < width), other=0.0).to(tl.float32)
    if second_ptr is not None:
        second = second_ptr + (n % others * step + at) * rest + (c - width)
        out += tl.load(second, mask=there & (c >= width), other=0.0).to(tl.float32)
    return out


@triton.jit
def combine_kernel(
    mean_ptr,  # [M, chunks, C1]
    m2_ptr,
    other_mean_ptr,  # [M', chunks, C2], or None
    other_m2_ptr,
    add_ptr,  # [A, C1 + C2], of sample n % A; or None
    centre_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    positions,
    width,  # C1
    rest,  # C2
    groups,
    chunks,
    samples,  # M
    others,  # M'
    added,  # A
    eps,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of one group, by Chan's formula."""
    program = tl.program_id(0).to(tl.int64)
    n, g = program // groups, program % groups
    size = (width + rest) // groups
    w = tl.arange(0, BLOCK_W)
    c = (g * size + w)[None, :]
    shift = tl.zeros((1, BLOCK_W), tl.float32)
    if add_ptr is not None:
        add = add_ptr + n % added * (width + rest) + c
        shift += tl.load(add, mask=(w < size)[None, :], other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_K, BLOCK_W), tl.float64)
    counts = tl.zeros((BLOCK_K, BLOCK_W), tl.float64)
    for start in range(0, chunks, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[:, None]
        there = (k < chunks) & (w < size)[None, :]
        mean = two(mean_ptr, other_mean_ptr, n, samples, others, chunks, width, rest, k, c, there)
        count = tl.minimum(positions - k * CHUNK, CHUNK).to(tl.float64)
        sums += tl.where(there, (mean + shift).to(tl.float64) * count, 0.0)
        counts += tl.where(there, count, 0.0)
    total = tl.sum(tl.sum(counts, axis=1), axis=0)
    centre = tl.sum(tl.sum(sums, axis=1), axis=0) / total
    spread = tl.zeros((BLOCK_K, BLOCK_W), tl.float64)
    for start in range(0, chunks, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[:, None]
        there = (k < chunks) & (w < size)[None, :]
        mean = two(mean_ptr, other_mean_ptr, n, samples, others, chunks, width, rest, k, c, there)
        m2 = two(m2_ptr, other_m2_ptr, n, samples, others, chunks, width, rest, k, c, there)
        count = tl.minimum(positions - k * CHUNK, CHUNK).to(tl.float64)
        away = (mean + shift).to(tl.float64) - centre
        spread += tl.where(there, m2.to(tl.float64) + count * away * away, 0.0)
    variance = tl.sum(tl.sum(spread, axis=1), axis=0) / total
    tl.store(centre_ptr + program, centre.to(tl.float32))
    tl.store(rstd_ptr + program, (1.0 / tl.sqrt(variance + eps)).to(tl.float32))


@triton.jit
def norm_kernel(
    x_ptr,  # [M, L, C1]
    other_ptr,  # [M', L, C2], or None
    out_ptr,  # [N, L, C1 + C2]
    centre_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    weight_ptr,  # [C1 + C2]
    bias_ptr,  # [C1 + C2]
    add_ptr,  # [A, C1 + C2], of sample n % A; or None
    positions,
    width,  # C1
    rest,  # C2
    groups,
    samples,  # M
    others,  # M'
    added,  # A
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Norm and SiLU of a tile of positions and channels."""
    program = tl.program_id(0).to(tl.int64)
    channels = width + rest
    blocks = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(positions, BLOCK_L)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row = program // blocks % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    n = program // blocks // tiles
    known = c < channels
    group = n * groups + c // (channels // groups)
    centre = tl.load(centre_ptr + group, mask=known, other=0.0)
    slope = tl.load(weight_ptr + c, mask=known, other=0.0).to(tl.float32)
    slope *= tl.load(rstd_ptr + group, mask=known, other=0.0)
    offset = tl.load(bias_ptr + c, mask=known, other=0.0).to(tl.float32)
    if add_ptr is not None:
        add = add_ptr + n % added * channels + c
        centre -= tl.load(add, mask=known, other=0.0).to(tl.float32)
    there = (row < positions)[:, None] & known[None, :]
    x = two(
        *(x_ptr, other_ptr, n, samples, others, positions, width, rest),
        *(row[:, None], c[None, :], there),
    )
    z = (x - centre[None, :]) * slope[None, :] + offset[None, :]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    to = (n * positions + row)[:, None] * channels + c[None, :]
    tl.store(out_ptr + to, z.to(out_ptr.dtype.element_ty), mask=there)


def add_statistics(
    x: Tensor,  # [N, L, C] fp32 | bf16 | fp16, contiguous
    other: Tensor | None = None,  # [M, L, C], contiguous, M divides N
    bias: Tensor | None = None,  # [C]
) -> tuple[Tensor, Tensor]:  # twice [N, chunks, C] fp32
    """x += other + bias in place, sample n of x with n % M of the other; its statistics."""
    samples, positions, channels = x.shape
    chunk = min(CHUNK, triton.next_power_of_2(positions))
    chunks = triton.cdiv(positions, chunk)
    mean, m2 = (x.new_empty((samples, chunks, channels), dtype=ACCUMULATOR) for _ in range(2))
    add_statistics_kernel[(samples * chunks * triton.cdiv(channels, BLOCK_C),)](
        *(x, other, bias, None if other is None and bias is None else x, mean, m2),
        *(positions, channels, chunks, 1 if other is None else len(other)),
        CHUNK=chunk,
        BLOCK_C=BLOCK_C,
        num_warps=WARPS,
    )
    return mean, m2


def norm_silu(
    sources: list[tuple[Tensor, Tensor, Tensor]],
    groups: int,
    weight: Tensor,  # [C1 + C2]
    bias: Tensor,  # [C1 + C2]
    *,
    add: Tensor | None = None,  # [A, C1 + C2] fp32, contiguous, A divides N
    eps: float,
    silu: bool,
) -> Tensor:  # [N, L, C1 + C2]
    """silu(GroupNorm(x + add)) of one or two maps side by side, without joining them.

    Args:
        sources: maps [M, L, C] with their mean and squared deviations, as `add_statistics` makes
            them; sample n is n % M of each.
        groups: that divide all channels together.
        weight, bias: of the norm.
        add: to all positions, before the norm.
        eps: added to the variance.
        silu: whether SiLU follows.
    """
    x, mean, m2 = sources[0]
    other, other_mean, other_m2 = sources[1] if len(sources) == 2 else (None, None, None)
    samples = max(len(source[0]) for source in sources)
    positions, width = x.shape[1:]
    rest = 0 if other is None else other.shape[2]
    others = 1 if other is None else len(other)
    added = 1 if add is None else len(add)
    chunk = min(CHUNK, triton.next_power_of_2(positions))
    centre, rstd = (x.new_empty((samples, groups), dtype=ACCUMULATOR) for _ in range(2))
    combine_kernel[(samples * groups,)](
        *(mean, m2, other_mean, other_m2, add, centre, rstd, positions, width, rest, groups),
        *(mean.shape[1], len(x), others, added, eps),
        CHUNK=chunk,
        BLOCK_K=min(COMBINED, triton.next_power_of_2(mean.shape[1])),
        BLOCK_W=triton.next_power_of_2((width + rest) // groups),
        num_warps=1,
    )
    out = x.new_empty((samples, positions, width + rest))
    tiles = triton.cdiv(positions, chunk) * triton.cdiv(width + rest, BLOCK_C)
    norm_kernel[(samples * tiles,)](
        *(x, other, out, centre, rstd, weight, bias, add, positions, width, rest, groups),
        *(len(x), others, added),
        SILU=silu,
        BLOCK_L=chunk,
        BLOCK_C=BLOCK_C,
        num_warps=NORM_WARPS if chunk == CHUNK else WARPS,
    )
    return out
