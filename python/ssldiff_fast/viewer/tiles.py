# SPDX-License-Identifier: Apache-2.0
"""Deep-zoom tiles of a slide, rendered on demand, with a cache of bounded size."""

from __future__ import annotations

import io
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from PIL import Image

from ..slides.slide import LEVEL_TOLERANCE, Slide, fit

TILE_PX = 512
# Ours is a tool for comparing pixels: little loss, and no halving of colour.
JPEG_QUALITY = 90
CACHE_BYTES = 256 * 2**20
# A tile made from more pixels than this, because the slide lacks coarse levels, is made from an
# overview of the slide, which is read once.
DIRECT_PX = 2**24
OVERVIEW_PX = 4096


class TileCache:
    """The most recently used tiles, up to a number of bytes; safe to use from several threads."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit, self.size = limit, 0
        self._tiles: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tiles)

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """A tile from the cache, or made now."""
        with self._lock:
            found = self._tiles.get(key)
            if found is not None:
                self._tiles.move_to_end(key)
                return found
        made = make()
        with self._lock:
            if key not in self._tiles and len(made) <= self.limit:
                self._tiles[key] = made
                self.size += len(made)
            while self.size > self.limit:
                self.size -= len(self._tiles.popitem(last=False)[1])
        return made


class DeepZoom:
    """The tiles of a slide in Microsoft's Deep Zoom layout, without overlap.

    Level `levels - 1` has the slide's own pixels, and each one before it half of them, rounded up,
    down to a single pixel. The last tile of a row or column is as small as what is left.
    """

    def __init__(self, slide: Slide, tile: int = TILE_PX) -> None:
        self.slide, self.tile = slide, tile
        self.levels = (max(slide.size_px) - 1).bit_length() + 1
        self._overview: Slide | None = None
        self._lock = threading.Lock()

    def level_px(self, level: int) -> tuple[int, int]:
        """(width, height) of a level."""
        down = 2 ** (self.levels - 1 - level)
        return math.ceil(self.slide.size_px[0] / down), math.ceil(self.slide.size_px[1] / down)

    def has(self, level: int, column: int, row: int) -> bool:
        """Whether there is such a tile."""
        if not 0 <= level < self.levels or column < 0 or row < 0:
            return False
        width, height = self.level_px(level)
        return column * self.tile < width and row * self.tile < height

    def render(self, level: int, column: int, row: int) -> bytes:
        """A tile as JPEG.

        Raises:
            ValueError: there is no such tile.
            OSError: the slide cannot be read there.
        """
        if not self.has(level, column, row):
            raise ValueError(f"there is no tile {column}, {row} at level {level}")
        down = 2 ** (self.levels - 1 - level)
        level_w, level_h = self.level_px(level)
        left, top = column * self.tile, row * self.tile
        size = min(self.tile, level_w - left), min(self.tile, level_h - top)
        x, y = left * down, top * down
        width = min(size[0] * down, self.slide.size_px[0] - x)
        height = min(size[1] * down, self.slide.size_px[1] - y)
        source = self._source(width, height, size)
        pixels = source.read_region_at(x, y, width, height, out_size=size)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return file.getvalue()

    def descriptor(self) -> str:
        """The `.dzi` file that other Deep Zoom viewers read."""
        width, height = self.slide.size_px
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format="jpeg" '
            f'Overlap="0" TileSize="{self.tile}"><Size Width="{width}" Height="{height}"/></Image>'
        )

    def _source(self, width: int, height: int, size: tuple[int, int]) -> Slide:
        """What a tile is made from: the slide, or with its overview where that saves reading."""
        down = min(width / size[0], height / size[1])
        full_w = self.slide.size_px[0]
        downs = [full_w / level_w for level_w, _ in self.slide.levels_px]
        nearest = max((d for d in downs if d <= down * LEVEL_TOLERANCE), default=1.0)
        if (width / nearest) * (height / nearest) <= DIRECT_PX:
            return self.slide
        with self._lock:
            if self._overview is None:
                self._overview = _WithOverview(self.slide)
            return self._overview


class _WithOverview(Slide):
    """A slide with one more, coarse level, held in memory."""

    def __init__(self, slide: Slide) -> None:
        self._slide = slide
        self.path, self.size_px, self.mpp = slide.path, slide.size_px, slide.mpp
        self.properties = slide.properties
        size = fit(*slide.size_px, OVERVIEW_PX)
        pixels = slide.read_region_at(0, 0, *slide.size_px, out_size=size)
        self._pixels = Image.fromarray(pixels)
        # Coarsest last, as everywhere; a level of the slide beyond it is not needed any more.
        finer = [level for level in slide.levels_px if level[0] > size[0]]
        self.levels_px = [*finer, size]

    @property
    def hash(self) -> str:
        return self._slide.hash

    def _read_level(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        if level < len(self.levels_px) - 1:
            return self._slide._read_level(level, x, y, width, height)
        return self._pixels.crop((x, y, x + width, y + height))
