# SPDX-License-Identifier: Apache-2.0
"""The feed-forward's gates in Triton: values * gelu(gates) in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def geglu_kernel(
    x_ptr,  # [M, 2 W], contiguous
    out_ptr,  # [M, W]
    width,
    blocks,
    BLOCK: tl.constexpr,
):
    """A block of one row's columns."""
    program = tl.program_id(0).to(tl.int64)
    row, c = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
    values = x_ptr + row * 2 * width + c
    a = tl.load(values, mask=c < width, other=0.0).to(tl.float32)
    b = tl.load(values + width, mask=c < width, other=0.0).to(tl.float32)
    y = a * b * 0.5 * (1.0 + tl.erf(b * 0.7071067811865476))
    tl.store(out_ptr + row * width + c, y.to(out_ptr.dtype.element_ty), mask=c < width)


def geglu(
    projected: Tensor,  # [..., 2 W] fp32 | bf16 | fp16, contiguous
) -> Tensor:  # [..., W]
    """values * gelu(gates) of the two halves, gelu(x) = x (1 + erf(x / sqrt 2)) / 2."""
    width = projected.shape[-1] // 2
    out = projected.new_empty((*projected.shape[:-1], width))
    block = min(BLOCK, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    if out.numel():
        geglu_kernel[(out.numel() // width * blocks,)](
            projected, out, width, blocks, BLOCK=block, num_warps=4 if block >= 1024 else 1
        )
    return out
