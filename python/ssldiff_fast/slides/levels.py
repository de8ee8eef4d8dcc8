# SPDX-License-Identifier: Apache-2.0
"""The levels of a pyramid: their sizes, and how far each is written."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from .pixel_band import PixelBand
from .raster import Raster, Rows
from .scratch import SLOTS


@dataclass(frozen=True)
class LevelSize:
    """One level of a pyramid, 0 the finest."""

    width: int
    height: int
    tile: int

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile)

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile)


def level_sizes(raster: Raster, tile: int, smallest: int) -> list[LevelSize]:
    """Halved, rounded up, until a level fits into a square of side `smallest`."""
    sizes = [LevelSize(int(raster.width), int(raster.height), tile)]
    while max(sizes[-1].width, sizes[-1].height) > smallest:
        last = sizes[-1]
        sizes.append(LevelSize(-(-last.width // 2), -(-last.height // 2), tile))
    return sizes


@dataclass
class Level:
    """A level being written."""

    size: LevelSize
    done: int = 0  # rows in finished rows of tiles
    filled: int = 0  # further rows, in the scratch file
    slot: int = 0  # where these lie
    pinned: int = -1  # where those of the saved state lie

    @property
    def next_slot(self) -> int:
        return next(slot for slot in range(SLOTS) if slot not in (self.slot, self.pinned))

    @property
    def capacity(self) -> int:
        """Rows of the current row of tiles."""
        return min(self.size.tile, self.size.height - self.done)


@dataclass
class TileRow:
    """A row of tiles on its way to the file, and the rows of the next level made of it."""

    level: int
    begin: int
    end: int
    slot: int
    given: Rows | PixelBand | None  # the pixels, where the caller gave a whole row of tiles at once
    made: range  # rows of the next level
    missing: int  # tiles whose pixels are still needed
    read: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arrived(self, tiles: int) -> None:
        """So many tiles have what they need of the pixels."""
        with self.lock:
            self.missing -= tiles
            if not self.missing:
                self.read.set()


def check_tile(tile: int) -> int:
    """A side of tiles that every format takes."""
    if isinstance(tile, bool) or not isinstance(tile, (int, np.integer)):
        raise TypeError(f"tile must be an integer, not {tile!r}")
    if not 16 <= tile <= 4096 or tile % 16:
        raise ValueError(f"tile is {tile}, expected a multiple of 16 from 16 to 4096")
    return int(tile)
