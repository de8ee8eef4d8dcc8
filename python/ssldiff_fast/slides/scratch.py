# SPDX-License-Identifier: Apache-2.0
"""Rows of a pyramid's levels that do not yet fill a row of tiles, in a file beside the output.

In memory they would be hundreds of megabytes for a wide slide, and saving the state of a run would
write all of them. Here they are written once, and saving the state is one fsync.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .raster import Rows

# One slot is filled, one keeps what the last saved state needs, and one takes the rows that the
# next row of tiles needs of the one before.
SLOTS = 3


class Scratch:
    """Pixels by (level, slot, unit, row); a unit is half a tile wide, as tiles become halves.

    The rows of a slot lie in segments: those that are carried, and two halves of a row of tiles.
    In a segment one unit comes behind the other, so that neighbours are written and read at once,
    as long as their rows are all of the segment's; that is so where whole rows of tiles come and
    the reduction reaches no further. Each call of the system costs Python's threads a turn.

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
        self.path, self.unit, self._bands = path, tile // 2, bands
        self._line = self.unit * bands
        self._segments = [range(-carry, 0), range(self.unit), range(self.unit, tile)]
        self._carry, self._rows = carry, carry + tile
        self._units = list(units)
        self._starts = np.cumsum([0, *units]) * (SLOTS * self._rows * self._line)
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

    def _pieces(
        self, level: int, slot: int, units: range, rows: range
    ) -> Iterator[tuple[range, range, int]]:
        """What lies behind each other in the file: units, rows, and where that is."""
        start = int(self._starts[level]) + slot * self._units[level] * self._rows * self._line
        for segment in self._segments:
            inside = range(max(rows.start, segment.start), min(rows.stop, segment.stop))
            if not inside:
                continue
            above = (self._carry + segment.start) * self._units[level]
            for some in [units] if inside == segment else [range(u, u + 1) for u in units]:
                line = above + some.start * len(segment) + inside.start - segment.start
                yield some, inside, start + line * self._line

    def write(self, level: int, slot: int, unit: int, row: int, pixels: Rows) -> None:
        """Keeps rows of neighbouring units; `row` counts from the top of the row of tiles and may
        be < 0."""
        height, width = pixels.shape[:2]
        units = range(unit, unit + -(-width // self.unit))
        if width % self.unit:  # at the right border
            whole = np.zeros((height, len(units) * self.unit, self._bands), np.uint8)
            whole[:, :width] = pixels
            pixels = whole
        blocks = pixels.reshape(height, len(units), self._line).swapaxes(0, 1)
        for some, rows, offset in self._pieces(level, slot, units, range(row, row + height)):
            block = blocks[some.start - unit : some.stop - unit, rows.start - row : rows.stop - row]
            data = np.ascontiguousarray(block).data.cast("B")
            while data:
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written

    def read(self, level: int, slot: int, units: range, rows: range) -> Rows:
        """Rows of neighbouring units, uint8 [rows, units * unit, bands]."""
        pixels = np.empty((len(rows), len(units), self._line), np.uint8)
        blocks = pixels.swapaxes(0, 1)
        for some, inside, offset in self._pieces(level, slot, units, rows):
            block = np.empty((len(some), len(inside), self._line), np.uint8)
            if os.preadv(self._file, [block.data], offset) != block.nbytes:
                raise OSError(f"{self.path} has lost rows: remove it and begin anew")
            below = slice(inside.start - rows.start, inside.stop - rows.start)
            blocks[some.start - units.start : some.stop - units.start, below] = block
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
