# SPDX-License-Identifier: Apache-2.0
"""The feed-forward's gates in Triton: values * gelu(gates), in one pass or with their product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 2048
# Rows, columns (of values and of gates) and summands of a program of the product. With 4 warps and
# 3 stages two programs share a multiprocessor, and the gates of one hide behind the product of the
# other. On an H200 in bfloat16, 64 windows, beside product and gates one after another: 380 us for
# 486 at 1024 positions of 384 channels, 193 for 253 at 256 of 576, 120 for 130 at 64 of 960.
TILE = (128, 64, 64)
HALF = (torch.bfloat16, torch.float16)


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


@triton.jit
def gelu(x):
    """x (1 + erf(x / sqrt 2)) / 2, by Abramowitz and Stegun 7.1.26 to 1.5e-7 of erf."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
    series = t * (0.254829592 + t * (-0.284496736 + series))
    erf = 1.0 - series * tl.exp(-z * z)
    return 0.5 * x * (1.0 + tl.where(x < 0, -erf, erf))


@triton.jit
def geglu_linear_kernel(
    x_tile,  # of [M, K]
    weight_tile,  # of [2 W, K]
    out_tile,  # of [M, W]
    bias_ptr,  # [2 W]
    rows,
    width,
    SUMMANDS: tl.constexpr,  # K
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of the output: two products of the same rows, then the gates.

    GROUP tiles of rows go over all columns together, so that they find the weights in the cache.
    """
    program = tl.program_id(0)
    columns = tl.cdiv(width, BLOCK_W)
    first = program // (GROUP * columns) * GROUP
    together = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    of_group = program % (GROUP * columns)
    m, w = (first + of_group % together) * BLOCK_M, of_group // together * BLOCK_W
    values = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    gates = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for k in range(0, SUMMANDS, BLOCK_K):
        x = x_tile.load([m, k])
        values = tl.dot(x, weight_tile.load([w, k]).T, values)
        gates = tl.dot(x, weight_tile.load([width + w, k]).T, gates)
    c = w + tl.arange(0, BLOCK_W)
    known = c < width
    values += tl.load(bias_ptr + c, mask=known, other=0.0).to(tl.float32)[None, :]
    gates += tl.load(bias_ptr + width + c, mask=known, other=0.0).to(tl.float32)[None, :]
    out_tile.store([m, w], (values * gelu(gates)).to(out_tile.dtype))


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


def geglu_linear(
    x: Tensor,  # [..., K] bf16 | fp16, contiguous, K a multiple of 8
    weight: Tensor,  # [2 W, K], contiguous, W a multiple of 8
    bias: Tensor,  # [2 W]
) -> Tensor:  # [..., W]
    """`geglu` of the product, which is never written: float32 up to the output's rounding."""
    width, summands = len(weight) // 2, x.shape[-1]
    flat = x.view(-1, summands)
    out = x.new_empty((*x.shape[:-1], width))
    block_m, block_w, block_k = TILE
    programs = triton.cdiv(len(flat), block_m) * triton.cdiv(width, block_w)
    if out.numel():
        geglu_linear_kernel[(programs,)](
            TensorDescriptor.from_tensor(flat, [block_m, block_k]),
            TensorDescriptor.from_tensor(weight, [block_w, block_k]),
            TensorDescriptor.from_tensor(out.view(-1, width), [block_m, block_w]),
            *(bias, len(flat), width),
            SUMMANDS=summands,
            BLOCK_M=block_m,
            BLOCK_W=block_w,
            BLOCK_K=block_k,
            GROUP=8,
            num_warps=4,
            num_stages=3,
        )
    return out
