# SPDX-License-Identifier: Apache-2.0
"""philox_normal and philox4x32 in Triton; the equations stand in ops/philox_normal.py.

The normal is the one of csrc/include/philox.h, operation by operation: both give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # values or counters of one program


@triton.jit
def minus_log(n):  # [BLOCK] uint32, 1 to 2^24 -> -log(n / 2^24)
    bits = n.to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    e = ((bits >> 23) - (127 + 24)).to(tl.float32)
    m = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    series = z * 0.111111111 + 0.142857143
    series = z * series + 0.2
    series = z * series + 0.333333333
    small = (2.0 * s) * z * series + e * 1.42860677e-6
    return -(e * 0.693145752 + (2.0 * s + small))


@triton.jit
def cos_turn(n):  # [BLOCK] uint32 below 2^24 -> cos(2 pi n / 2^24)
    shifted = n.to(tl.int32) + (1 << 21)
    quarter = shifted >> 22
    r = ((shifted & 0x003FFFFF) - (1 << 21)).to(tl.float32) * 3.74507039e-7
    z = r * r
    sine = z * 2.75573192e-6 - 1.98412698e-4
    sine = z * sine + 8.33333333e-3
    sine = z * sine - 0.166666667
    sine = r + (r * z) * sine
    cosine = z * -2.75573192e-7 + 2.48015873e-5
    cosine = z * cosine - 1.38888889e-3
    cosine = z * cosine + 4.16666667e-2
    cosine = z * cosine - 0.5
    cosine = z * cosine + 1.0
    value = tl.where((quarter & 1) != 0, sine, cosine)
    return tl.where(((quarter + 1) & 2) != 0, -value, value)


@triton.jit(do_not_specialize=["seed", "first_row", "step"])
def philox_normal_kernel(
    out_ptr,  # [C, rows, W], contiguous
    count,
    rows,
    width,
    seed,
    first_row,
    step,
    BLOCK: tl.constexpr,
):
    """One normal for each element, by its coordinate."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    line = index // width
    channel = (line // rows).to(tl.uint32)
    y = (line % rows + first_row).to(tl.uint32)
    x = (index % width).to(tl.uint32)
    word0, word1, _, _ = tl.philox(seed, channel, y, x, tl.zeros_like(x) + tl.cast(step, tl.uint32))
    radius = tl.sqrt_rn(2.0 * minus_log((word0 >> 8) + 1))
    tl.store(out_ptr + index, radius * cos_turn(word1 >> 8), mask=index < count)


@triton.jit(do_not_specialize=["seed"])
def philox4x32_kernel(
    counters_ptr,  # [N, 4], contiguous
    words_ptr,  # [N, 4], contiguous
    count,
    seed,
    BLOCK: tl.constexpr,
):
    """Four words for each counter of four."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < count
    c0 = tl.load(counters_ptr + 4 * n, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(counters_ptr + 4 * n + 1, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(counters_ptr + 4 * n + 2, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(counters_ptr + 4 * n + 3, mask=inside, other=0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(words_ptr + 4 * n, w0.to(tl.int64), mask=inside)
    tl.store(words_ptr + 4 * n + 1, w1.to(tl.int64), mask=inside)
    tl.store(words_ptr + 4 * n + 2, w2.to(tl.int64), mask=inside)
    tl.store(words_ptr + 4 * n + 3, w3.to(tl.int64), mask=inside)


def philox_normal(
    out: Tensor,  # [C, rows, W] fp32, contiguous
    seed: int,
    first_row: int,
    step: int,
) -> None:
    """Launch the kernel; arguments have been checked by ops/philox_normal.py."""
    if out.numel() > 0:
        philox_normal_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            out,
            out.numel(),
            *out.shape[1:],
            seed,
            first_row,
            step,
            BLOCK=BLOCK,
            # a * b + c rounds twice, as on the CPU.
            enable_fp_fusion=False,
        )


def philox4x32(
    counters: Tensor,  # [N, 4] int64
    seed: int,
) -> Tensor:  # [N, 4] int64
    """Launch the kernel; arguments have been checked by ops/philox_normal.py."""
    words = torch.empty_like(counters, memory_format=torch.contiguous_format)
    if words.numel() > 0:
        philox4x32_kernel[(triton.cdiv(words.shape[0], BLOCK),)](
            counters.contiguous(), words, words.shape[0], seed, BLOCK=BLOCK
        )
    return words
