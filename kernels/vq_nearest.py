# SPDX-License-Identifier: Apache-2.0
"""vq_nearest in Triton; the equation stands in ops/vq_nearest.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M = 64  # vectors of one program
BLOCK_K = 128  # codes compared at a time


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
    """Codes pass in ascending blocks; the lowest index wins in a block and between blocks."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < count
    dtype = z_ptr.dtype.element_ty
    best = tl.full((BLOCK_M,), float("inf"), dtype=dtype)
    best_index = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for start in range(0, code_count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        distance = tl.zeros((BLOCK_M, BLOCK_K), dtype=dtype)
        for d in range(WIDTH):
            component = tl.load(z_ptr + m * WIDTH + d, mask=inside, other=0.0)
            code = tl.load(codes_ptr + k.to(tl.int64) * WIDTH + d, mask=k < code_count, other=0.0)
            difference = component[:, None] - code[None, :]
            distance += difference * difference
        # NaN never wins, and neither does a code beyond the last.
        valid = (distance == distance) & (k < code_count)[None, :]
        distance = tl.where(valid, distance, float("inf"))
        nearest = tl.min(distance, axis=1)
        candidates = tl.where(distance == nearest[:, None], k[None, :], code_count)
        closer = nearest < best
        best_index = tl.where(closer, tl.min(candidates, axis=1), best_index)
        best = tl.where(closer, nearest, best)
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
    if z.shape[0] > 0:
        vq_nearest_kernel[(triton.cdiv(z.shape[0], BLOCK_M),)](
            z,
            codes.contiguous(),
            vectors,
            indices,
            z.shape[0],
            codes.shape[0],
            WIDTH=z.shape[1],
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
        )
    return vectors, indices
