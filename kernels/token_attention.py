# SPDX-License-Identifier: Apache-2.0
"""token_attention in Triton; the equations stand in ops/token_attention.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements that one program holds at a time: some rows of a window


@triton.jit
def normalised(row, columns, width, eps):
    """LN of each row of a block, zero beyond the width, without weight and bias."""
    mean = tl.sum(row, axis=1) / width
    centred = tl.where(columns < width, row - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / width
    return centred * (1.0 / tl.sqrt(variance + eps))[:, None]


@triton.jit
def token_attention_kernel(
    x_ptr,  # [N, L, C]
    values_ptr,  # [N, S, C], contiguous; [N, C] without HAS_KEYS
    norm_weight_ptr,  # [C], contiguous
    norm_bias_ptr,  # [C], contiguous
    keys_ptr,  # [N, S, C], contiguous; anything without HAS_KEYS
    offsets_ptr,  # [N, S], contiguous; likewise
    y_ptr,  # [N, L, C], contiguous
    z_ptr,  # [N, L, C], contiguous
    length,
    width,
    heads,
    tokens,
    blocks,
    eps,
    stride_xn,
    stride_xl,
    stride_xc,
    HAS_KEYS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program makes BLOCK_L rows of one window; the tokens pass one by one."""
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    rows = (program % blocks * BLOCK_L + tl.arange(0, BLOCK_L))[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    inside = (rows < length) & (columns < width)
    dtype = values_ptr.dtype.element_ty
    x = x_ptr + n * stride_xn + rows * stride_xl + columns.to(tl.int64) * stride_xc
    y = tl.load(x, mask=inside, other=0.0).to(dtype)
    if HAS_KEYS:
        normed = normalised(y, columns, width, eps)
        for head in range(heads):
            # Softmax as its tokens come: what came before is scaled when a larger logit appears.
            largest = tl.full((BLOCK_L,), float("-inf"), dtype=dtype)
            total = tl.zeros((BLOCK_L,), dtype=dtype)
            sums = tl.zeros((BLOCK_L, BLOCK_C), dtype=dtype)
            for token in range(tokens):
                s = (n * heads + head) * tokens + token
                key = tl.load(keys_ptr + s * width + columns, mask=columns < width, other=0.0)
                value = tl.load(values_ptr + s * width + columns, mask=columns < width, other=0.0)
                logit = tl.sum(normed * key, axis=1) + tl.load(offsets_ptr + s)
                larger = tl.maximum(largest, logit)
                kept = tl.exp(largest - larger)
                share = tl.exp(logit - larger)
                sums = sums * kept[:, None] + share[:, None] * value
                total = total * kept + share
                largest = larger
            y += sums / total[:, None]
    else:
        y += tl.load(values_ptr + n * width + columns, mask=columns < width, other=0.0)
    out = (n * length + rows) * width + columns
    tl.store(y_ptr + out, y, mask=inside)
    weight = tl.load(norm_weight_ptr + columns, mask=columns < width, other=0.0).to(dtype)
    bias = tl.load(norm_bias_ptr + columns, mask=columns < width, other=0.0).to(dtype)
    z = normalised(y, columns, width, eps) * weight + bias
    tl.store(z_ptr + out, z, mask=inside)


def token_attention(
    x: Tensor,  # [N, L, C] fp32 | bf16 | fp16 | fp64
    values: Tensor,  # [N, C] or [N, S, C], fp32, or fp64 as x
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    keys: Tensor | None,  # [N, S, C]
    offsets: Tensor | None,  # [N, S]
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:  # twice [N, L, C], dtype of x
    """Launch the kernel; arguments have been checked by ops/token_attention.py."""
    windows, length, width = x.shape
    y, z = (x.new_empty(x.shape) for _ in range(2))
    if y.numel() == 0:
        return y, z
    values = values.contiguous()
    block_c = triton.next_power_of_2(width)
    block_l = max(1, min(BLOCK // block_c, triton.next_power_of_2(length)))
    blocks = triton.cdiv(length, block_l)
    token_attention_kernel[(windows * blocks,)](
        x,
        values,
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        values if keys is None else keys.contiguous(),
        values if offsets is None else offsets.contiguous(),
        y,
        z,
        length,
        width,
        heads,
        1 if keys is None else keys.shape[1] // heads,
        blocks,
        eps,
        *x.stride(),
        HAS_KEYS=keys is not None,
        BLOCK_L=block_l,
        BLOCK_C=block_c,
    )
    return y, z
