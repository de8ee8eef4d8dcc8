# SPDX-License-Identifier: Apache-2.0
"""Noise as a function of (seed, channel, y, x, step), without generator state.

Philox4x32-10 (Salmon et al. 2011) is keyed by the seed; its counter is (channel, y, x, step). The
first two of its four words become one normal by Box-Muller. A value depends on its coordinate
alone, so any rows can be drawn by themselves, in any order and by any process.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssldiff_fast._checks import check_positive

Words = npt.NDArray[np.uint64]  # 32-bit words, held in 64 bits so that products do not wrap

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10

# Steps of a run count from 1; the noise that a run starts from is that of step 0.
INITIAL_STEP = 0
# The channel whose words choose window offsets: no canvas has so many channels.
OFFSET_CHANNEL = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Words, Words, Words, Words],  # four of [...] uint64 below 2^32
    key: tuple[int, int],
) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four 32-bit words for each counter; the counters broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def check_seed(seed: int) -> int:
    """The seed as an int, or an error that says what a seed is."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed is {seed!r}; expected an integer from 0 to 2^64 - 1.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; expected an integer from 0 to 2^64 - 1.")
    return int(seed)


def seed_key(seed: int) -> tuple[int, int]:
    """The two key words of a seed."""
    seed = check_seed(seed)
    return seed & 0xFFFFFFFF, seed >> 32


def _box_muller(word0: Words, word1: Words) -> npt.NDArray[np.float32]:
    # 24 bits of each word are exact in float32, so every backend starts from the same numbers;
    # the radius draws from (0, 1], which keeps its logarithm finite.
    uniform = ((word0 >> np.uint64(8)) + np.uint64(1)).astype(np.float64) * 2.0**-24
    angle = (word1 >> np.uint64(8)).astype(np.float64) * (2.0 * np.pi * 2.0**-24)
    normal: npt.NDArray[np.float32] = (np.sqrt(-2.0 * np.log(uniform)) * np.cos(angle)).astype(
        np.float32
    )
    return normal


def philox_normal(
    seed: int, channels: int, rows: tuple[int, int], width: int, *, step: int = INITIAL_STEP
) -> Tensor:
    """Standard normal noise of the canvas rows y0 to y1 - 1.

    Args:
        seed: 0 to 2^64 - 1.
        channels: Number of channels C.
        rows: (y0, y1); what a row holds depends neither on the height nor on the width.
        width: Columns W of the canvas.
        step: 0 for the noise that a run starts from, i + 1 for its step i.

    Returns:
        [C, y1 - y0, W] fp32.
    """
    call = "philox_normal"
    check_positive("channels", channels, call=call)
    check_positive("width", width, call=call)
    y0, y1 = rows
    if not 0 <= y0 <= y1 <= 2**32 or width > 2**32 or not 0 <= step < 2**32:
        raise ValueError(
            f"{call}: rows {y0} to {y1}, width {width} and step {step} were asked for; "
            "coordinates and steps count from 0 and end at 2^32."
        )
    key = seed_key(seed)
    normal = np.empty((channels, y1 - y0, width), dtype=np.float32)
    x = np.arange(width, dtype=np.uint64)
    # Chunks of rows keep the 64-bit temporaries in the cache and small beside the canvas.
    chunk = max(1, 65_536 // width)
    for channel in range(channels):
        for first in range(y0, y1, chunk):
            last = min(first + chunk, y1)
            y = np.arange(first, last, dtype=np.uint64)[:, None]
            zero = np.uint64(0)
            counter = (np.uint64(channel) + zero * y, y, x[None, :], np.uint64(step) + zero * y)
            word0, word1, _, _ = philox4x32(counter, key)
            normal[channel, first - y0 : last - y0] = _box_muller(word0, word1)
    return torch.from_numpy(normal)


def canvas_noise(
    seed: int, channels: int, height: int, width: int, *, step: int = INITIAL_STEP
) -> Tensor:
    """Standard normal noise of a whole canvas: [C, H, W] fp32."""
    return philox_normal(seed, channels, (0, height), width, step=step)
