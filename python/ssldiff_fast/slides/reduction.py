# SPDX-License-Identifier: Apache-2.0
"""Halving an image for the next level of its pyramid, piece by piece with the same bytes."""

from __future__ import annotations

import math
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
        """Pixels with `reach` more on every side, even sizes -> half as many without these."""
        if not self.weights:
            return halve(pixels)
        taps = np.asarray(self.weights, np.float32)
        halved = _weighted(_weighted(pixels.astype(np.float32), taps, 0), taps, 1)
        return np.clip(np.rint(halved), 0, 255).astype(np.uint8)


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


def halve(pixels: Rows) -> Rows:  # [h, w, bands], any size
    """2x2 box reduction, rounded to nearest; an odd last row or column is repeated."""
    height, width, bands = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        height, width = pixels.shape[:2]
    # Sums of every pixel with its right neighbour are made at full speed, and every second is
    # taken as one item of `bands` bytes: four times as fast as strided sums.
    pairs = np.add(pixels[0::2], pixels[1::2], dtype=np.uint16).reshape(-1)
    sums = np.zeros(pairs.size, np.uint16)
    np.add(pairs[:-bands], pairs[bands:], out=sums[:-bands])
    sums += 2
    sums >>= 2
    means = sums.astype(np.uint8)
    taken = np.ndarray((means.size // (2 * bands),), f"V{bands}", means, strides=(2 * bands,))
    result: Rows = taken.copy().view(np.uint8).reshape(height // 2, width // 2, bands)
    return result


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
