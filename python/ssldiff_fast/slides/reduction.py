# SPDX-License-Identifier: Apache-2.0
"""Halving an image for the next level of its pyramid, piece by piece with the same bytes.

The arithmetic is compiled (csrc/cpu/halve.cpp): in numpy it took as long as the codec of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .raster import Rows

LANCZOS_LOBES = 3


@dataclass(frozen=True)
class Reduction:
    """A 2x reduction whose pixel i is made of the pixels 2i - reach .. 2i + 1 + reach.

    Beyond its borders the image repeats its last pixel.
    """

    name: str
    weights: tuple[float, ...]  # of those 2 + 2 reach pixels, on each axis; none: the plain mean

    @property
    def reach(self) -> int:
        """Pixels needed beyond the two that a pixel covers, on each side."""
        return max(0, len(self.weights) // 2 - 1)

    def halve(self, pixels: Rows) -> Rows:
        """Pixels with `reach` more on every side, even sizes -> half as many without these.

        The plain mean takes any size: an odd last row or column is repeated. On the calling thread,
        without Python's lock.
        """
        import torch

        from ssldiff_fast import _C

        _C.require("open_writer")
        # Contiguous rows are read where they lie; torch wants them downwards and writable.
        lies = pixels.strides[1:] == (pixels.shape[2], 1) and pixels.strides[0] > 0
        given = torch.from_numpy(pixels if lies and pixels.flags.writeable else pixels.copy())
        halved: Rows = torch.ops.ssldiff.halve(given, self.weights).numpy()
        return halved


def halve_reference(pixels: Rows, weights: Sequence[float] = ()) -> Rows:
    """`Reduction.halve` in plain numpy: what the compiled operator is tested against."""
    if not weights:
        return _means(pixels)
    taps = np.asarray(weights, np.float32)
    halved = _weighted(_weighted(pixels.astype(np.float32), taps, 0), taps, 1)
    return np.clip(np.rint(halved), 0, 255).astype(np.uint8)


def _means(pixels: Rows) -> Rows:  # [h, w, bands]
    """2x2 box reduction, rounded to nearest; an odd last row or column is repeated."""
    odd = pixels.shape[0] % 2, pixels.shape[1] % 2
    even = np.pad(pixels, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge").astype(np.uint16)
    total = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def _weighted(
    values: NDArray[np.float32], taps: NDArray[np.float32], axis: int
) -> NDArray[np.float32]:
    # One addition after the other, so that a pixel is the same whatever piece it is made in.
    count = (values.shape[axis] - len(taps)) // 2 + 1
    total: NDArray[np.float32] | None = None
    for tap, weight in enumerate(taps):
        piece = values[tap : tap + 2 * count : 2] if axis == 0 else values[:, tap:][:, ::2]
        term = (piece if axis == 0 else piece[:, :count]) * weight
        total = term if total is None else np.add(total, term, out=total)
    if total is None:
        raise ValueError("a reduction has at least two weights")
    return total


def _lanczos() -> tuple[float, ...]:
    def kernel(x: float) -> float:
        lobes = LANCZOS_LOBES
        return math.sin(math.pi * x) * math.sin(math.pi * x / lobes) * lobes / (math.pi * x) ** 2

    # Centres of the source pixels, in units of the halved image's pixels.
    places = [(tap + 0.5) / 2 for tap in range(-2 * LANCZOS_LOBES, 2 * LANCZOS_LOBES)]
    values = [kernel(place) for place in places]
    return tuple(value / sum(values) for value in values)


REDUCTIONS = {
    "box": Reduction("box", ()),
    "lanczos": Reduction("lanczos", _lanczos()),
}
