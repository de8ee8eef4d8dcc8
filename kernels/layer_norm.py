# SPDX-License-Identifier: Apache-2.0
"""LayerNorm over rows that one program holds, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements that one program holds: some rows


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
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    there = (row < rows) & (c < width)
    x = tl.load(x_ptr + row * width + c, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    away = tl.where(c < width, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(away * away, axis=1) / width + eps)
    weight = tl.load(weight_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    out = away * scale[:, None] * weight + bias
    tl.store(out_ptr + row * width + c, out.to(out_ptr.dtype.element_ty), mask=there)


def layer_norm(
    x: Tensor,  # [..., C] fp32 | bf16 | fp16, contiguous
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
) -> Tensor:  # like x
    """LayerNorm over the last dimension, in float32 within."""
    width, out = x.shape[-1], x.new_empty(x.shape)
    rows = x.numel() // max(width, 1)
    block_c = triton.next_power_of_2(width)
    block_m = max(1, min(BLOCK // block_c, triton.next_power_of_2(rows)))
    if out.numel():
        layer_norm_kernel[(triton.cdiv(rows, block_m),)](
            x, weight, bias, out, rows, width, eps, BLOCK_M=block_m, BLOCK_C=block_c
        )
    return out
