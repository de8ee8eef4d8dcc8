# SPDX-License-Identifier: Apache-2.0
"""Softmax over rows that one program holds, in place, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements that one program holds: some rows, one a warp where they are short


@triton.jit
def softmax_kernel(
    x_ptr,  # [M, W], contiguous
    rows,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """BLOCK_M rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    c = tl.arange(0, BLOCK_W)[None, :]
    at, there = x_ptr + row * width + c, (row < rows) & (c < width)
    x = tl.load(at, mask=there, other=float("-inf")).to(tl.float32)
    x = tl.where(row < rows, x, 0.0)  # of no row there is no largest
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    out = e / tl.sum(e, axis=1)[:, None]
    tl.store(at, out.to(x_ptr.dtype.element_ty), mask=there)


def softmax_(
    x: Tensor,  # [..., W] fp32 | bf16 | fp16, contiguous
) -> Tensor:  # x
    """x becomes its softmax over the last dimension, in float32 within."""
    width = x.shape[-1]
    block_w = triton.next_power_of_2(width)
    block_m = max(1, BLOCK // block_w)
    if x.numel():
        rows = x.numel() // width
        softmax_kernel[(triton.cdiv(rows, block_m),)](
            x, rows, width, BLOCK_M=block_m, BLOCK_W=block_w
        )
    return x
