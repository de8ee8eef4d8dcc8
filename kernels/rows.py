# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and softmax over rows, some of which one program holds, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements that one program holds: some rows


@triton.jit
def places(rows, width, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where BLOCK_M rows of this program lie, and which of their elements there are."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    return row * width + c, (row < rows) & (c < width)


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [M, C], contiguous
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [M, C]
    rows,
    width,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_M rows."""
    at, there = places(rows, width, BLOCK_M, BLOCK_C)
    c = tl.arange(0, BLOCK_C)[None, :]
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    away = tl.where(c < width, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(away * away, axis=1) / width + eps)
    weight = tl.load(weight_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    out = away * scale[:, None] * weight + bias
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def softmax_kernel(
    x_ptr,  # [M, C], contiguous
    rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_M rows, in place."""
    at, there = places(rows, width, BLOCK_M, BLOCK_C)
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    x = tl.where(tl.arange(0, BLOCK_C)[None, :] < width, x, float("-inf"))
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    out = e / tl.sum(e, axis=1)[:, None]
    tl.store(x_ptr + at, out.to(x_ptr.dtype.element_ty), mask=there)


def layer_norm(
    x: Tensor,  # [..., C] fp32 | bf16 | fp16, contiguous
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
) -> Tensor:  # like x
    """LayerNorm over the last dimension, in float32 within."""
    out = x.new_empty(x.shape)
    if out.numel():
        programs, sizes, blocks = _launch(x)
        layer_norm_kernel[programs](x, weight, bias, out, *sizes, eps, **blocks)
    return out


def softmax_(
    x: Tensor,  # [..., C] fp32 | bf16 | fp16, contiguous
) -> Tensor:  # x
    """x becomes its softmax over the last dimension, in float32 within."""
    if x.numel():
        programs, sizes, blocks = _launch(x)
        softmax_kernel[programs](x, *sizes, **blocks)
    return x


def _launch(x: Tensor) -> tuple[tuple[int], tuple[int, int], dict[str, int]]:
    """Programs, (rows, width), and what one of them holds."""
    width = x.shape[-1]
    rows = x.numel() // width
    block_c = triton.next_power_of_2(width)
    block_m = max(1, min(BLOCK // block_c, triton.next_power_of_2(rows)))
    return (triton.cdiv(rows, block_m),), (rows, width), {"BLOCK_M": block_m, "BLOCK_C": block_c}
