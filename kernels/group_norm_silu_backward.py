# SPDX-License-Identifier: Apache-2.0
"""The gradients of group_norm_silu in Triton; the equations stand in ops/group_norm_silu.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_silu import CHUNK, all_contiguous, as_maps, line, locate, tile_of

TILES = {True: (64, 64), False: (64, 16)}  # larger ones spill registers


@triton.jit
def group_norm_silu_backward_kernel(
    x_ptr,  # [N, C, L]
    grad_ptr,  # [N, C, L]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    weight_ptr,  # [C], or None
    bias_ptr,  # [C], or None
    add_ptr,  # [N, C], or None
    scale_ptr,  # [N, C], or None
    shift_ptr,  # [N, C], or None
    sums_ptr,  # [3, N, chunks, C], of gz, gz normed and normed; anything without REDUCE
    grad_x_ptr,  # [N, C, L]; anything with REDUCE
    level_ptr,  # [N, G], -rstd times the mean of gz gain; anything with REDUCE
    curve_ptr,  # [N, G], -rstd times the mean of gz gain normed; anything with REDUCE
    samples,
    positions,
    channels,
    groups,
    chunks,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_gn,
    stride_gc,
    stride_gl,
    stride_on,
    stride_oc,
    stride_ol,
    SILU: tl.constexpr,
    REDUCE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """First the sums (REDUCE), then the gradient of x, over one chunk of positions."""
    n, chunk, c = locate(positions, channels, chunks, CHUNK, BLOCK_C)
    params = (weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr)
    center, rstd, slope, offset = line(
        mean_ptr, rstd_ptr, params, n, c, channels, groups, c < channels
    )
    gz_sum = tl.zeros((BLOCK_C,), dtype=slope.dtype)
    normed_gz_sum = tl.zeros((BLOCK_C,), dtype=slope.dtype)
    normed_sum = tl.zeros((BLOCK_C,), dtype=slope.dtype)
    x_ptr += n * stride_xn
    grad_ptr += n * stride_gn
    if not REDUCE:
        grad_x_ptr += n * stride_on
        group = n * groups + c // (channels // groups)
        level = tl.load(level_ptr + group, mask=c < channels, other=0.0)
        curve = tl.load(curve_ptr + group, mask=c < channels, other=0.0)
    for start in range(0, tl.minimum(CHUNK, positions - chunk * CHUNK), BLOCK_L):
        position = chunk * CHUNK + start + tl.arange(0, BLOCK_L).to(tl.int64)
        there = (position < positions)[:, None] & (c < channels)[None, :]
        offsets = position[:, None] * stride_xl + c[None, :] * stride_xc
        x = tl.load(x_ptr + offsets, mask=there, other=0.0).to(slope.dtype)
        offsets = position[:, None] * stride_gl + c[None, :] * stride_gc
        gz = tl.load(grad_ptr + offsets, mask=there, other=0.0).to(slope.dtype)
        normed = tl.where(there, (x - center[None, :]) * rstd[None, :], 0.0)
        if SILU:
            z = normed * slope[None, :] + offset[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            gz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
        if REDUCE:
            gz_sum += tl.sum(gz, axis=0)
            normed_gz_sum += tl.sum(gz * normed, axis=0)
            normed_sum += tl.sum(normed, axis=0)
        else:
            value = gz * (slope * rstd)[None, :] + (normed * curve[None, :] + level[None, :])
            to = position[:, None] * stride_ol + c[None, :] * stride_oc
            tl.store(grad_x_ptr + to, value.to(grad_x_ptr.dtype.element_ty), mask=there)
    if REDUCE:
        to = sums_ptr + (n * chunks + chunk) * channels + c
        step = tl.cast(samples, tl.int64) * chunks * channels
        tl.store(to, gz_sum, mask=c < channels)
        tl.store(to + step, normed_gz_sum, mask=c < channels)
        tl.store(to + 2 * step, normed_sum, mask=c < channels)


def group_norm_silu_backward(
    grad: Tensor,  # like x
    x: Tensor,  # [N, C, ...] fp32 | bf16 | fp16 | fp64
    groups: int,
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    add: Tensor | None,  # [N, C]
    scale: Tensor | None,  # [N, C]
    shift: Tensor | None,  # [N, C]
    mean: Tensor,  # [N, G]
    rstd: Tensor,  # [N, G]
    given: bool,
    silu: bool,
) -> tuple[Tensor, ...]:  # of x, then weight, bias [C], add, scale, shift [N, C]
    """Launch the kernels; arguments have been checked by ops/group_norm_silu.py."""
    maps, grads, grad_x = as_maps(x), as_maps(grad), torch.empty_like(x)
    samples, channels, positions = maps.shape
    made = as_maps(grad_x)
    chunks = max(triton.cdiv(positions, CHUNK), 1)
    sums = mean.new_zeros((3, samples, chunks, channels))
    block_l, block_c = tile_of(maps, TILES)
    params = all_contiguous(weight, bias, add, scale, shift)
    mean, rstd = mean.contiguous(), rstd.contiguous()

    def launch(level: Tensor, curve: Tensor, reduce: bool) -> None:
        if maps.numel() > 0:
            group_norm_silu_backward_kernel[(samples * chunks * triton.cdiv(channels, block_c),)](
                *(maps, grads, mean, rstd, *params, sums, made, level, curve),
                *(samples, positions, channels, groups, chunks),
                *(*maps.stride(), *grads.stride(), *made.stride()),
                SILU=silu,
                REDUCE=reduce,
                CHUNK=CHUNK,
                BLOCK_L=block_l,
                BLOCK_C=block_c,
            )

    launch(mean, mean, True)
    # Few small operations: on a GPU each costs the host as much as a kernel.
    totals = sums.squeeze(2) if chunks == 1 else sums.sum(2)  # [3, N, C]
    gz, normed_gz, normed = totals
    gained = totals[:2] if scale is None else totals[:2] * (1 + scale.to(totals.dtype))
    sloped = gained if weight is None else gained * weight  # [2, N, C]
    width = channels // groups
    factor = rstd * (0.0 if given else -1.0 / max(positions * width, 1))
    level, curve = sloped.unflatten(2, (groups, -1)).sum(3) * factor
    launch(level, curve, False)
    if made.data_ptr() != grad_x.data_ptr():
        grad_x.copy_(made.reshape(x.shape))

    def spread(values: Tensor) -> Tensor:  # [N, G] -> [N, C]
        return values.repeat_interleave(width, dim=1)

    # Of what was not given nobody asks the gradient.
    grad_add, grad_scale = torch.zeros_like(gz), torch.zeros_like(gz)
    if add is not None:
        grad_add = sloped[0] * spread(rstd) + spread(level) * positions + spread(curve) * normed
    if scale is not None:
        grad_scale = normed_gz if weight is None else normed_gz * weight
        grad_scale = grad_scale + (0.0 if bias is None else bias.to(gz.dtype) * gz)
    return grad_x, gained[1].sum(0), gained[0].sum(0), grad_add, grad_scale, gz
