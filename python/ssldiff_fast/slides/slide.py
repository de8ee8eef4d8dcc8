# SPDX-License-Identifier: Apache-2.0
"""The interface to slides and images: regions at any scale, in level-0 pixels."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# No scanner, light-sheet or whole-mount camera lies outside; a TIFF's 72 dpi (352.8 um) does.
MPP_RANGE = (0.05, 20.0)
# Up to here x and y are taken as one number (their geometric mean); scanners differ by 0.1 %.
MPP_ANISOTROPY = 0.02
# A level is taken where its pixels are at most this much coarser than what is asked for.
LEVEL_TOLERANCE = 1.01
# Larger pieces of a level are read in parts: 64 Mpx are 256 MiB of RGBA.
PIECE_PX = 2**26
# Below this a file is hashed whole.
HASH_WHOLE_BYTES = 2**30
HASH_END_BYTES = 16 * 2**20

RGB = NDArray[np.uint8]  # [h, w, 3]


class MppError(ValueError):
    """A slide or image that does not say its mpp, or says one that cannot be."""


def check_mpp(mpp: float, what: str) -> float:
    """The mpp as a float, or an error that says how to give another one."""
    if isinstance(mpp, bool) or not isinstance(mpp, (int, float, np.integer, np.floating)):
        raise TypeError(f"mpp of {what} must be a number, not {type(mpp).__name__}")
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:  # NaN fails too
        raise MppError(
            f"mpp of {what} is {mpp:g} um per pixel, expected {MPP_RANGE[0]:g} to "
            f"{MPP_RANGE[1]:g}: give the right one (command line: --mpp 0.5)"
        )
    return float(mpp)


class Slide(ABC):
    """A slide or image: positions and sizes are level-0 pixels, (x, y) from the top-left corner.

    Attributes:
        path: where it came from; None for an array.
        size_px: (width, height) at level 0.
        mpp: micrometres per level-0 pixel.
        properties: the file's metadata as text.
        levels_px: (width, height) of every pyramid level, finest first.
    """

    path: Path | None
    size_px: tuple[int, int]
    mpp: float
    properties: Mapping[str, str]
    levels_px: list[tuple[int, int]]

    @property
    @abstractmethod
    def hash(self) -> str:
        """Content hash with its kind: `quickhash-1:`, `sha256:`, `-ends:` or `-coarse:`."""

    @abstractmethod
    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """RGB pixels of a level, in that level's own pixels."""

    @property
    def name(self) -> str:
        return "array" if self.path is None else self.path.stem

    @property
    def in_memory(self) -> bool:
        """Whether the pixels are already decoded, so that reading ahead gains nothing."""
        return False

    def __str__(self) -> str:
        return "the image array" if self.path is None else str(self.path)

    def close(self) -> None:  # noqa: B027 - an image in memory has nothing to close
        """Frees the file handle; reading again opens it anew."""

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_region(self, region: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """(x, y, width, height) as integers, or an error when it leaves the slide."""
        if len(region) != 4:
            raise ValueError(f"region must be x,y,width,height in level-0 pixels, not {region}")
        x, y, width, height = (int(v) for v in region)
        if width < 1 or height < 1:
            raise ValueError(f"region {region} must have a positive width and height")
        full_w, full_h = self.size_px
        if x < 0 or y < 0 or x + width > full_w or y + height > full_h:
            raise ValueError(
                f"region x={x}, y={y}, width={width}, height={height} leaves {self}, which has "
                f"{full_w} x {full_h} level-0 pixels: choose a region inside"
            )
        return x, y, width, height

    def read_region_at(
        self, x: int, y: int, width: int, height: int, *, out_size: tuple[int, int]
    ) -> RGB:
        """A region resampled to a size, antialiased; transparent pixels become white.

        Reading a region in parts gives the same pixels (to rounding) as reading it whole: the
        resampling filter sees beyond each part's border.

        Args:
            x, y, width, height: level-0 pixels, inside the slide.
            out_size: (width, height) of the result.

        Returns:
            uint8 [out height, out width, 3].
        """
        x, y, width, height = self.check_region((x, y, width, height))
        out_w, out_h = (int(v) for v in out_size)
        if out_w < 1 or out_h < 1:
            raise ValueError(f"out_size must be positive, not {out_size}")
        result = np.empty((out_h, out_w, 3), np.uint8)
        self._fill(result, (float(x), float(y), float(width), float(height)))
        return result

    def thumbnail(self, max_px: int = 1024) -> RGB:
        """The whole slide, its longer side at most `max_px`."""
        return self.read_region_at(
            0, 0, *self.size_px, out_size=fit(self.size_px[0], self.size_px[1], max_px)
        )

    def thumbnail_rows(self, size: tuple[int, int], rows: range) -> RGB:
        """Some rows of the whole slide resampled to `size`, (width, height), to rounding.

        Returns:
            uint8 [rows, width, 3].
        """
        result = np.empty((len(rows), size[0], 3), np.uint8)
        span = self.size_px[1] / size[1]
        region = (0.0, rows.start * span, float(self.size_px[0]), len(rows) * span)
        self._fill(result, region)
        return result

    def _level_for(self, downsample: float) -> int:
        best = 0
        for level, (width, _) in enumerate(self.levels_px):
            if self.size_px[0] / width <= downsample * LEVEL_TOLERANCE:
                best = level
        return best

    def _fill(self, out: RGB, region: tuple[float, float, float, float]) -> None:
        x, y, width, height = region
        out_h, out_w = out.shape[:2]
        level = self._level_for(min(width / out_w, height / out_h))
        level_w, level_h = self.levels_px[level]
        down_x, down_y = self.size_px[0] / level_w, self.size_px[1] / level_h
        piece_w, piece_h = width / down_x, height / down_y
        if piece_w * piece_h > PIECE_PX and max(out_w, out_h) > 1:
            if out_w >= out_h:
                half, part = out_w // 2, width * (out_w // 2) / out_w
                self._fill(out[:, :half], (x, y, part, height))
                self._fill(out[:, half:], (x + part, y, width - part, height))
            else:
                half, part = out_h // 2, height * (out_h // 2) / out_h
                self._fill(out[:half], (x, y, width, part))
                self._fill(out[half:], (x, y + part, width, height - part))
            return
        # Bicubic reaches two (scaled) pixels beyond the box.
        margin_x = math.ceil(2 * max(1.0, piece_w / out_w)) + 1
        margin_y = math.ceil(2 * max(1.0, piece_h / out_h)) + 1
        x0, y0 = x / down_x, y / down_y
        left, top = max(0, math.floor(x0) - margin_x), max(0, math.floor(y0) - margin_y)
        right = min(level_w, math.ceil(x0 + piece_w) + margin_x)
        bottom = min(level_h, math.ceil(y0 + piece_h) + margin_y)
        image = self._read_level(level, left, top, right - left, bottom - top)
        box = (x0 - left, y0 - top, x0 - left + piece_w, y0 - top + piece_h)
        out[:] = _resample(image, box, (out_w, out_h))


def fit(width: int, height: int, max_px: int) -> tuple[int, int]:
    """(width, height) scaled down so that the longer side is at most `max_px`."""
    scale = min(1.0, max_px / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resample(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]
) -> RGB:
    left, top, right, bottom = (round(v) for v in box)
    exact = max(abs(a - b) for a, b in zip(box, (left, top, right, bottom))) < 1e-6
    if exact and (right - left, bottom - top) == size:
        return np.asarray(image.crop((left, top, right, bottom)))
    inside = (
        max(0.0, box[0]),
        max(0.0, box[1]),
        min(float(image.width), box[2]),
        min(float(image.height), box[3]),
    )
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=inside))


def on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    if image.mode.startswith(("I", "F")):
        raise ValueError("the image has more than 8 bits a channel: convert it to 8-bit RGB first")
    return image.convert("RGB")


def hash_file(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= HASH_WHOLE_BYTES:
            while block := file.read(2**20):
                digest.update(block)
            return f"sha256:{digest.hexdigest()}"
        # Reading a slide of tens of GiB for its name only is not worth minutes of disk time.
        digest.update(str(size).encode())
        digest.update(file.read(HASH_END_BYTES))
        file.seek(size - HASH_END_BYTES)
        digest.update(file.read(HASH_END_BYTES))
    return f"sha256-ends:{digest.hexdigest()}"
