# SPDX-License-Identifier: Apache-2.0
"""Rows of a pyramid's levels that do not yet fill a row of tiles, in a file beside the output.

In memory they would be hundreds of megabytes for a wide slide, and saving the state of a run would
write all of them. Here they are written once, and saving the state is one fsync.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .raster import Rows

# One slot is filled, one keeps what the last saved state needs, and one takes the rows that the
# next row of tiles needs of the one before.
SLOTS = 3


class Scratch:
    """Blocks of pixels by (level, slot, unit); a unit is half a tile wide, as tiles become halves.

    Args:
        path: the file, made if it is not there.
        units: of each level.
        tile: side of a tile.
        carry: rows above a row of tiles that are kept with it.
        bands: of a pixel.
    """

    def __init__(
        self, path: Path, units: Sequence[int], *, tile: int, carry: int, bands: int
    ) -> None:
        self.path, self.unit, self._carry, self._bands = path, tile // 2, carry, bands
        self._line = self.unit * bands
        self._block = (carry + tile) * self._line
        self._units = list(units)
        self._starts = np.cumsum([0, *units]) * (SLOTS * self._block)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._file, path)
        except OSError:
            os.close(self._file)
            raise

    @property
    def bytes(self) -> int:
        """Bytes of the file, at most."""
        return int(self._starts[-1])

    def _offset(self, level: int, slot: int, unit: int, row: int) -> int:
        block = slot * self._units[level] + unit
        start = int(self._starts[level]) + block * self._block
        return start + (self._carry + row) * self._line

    def write(self, level: int, slot: int, unit: int, row: int, pixels: Rows) -> None:
        """Keeps rows of a unit; `row` counts from the top of the row of tiles and may be < 0."""
        if pixels.shape[1] < self.unit:  # at the right border
            whole = np.zeros((len(pixels), self.unit, self._bands), np.uint8)
            whole[:, : pixels.shape[1]] = pixels
            pixels = whole
        data = np.ascontiguousarray(pixels).data.cast("B")
        offset = self._offset(level, slot, unit, row)
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written

    def read(self, level: int, slot: int, units: range, rows: range) -> Rows:
        """Rows of neighbouring units, uint8 [rows, units * unit, bands]."""
        pixels = np.empty((len(rows), len(units), self.unit, self._bands), np.uint8)
        block = np.empty((len(rows), self.unit, self._bands), np.uint8)
        for index, unit in enumerate(units):
            offset = self._offset(level, slot, unit, rows.start)
            if os.preadv(self._file, [block.data], offset) != block.nbytes:
                raise OSError(f"{self.path} has lost rows: remove it and begin anew")
            pixels[:, index] = block
        result: Rows = pixels.reshape(len(rows), -1, self._bands)
        return result

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"another process is writing this output ({path} is locked): let it end, or choose "
            "another name"
        ) from None
    except OSError:
        return  # a file system without locks
