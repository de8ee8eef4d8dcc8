# SPDX-License-Identifier: Apache-2.0
"""group_norm_silu in Triton; the equations stand in ops/group_norm_silu.py.

Maps are seen as [N, C, L] with any strides. Each pass runs over tiles of positions and channels;
sums of chunks of positions are combined in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 512  # positions whose sums one program makes
COMBINED = 8  # chunks that are combined at once
# Positions and channels of a tile: channels-last maps are contiguous along channels, others along
# positions. On an H200 64 channels-last maps of 192 channels and 64 x 64 take 0.121 ms in bfloat16
# with 128 positions, 0.165 with 64 and 0.459 with 16.
TILES = {True: (128, 64), False: (128, 16)}


@triton.jit
def locate(positions, channels, chunks, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample, chunk and channels of this program."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_C)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    chunk = program // blocks % chunks
    return program // blocks // chunks, chunk, c


@triton.jit
def line(mean_ptr, rstd_ptr, params, n, c, channels, groups, there):
    """mean - add, rstd, weight (1 + scale) and bias (1 + scale) + shift of channels c."""
    weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr = params
    g = c // (channels // groups)
    center = tl.load(mean_ptr + n * groups + g, mask=there, other=0.0)
    rstd = tl.load(rstd_ptr + n * groups + g, mask=there, other=0.0)
    dtype = mean_ptr.dtype.element_ty
    slope = tl.full(c.shape, 1.0, dtype)
    offset = tl.zeros(c.shape, dtype)
    if weight_ptr is not None:
        slope = tl.load(weight_ptr + c, mask=there, other=0.0).to(dtype)
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + c, mask=there, other=0.0).to(dtype)
    if add_ptr is not None:
        center -= tl.load(add_ptr + n * channels + c, mask=there, other=0.0).to(dtype)
    if scale_ptr is not None:
        gain = 1.0 + tl.load(scale_ptr + n * channels + c, mask=there, other=0.0).to(dtype)
        slope *= gain
        offset *= gain
    if shift_ptr is not None:
        offset += tl.load(shift_ptr + n * channels + c, mask=there, other=0.0).to(dtype)
    return center, rstd, slope, offset


@triton.jit
def group_norm_statistics_kernel(
    x_ptr,  # [N, C, L]
    mean_ptr,  # [N, chunks, C], of each chunk and channel
    m2_ptr,  # [N, chunks, C]
    positions,
    channels,
    chunks,
    stride_xn,
    stride_xc,
    stride_xl,
    CHUNK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and squared deviations, tile after tile by Chan's formula."""
    n, chunk, c = locate(positions, channels, chunks, CHUNK, BLOCK_C)
    dtype = mean_ptr.dtype.element_ty
    mean = tl.zeros((BLOCK_C,), dtype=dtype)
    m2 = tl.zeros((BLOCK_C,), dtype=dtype)
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, positions)
    x_ptr += n * stride_xn
    for start in range(0, tl.minimum(CHUNK, positions - chunk * CHUNK), BLOCK_L):
        position = first + start + tl.arange(0, BLOCK_L).to(tl.int64)
        there = (position < end)[:, None] & (c < channels)[None, :]
        offsets = position[:, None] * stride_xl + c[None, :] * stride_xc
        x = tl.load(x_ptr + offsets, mask=there, other=0.0).to(dtype)
        before = tl.minimum(first + start, end) - first
        count = tl.minimum(first + start + BLOCK_L, end) - first - before
        share = count.to(dtype) / tl.maximum(before + count, 1).to(dtype)
        tile_mean = tl.sum(x, axis=0) / tl.maximum(count, 1).to(dtype)
        deviation = tl.where(there, x - tile_mean[None, :], 0.0)
        # The deviations' own mean corrects what rounding left in the first.
        rest = tl.sum(deviation, axis=0) / tl.maximum(count, 1).to(dtype)
        tile_m2 = tl.sum(deviation * deviation, axis=0) - rest * rest * count.to(dtype)
        delta = tile_mean + rest - mean
        mean += delta * share
        m2 += tl.where(count > 0, tile_m2 + delta * delta * share * before.to(dtype), 0.0)
    to = (n * chunks + chunk) * channels + c
    tl.store(mean_ptr + to, mean, mask=c < channels)
    tl.store(m2_ptr + to, m2, mask=c < channels)


