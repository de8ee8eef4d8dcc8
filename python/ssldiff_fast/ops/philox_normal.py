# SPDX-License-Identifier: Apache-2.0
"""Noise as a function of (seed, channel, y, x, step), without generator state."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import _C, _checks
from ._register import register

_CALL = "philox_normal"
_WORDS_CALL = "philox4x32"
COUNTER_LIMIT = 2**32  # of each of the four counters

Words = npt.NDArray[np.uint64]  # 32-bit words, held in 64 bits so that products do not wrap


def philox_normal(
    seed: int,
    channels: int,
    rows: tuple[int, int],
    width: int,
    *,
    step: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:  # [C, y1 - y0, W] fp32
    r"""Standard normal noise of the canvas rows y0 to y1 - 1, by Philox4x32-10 and Box-Muller.

    The generator (Salmon et al. 2011) is keyed by the seed and counts (channel, y, x, step). With
    `a` and `b` the upper 24 bits of the first two of its four words,

        out(c, y, x) = sqrt(-2 log((a + 1) / 2^24)) cos(2 pi b / 2^24)

    A value depends on its coordinate alone: any rows are drawn by themselves, in any order, by any
    process and any number of threads, with the same bits. The words agree bit for bit with the
    published test vectors everywhere. The normals are made of correctly rounded float32 steps in
    one order, the same on every processor and GPU; they are within a few units in the last place
    of the formula. No gradient flows.

    Args:
        seed: 0 to 2^64 - 1.
        channels: number of channels C.
        rows: (y0, y1); what a row holds depends neither on the height nor on the width.
        width: columns W of the canvas.
        step: 0 for the noise that a run starts from, i + 1 for its step i.
        device: where the noise is drawn.

    Returns:
        The noise [C, y1 - y0, W].

    Raises:
        TypeError: a seed or a size that is no whole number.
        ValueError: a seed, a size, a coordinate or a step beyond its range.
        RuntimeError: the compiled operators are missing.
    """
    seed = _check(seed, channels, rows, width, step)
    _C.require(_CALL)
    out = torch.empty(channels, rows[1] - rows[0], width, dtype=torch.float32, device=device)
    torch.ops.ssldiff.philox_normal(out, _signed(seed), rows[0], step)
    return out


def philox_normal_reference(
    seed: int,
    channels: int,
    rows: tuple[int, int],
    width: int,
    *,
    step: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:  # [C, y1 - y0, W] fp32
    """The same in plain NumPy, the normals in float64 before they are rounded."""
    seed = _check(seed, channels, rows, width, step)
    c = np.arange(channels, dtype=np.uint64)[:, None, None]
    y = np.arange(*rows, dtype=np.uint64)[None, :, None]
    x = np.arange(width, dtype=np.uint64)[None, None]
    word0, word1, _, _ = _rounds((c, y, x, np.uint64(step) + np.zeros_like(x)), seed)
    # 24 bits of a word are exact in float32, so every backend starts from the same numbers; the
    # radius draws from (0, 1], which keeps its logarithm finite.
    uniform = ((word0 >> np.uint64(8)) + np.uint64(1)).astype(np.float64) * 2.0**-24
    angle = (word1 >> np.uint64(8)).astype(np.float64) * (2.0 * np.pi * 2.0**-24)
    normal = (np.sqrt(-2.0 * np.log(uniform)) * np.cos(angle)).astype(np.float32)
    return torch.from_numpy(normal).to(device)


def philox4x32(
    counters: Tensor,  # [N, 4] int64
    seed: int,
) -> Tensor:  # [N, 4] int64
    """The generator's words themselves: four of 32 bits for each counter of four.

    Args:
        counters: of each entry the low 32 bits count.
        seed: 0 to 2^64 - 1: the key, its low word first.

    Returns:
        Words from 0 to 2^32 - 1.

    Raises:
        TypeError: counters that are no int64 tensor, or a seed that is no whole number.
        ValueError: counters of another shape, or a seed beyond its range.
        RuntimeError: the compiled operators are missing.
    """
    seed = _check_words(counters, seed)
    _C.require(_WORDS_CALL)
    return torch.ops.ssldiff.philox4x32(counters, _signed(seed))


def philox4x32_reference(
    counters: Tensor,  # [N, 4] int64
    seed: int,
) -> Tensor:  # [N, 4] int64
    """The same in plain NumPy."""
    seed = _check_words(counters, seed)
    c0, c1, c2, c3 = (counters.cpu() & (COUNTER_LIMIT - 1)).numpy().astype(np.uint64).T
    words = np.stack(_rounds((c0, c1, c2, c3), seed), axis=1)
    return torch.from_numpy(words.astype(np.int64)).to(counters.device)


def _rounds(
    counter: tuple[Words, Words, Words, Words],  # four of [...] uint64 below 2^32
    seed: int,
) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox4x32; the counters broadcast."""
    low, shift = np.uint64(COUNTER_LIMIT - 1), np.uint64(32)
    c0, c1, c2, c3 = counter
    key0, key1 = seed % COUNTER_LIMIT, seed // COUNTER_LIMIT
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(key0),
            product1 & low,
            (product0 >> shift) ^ c3 ^ np.uint64(key1),
            product0 & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) % COUNTER_LIMIT, (key1 + 0xBB67AE85) % COUNTER_LIMIT
    return c0, c1, c2, c3


def check_seed(seed: int, *, call: str | None = None) -> int:
    """The seed as an int, or an error that says what a seed is, and which public call was made."""
    where = "" if call is None else f"{call}: "
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"{where}seed is {seed!r}; expected an integer from 0 to 2^64 - 1.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{where}seed is {seed}; expected an integer from 0 to 2^64 - 1.")
    return int(seed)


def _check(seed: int, channels: int, rows: tuple[int, int], width: int, step: int) -> int:
    _checks.check_count("channels", channels, call=_CALL)
    _checks.check_count("width", width, call=_CALL)
    y0, y1 = rows
    for name, value in (("rows", y0), ("rows", y1), ("step", step)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{_CALL}: {name} holds {value!r}, but whole numbers were expected.")
    if not (
        0 <= y0 <= y1 <= COUNTER_LIMIT
        and max(channels, width) <= COUNTER_LIMIT
        and 0 <= step < COUNTER_LIMIT
    ):
        raise ValueError(
            f"{_CALL}: {channels} channels, rows {y0} to {y1}, width {width} and step {step} were "
            f"asked for; coordinates and steps count from 0 and end at 2^32."
        )
    return check_seed(seed)


def _check_words(counters: Tensor, seed: int) -> int:
    _checks.check_shape("counters", counters, "N 4", call=_WORDS_CALL)
    _checks.check_dtype("counters", counters, (torch.int64,), call=_WORDS_CALL)
    return check_seed(seed)


def _signed(seed: int) -> int:
    """The same 64 bits as the int64 that operators take."""
    return seed - 2**64 if seed >= 2**63 else seed


def _fake(out: Tensor, seed: int, first_row: int, step: int) -> None:
    return None


def _fake_words(counters: Tensor, seed: int) -> Tensor:
    return counters.new_empty(counters.shape)


def _triton(*arguments: Any) -> None:
    from ..kernels.philox_normal import philox_normal as kernel

    kernel(*arguments)


def _triton_words(*arguments: Any) -> Tensor:
    from ..kernels.philox_normal import philox4x32 as kernel

    return kernel(*arguments)


register(_CALL, fake=_fake, triton=_triton)
register(_WORDS_CALL, fake=_fake_words, triton=_triton_words)
