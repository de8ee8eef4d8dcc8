# SPDX-License-Identifier: Apache-2.0
"""vq_nearest in Triton; the equation stands in ops/vq_nearest.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Vectors of one program, and codes compared at a time: on an H200 65,536 vectors and 8,192 codes
# take 0.34 ms, 0.43 with 64 vectors. In float64 so many would not fit into the registers.
BLOCK_M = {torch.float32: 128, torch.float64: 32}
BLOCK_K = 64


@triton.jit
def vq_nearest_kernel(
    z_ptr,  # [M, D], contiguous
    codes_ptr,  # [K, D], contiguous
    vectors_ptr,  # [M, D], contiguous
    indices_ptr,  # [M]
    count,
    code_count,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes pass in ascending blocks, and each lane keeps the first of its nearest; of the lanes
    the lowest index wins."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < count
    lane = tl.arange(0, BLOCK_K)
    dtype = z_ptr.dtype.element_ty
    best = tl.full((BLOCK_M, BLOCK_K), float("inf"), dtype=dtype)
    block = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    for start in range(0, code_count, BLOCK_K):
        k = start + lane
        distance = tl.zeros((BLOCK_M, BLOCK_K), dtype=dtype)
        for d in range(WIDTH):
            component = tl.load(z_ptr + m * WIDTH + d, mask=inside, other=0.0)
            # A code beyond the last is infinitely far, or NaN, which is never nearer.
            to = codes_ptr + k.to(tl.int64) * WIDTH + d
            code = tl.load(to, mask=k < code_count, other=float("inf"))
            difference = component[:, None] - code[None, :]
            distance += difference * difference
        closer = distance < best
        best = tl.where(closer, distance, best)
        block = tl.where(closer, start, block)
    nearest = tl.min(best, axis=1)
    found = tl.where(best == nearest[:, None], block + lane[None, :], code_count)
    best_index = tl.min(found, axis=1)
    tl.store(indices_ptr + m, best_index.to(tl.int64), mask=inside)
    for d in range(WIDTH):
        code = tl.load(codes_ptr + best_index.to(tl.int64) * WIDTH + d, mask=inside, other=0.0)
        tl.store(vectors_ptr + m * WIDTH + d, code, mask=inside)


def vq_nearest(
    z: Tensor,  # [M, D] fp32 | fp64
    codes: Tensor,  # [K, D], dtype of z
) -> tuple[Tensor, Tensor]:  # [M, D], [M] int64
    """Launch the kernel; arguments have been checked by ops/vq_nearest.py."""
    z = z.contiguous()
    vectors = torch.empty_like(z)
    indices = z.new_empty(z.shape[0], dtype=torch.int64)
    block_m = BLOCK_M[z.dtype]
    if z.shape[0] > 0:
        vq_nearest_kernel[(triton.cdiv(z.shape[0], block_m),)](
            z,
            codes.contiguous(),
            vectors,
            indices,
            z.shape[0],
            codes.shape[0],
            WIDTH=z.shape[1],
            BLOCK_M=block_m,
            BLOCK_K=BLOCK_K,
        )
    return vectors, indices