@triton.jit
def group_norm_combine_kernel(
    mean_ptr,  # [N, chunks, C], of each chunk and channel
    m2_ptr,  # [N, chunks, C]
    add_ptr,  # [N, C], or None
    centre_ptr,  # [N, G]
    spread_ptr,  # [N, G], 1 / sqrt(variance + eps) with RSTD, else the squared deviations
    positions,
    channels,
    groups,
    chunks,
    eps,
    RSTD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Chunks and channels of one group together, by Chan's formula in float64."""
    program = tl.program_id(0).to(tl.int64)
    n, g = program // groups, program % groups
    width = channels // groups
    w = tl.arange(0, BLOCK_W)
    c = g * width + w
    added = tl.zeros((BLOCK_W,), tl.float64)
    if add_ptr is not None:
        added += tl.load(add_ptr + n * channels + c, mask=w < width, other=0.0).to(tl.float64)
    sums = tl.zeros((BLOCK_K, BLOCK_W), tl.float64)
    counts = tl.zeros((BLOCK_K, BLOCK_W), tl.float64)
    for start in range(0, chunks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = (k < chunks)[:, None] & (w < width)[None, :]
        at = (n * chunks + k)[:, None] * channels + c[None, :]
        mean = tl.load(mean_ptr + at, mask=there, other=0.0).to(tl.float64) + added[None, :]
        count = tl.minimum(positions - k * CHUNK, CHUNK).to(tl.float64)
        sums += tl.where(there, mean * count[:, None], 0.0)
        counts += tl.where(there, count[:, None], 0.0)
    total = tl.sum(tl.sum(counts, axis=1), axis=0)
    centre = tl.sum(tl.sum(sums, axis=1), axis=0) / total
    spread = tl.zeros((BLOCK_K, BLOCK_W), tl.float64)
    for start in range(0, chunks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = (k < chunks)[:, None] & (w < width)[None, :]
        at = (n * chunks + k)[:, None] * channels + c[None, :]
        mean = tl.load(mean_ptr + at, mask=there, other=0.0).to(tl.float64) + added[None, :]
        m2 = tl.load(m2_ptr + at, mask=there, other=0.0).to(tl.float64)
        count = tl.minimum(positions - k * CHUNK, CHUNK).to(tl.float64)
        away = mean - centre
        spread += tl.where(there, m2 + count[:, None] * away * away, 0.0)
    m2 = tl.sum(tl.sum(spread, axis=1), axis=0)
    if RSTD:
        m2 = 1.0 / tl.sqrt(m2 / total + eps)
    tl.store(centre_ptr + program, centre.to(centre_ptr.dtype.element_ty))
    tl.store(spread_ptr + program, m2.to(spread_ptr.dtype.element_ty))


@triton.jit
def group_norm_silu_kernel(
    x_ptr,  # [N, C, L]
    out_ptr,  # [N, C, L]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    weight_ptr,  # [C], or None
    bias_ptr,  # [C], or None
    add_ptr,  # [N, C], or None
    scale_ptr,  # [N, C], or None
    shift_ptr,  # [N, C], or None
    positions,
    channels,
    groups,
    chunks,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_on,
    stride_oc,
    stride_ol,
    SILU: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Norm, scale, shift and SiLU of one chunk of positions."""
    n, chunk, c = locate(positions, channels, chunks, CHUNK, BLOCK_C)
    params = (weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr)
    center, rstd, slope, offset = line(
        mean_ptr, rstd_ptr, params, n, c, channels, groups, c < channels
    )
    slope *= rstd
    x_ptr += n * stride_xn + chunk * CHUNK * stride_xl
    out_ptr += n * stride_on + chunk * CHUNK * stride_ol
    rest = tl.minimum(CHUNK, positions - chunk * CHUNK)
    for start in range(0, rest, BLOCK_L):
        position = start + tl.arange(0, BLOCK_L)
        there = (position < rest)[:, None] & (c < channels)[None, :]
        offsets = (position.to(tl.int64) * stride_xl)[:, None] + (c * stride_xc)[None, :]
        x = tl.load(x_ptr + offsets, mask=there, other=0.0).to(slope.dtype)
        z = (x - center[None, :]) * slope[None, :] + offset[None, :]
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        to = (position.to(tl.int64) * stride_ol)[:, None] + (c * stride_oc)[None, :]
        tl.store(out_ptr + to, z.to(out_ptr.dtype.element_ty), mask=there)


def group_norm_statistics(
    x: Tensor,  # [N, C, ...] fp32 | bf16 | fp16 | fp64
    groups: int,
    add: Tensor | None = None,  # [N, C]
    *,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:  # [N, G], [N, G] fp32 (fp64 for fp64)
    """Launch the kernels; arguments have been checked by ops/group_norm_silu.py.

    The mean, and the squared deviations; with `eps` 1 / sqrt(variance + eps) in their place.
    """
    maps = as_maps(x)
    samples, channels, positions = maps.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    centre, spread = (x.new_empty((samples, groups), dtype=dtype) for _ in range(2))
    if maps.numel() == 0:
        return centre.zero_(), spread.fill_(0.0 if eps is None else eps**-0.5)
    chunks = triton.cdiv(positions, CHUNK)
    mean, m2 = (x.new_empty((samples, chunks, channels), dtype=dtype) for _ in range(2))
    block_l, block_c = tile_of(maps)
    group_norm_statistics_kernel[(samples * chunks * triton.cdiv(channels, block_c),)](
        maps,
        mean,
        m2,
        positions,
        channels,
        chunks,
        *maps.stride(),
        CHUNK=CHUNK,
        BLOCK_L=block_l,
        BLOCK_C=block_c,
    )
    group_norm_combine_kernel[(samples * groups,)](
        mean,
        m2,
        None if add is None else add.contiguous(),
        centre,
        spread,
        positions,
        channels,
        groups,
        chunks,
        0.0 if eps is None else eps,
        RSTD=eps is not None,
        CHUNK=CHUNK,
        BLOCK_K=COMBINED,
        BLOCK_W=triton.next_power_of_2(channels // groups),
        num_warps=1,
    )
    return centre, spread


def group_norm_silu(
    x: Tensor,  # [N, C, ...] fp32 | bf16 | fp16 | fp64
    groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    add: Tensor | None,  # [N, C]
    scale: Tensor | None,  # [N, C]
    shift: Tensor | None,  # [N, C]
    mean: Tensor | None,  # [N, G]
    rstd: Tensor | None,  # [N, G]
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # like x, [N, G], [N, G]
    """Launch the kernels; arguments have been checked by ops/group_norm_silu.py."""
    maps, out = as_maps(x), torch.empty_like(x)
    samples, channels, positions = maps.shape
    if mean is None or rstd is None:
        mean, rstd = group_norm_statistics(x, groups, add, eps=eps)
    else:
        mean, rstd = mean.clone(), rstd.clone()
    if maps.numel() > 0:
        made = as_maps(out)
        chunks = triton.cdiv(positions, CHUNK)
        block_l, block_c = tile_of(maps)
        group_norm_silu_kernel[(samples * chunks * triton.cdiv(channels, block_c),)](
            maps,
            made,
            mean.contiguous(),
            rstd.contiguous(),
            *all_contiguous(weight, bias, add, scale, shift),
            positions,
            channels,
            groups,
            chunks,
            *maps.stride(),
            *made.stride(),
            SILU=silu,
            CHUNK=CHUNK,
            BLOCK_L=block_l,
            BLOCK_C=block_c,
        )
        if made.data_ptr() != out.data_ptr():
            out.copy_(made.reshape(x.shape))
    return out, mean, rstd


def tile_of(maps: Tensor, tiles: dict[bool, tuple[int, int]] = TILES) -> tuple[int, int]:
    """Positions and channels that a program of maps [N, C, L] takes at once."""
    most, channels = tiles[maps.stride(1) == 1]
    return min(most, triton.next_power_of_2(maps.shape[2])), channels


def as_maps(x: Tensor) -> Tensor:  # [N, C, L]
    """x with its positions in one dimension; a copy where their distances are not equal."""
    return x.flatten(2) if x.ndim > 2 else x[:, :, None]


def all_contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
