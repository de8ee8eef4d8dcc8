# SPDX-License-Identifier: Apache-2.0
"""One training image at a scale: its pixels, and what a patch would be at each place of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssldiff_fast.training.recipe import SourceRecipe

_WHITE_STD = 6.0  # grey levels: below it a patch is background
_SAMPLED = 8  # each so many-th row and column says whether a patch is background
NOWHERE, BACKGROUND, TISSUE = 0, 1, 2  # what a patch with its corner there is


@dataclass(frozen=True)
class PoolImage:
    """One image at the target mpp times a scale, and where patches must not touch."""

    name: str
    pixels: np.ndarray  # [H, W, 3] uint8
    excluded: tuple[tuple[float, float, float, float], ...]  # x, y, w, h in these pixels
    weight: float

    def allows(self, y: int, x: int, size: int) -> bool:
        """Whether a patch with its top-left corner there touches no excluded region."""
        return not any(
            x < ex + ew and ex < x + size and y < ey + eh and ey < y + size
            for ex, ey, ew, eh in self.excluded
        )

    def kinds(self, size: int) -> np.ndarray:  # [H - size + 1, W - size + 1] uint8, or empty
        """What a patch is by its top-left corner: tissue, background, or not allowed (0)."""
        height, width = self.pixels.shape[:2]
        rows, columns = height - size + 1, width - size + 1
        if min(rows, columns) < 1:
            return np.zeros((0, 0), np.uint8)
        kinds = np.where(_is_tissue(self.pixels, size), np.uint8(TISSUE), np.uint8(BACKGROUND))
        for ex, ey, ew, eh in self.excluded:  # as `allows` says it, for all corners
            down = slice(*_between(ey - size, ey + eh, rows))
            kinds[down, slice(*_between(ex - size, ex + ew, columns))] = NOWHERE
        return kinds


def _between(low: float, high: float, count: int) -> tuple[int, int]:
    """The whole numbers n of range(count) with low < n < high, as first and one past the last."""
    return min(count, max(0, math.floor(low) + 1)), max(0, min(count, math.ceil(high)))


def _is_tissue(
    pixels: np.ndarray,  # [H, W, 3] uint8
    size: int,
) -> np.ndarray:  # [H - size + 1, W - size + 1] bool
    """Whether the standard deviation of a patch's sampled pixels shows more than background."""
    sums, squares = (np.zeros(pixels.shape[:2], np.int32) for _ in range(2))
    for channel in range(3):  # numpy sums along three values slowly
        plane = pixels[..., channel].astype(np.int32)
        sums += plane
        squares += plane * plane
    sums, squares = _sampled_sums(sums, size), _sampled_sums(squares, size)
    count = 3 * (-(-size // _SAMPLED)) ** 2
    return np.asarray(squares / count - (sums / count) ** 2 > _WHITE_STD**2)


def _sampled_sums(
    values: np.ndarray,  # [H, W] int32
    size: int,
) -> np.ndarray:  # [H - size + 1, W - size + 1] int32
    """Sums over each eighth row and column of the square below and right of each position."""
    for axis in (0, 1):
        values = np.moveaxis(values, axis, 0)
        positions, left = len(values) - size + 1, -(-size // _SAMPLED)
        total: Any = 0
        power, width, offset = values, 1, 0
        while True:  # `power` holds sums of `width` samples, which doubles
            if left & 1:
                part = power[offset * _SAMPLED :][:positions]
                total = total + part
                offset += width
            left >>= 1
            if not left:
                break
            power = power[: -width * _SAMPLED] + power[width * _SAMPLED :]
            width *= 2
        values = np.moveaxis(total, 0, axis)
    return values


def _read(path: Path) -> Image.Image:
    if path.suffix.lower() in {".jpg", ".jpeg", ".png"}:
        try:
            return Image.open(path).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise OSError(
                f"the training image {path} cannot be read ({error}); remove or replace it"
            ) from None
    from ssldiff_fast.slides.reader import open_slide

    slide = open_slide(path)
    width, height = slide.size_px
    return Image.fromarray(slide.read_region_at(0, 0, width, height, out_size=(width, height)))


def _scaled(
    image: Image.Image, source: SourceRecipe, mpp: float, scale: float
) -> tuple[np.ndarray, float]:
    factor = source.mpp / mpp * scale
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS)), factor


def scaled_images(
    mpp: float, scales: list[float], wanted: tuple[Path, SourceRecipe]
) -> list[PoolImage]:
    """One file at each scale."""
    path, source = wanted
    image = _read(path)
    images = []
    for scale in scales:
        pixels, factor = _scaled(image, source, mpp, scale)
        excluded = tuple(
            (x * factor, y * factor, w * factor, h * factor) for x, y, w, h in source.exclude
        )
        area = pixels.shape[0] * pixels.shape[1] / scale**2
        images.append(PoolImage(path.name, pixels, excluded, source.weight * area))
    return images
