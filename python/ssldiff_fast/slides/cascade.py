# SPDX-License-Identifier: Apache-2.0
"""Rows of an image in, encoded tiles of all its levels out, in one order.

A row of tiles is encoded once its rows have come, and makes rows of the next level on the way. Rows
that do not yet fill a row of tiles wait in a file.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np

from .crew import Crew
from .levels import Level, TileRow, check_tile, level_sizes
from .pixel_band import PixelBand
from .raster import Rows
from .reduction import Reduction
from .scratch import Scratch
from .tile_sink import TileSink

# Neighbouring tiles of one task, at most: what is done once for all of them is a turn that Python's
# threads take once.
_TASK_TILES = 4
# Tasks begun and not yet written, for each thread: enough that none waits for its turn.
_TASKS_PER_THREAD = 2


class Cascade:
    """The levels of a pyramid, each made of the one before while rows come.

    Args:
        sink: takes the tiles; says what the image is.
        reduction: from one level to the next.
        scratch: the file of rows that wait, made if it is not there.
        threads: that encode.

    Attributes:
        levels: the finest first; how far each is.
    """

    def __init__(self, sink: TileSink, reduction: Reduction, scratch: Path, threads: int) -> None:
        self._sink, self._reduction, self._threads = sink, reduction, threads
        self._tile = check_tile(sink.tile)
        self.levels = [Level(size) for size in level_sizes(sink.raster, self._tile, sink.smallest)]
        # Rows above a row of tiles that the reduction needs of it.
        self._carry = 2 * (reduction.reach + 1) if reduction.reach else 0
        self.scratch = Scratch(
            scratch,
            [-(-level.size.width // (self._tile // 2)) for level in self.levels],
            tile=self._tile,
            carry=self._carry,
            bands=sink.raster.bands,
        )
        self._crew = Crew(threads)
        self._queue: deque[tuple[int, int, range, Future[list[bytes]]]] = deque()

    @property
    def rows(self) -> int:
        """Rows taken so far."""
        return self.levels[0].done + self.levels[0].filled

    def take(self, rows: Rows | PixelBand) -> int:
        """Takes rows up to the end of the current row of tiles; returns how many.

        Their array may be used again when the call returns.
        """
        level = self.levels[0]
        count = min(len(rows), level.capacity - level.filled)
        if count == level.capacity and not self._carry:
            level.filled = count
            self._flush(0, rows[:count])
            return count
        side = _TASK_TILES * self._tile
        for left in range(0, level.size.width, side):
            piece = np.asarray(rows[:count, left : left + side])
            self.scratch.write(0, level.slot, left // self.scratch.unit, level.filled, piece)
        self._advance(0, count)
        return count

    def drain(self) -> None:
        """Writes the tiles that were begun."""
        while self._queue:
            self._write_oldest()

    def close(self) -> None:
        """Gives up the tiles that were begun, and keeps the scratch file."""
        self._crew.close()
        self._queue.clear()
        self.scratch.close()

    def _advance(self, index: int, count: int) -> None:
        """Counts rows that the scratch file holds, and writes rows of tiles that are full."""
        level = self.levels[index]
        while count:
            taken = min(count, level.capacity - level.filled)
            level.filled += taken
            count -= taken
            if level.filled == level.capacity:
                self._flush(index, None)

    def _flush(self, index: int, given: Rows | PixelBand | None) -> None:
        """Sends a row of tiles to the file, and on to the next level."""
        level = self.levels[index]
        end, columns = level.done + level.filled, level.size.columns
        made = self._made_of(index, end)
        row = TileRow(index, level.done, end, level.slot, given, made, columns)
        share = max(1, min(_TASK_TILES, columns // (2 * self._threads)))
        for left in range(0, columns, share):
            while len(self._queue) >= self._threads * _TASKS_PER_THREAD:
                self._write_oldest()
            tiles = range(left, min(left + share, columns))
            # All tiles are taken before the first is encoded: so whoever gives the rows goes on
            # while there is work for every thread.
            future = self._crew.submit(
                partial(self._taken, row, tiles), partial(self._encoded, row, tiles)
            )
            self._queue.append((index, level.done // self._tile, tiles, future))
        self._crew.wait(row.read)
        level.slot, level.done, level.filled = level.next_slot, end, 0
        if made:
            self._advance(index + 1, len(made))

    def _made_of(self, index: int, end: int) -> range:
        """The rows of the next level that need no row of this one from `end` on."""
        if index + 1 == len(self.levels):
            return range(0)
        following = self.levels[index + 1]
        last = end == self.levels[index].size.height
        ready = following.size.height if last else (end - self._reduction.reach) // 2
        return range(following.done + following.filled, ready)

    def _write_oldest(self) -> None:
        level, row, columns, future = self._queue.popleft()
        data = self._crew.result(future)
        if self._sink.ordered:
            self._sink.put(level, row, columns.start, data)

    def _encoded(self, row: TileRow, columns: range, tiles: list[Rows]) -> list[bytes]:
        """Encodes neighbouring tiles. In any thread."""
        data = [self._sink.encode(row.level, tile) for tile in tiles]
        if self._sink.ordered:
            return data
        self._sink.put(row.level, row.begin // self._tile, columns.start, data)
        return []

    def _taken(self, row: TileRow, columns: range) -> list[Rows]:
        """Neighbouring tiles, once they have reached the next level, in any thread; the caller's
        array may then be used again."""
        try:
            pixels = self._pixels(row, columns)
            if row.level + 1 < len(self.levels):
                self._shrink(row, columns, pixels)
            return self._tiles_of(pixels, len(columns))
        finally:
            row.arrived(len(columns))

    def _pixels(self, row: TileRow, columns: range) -> Rows:
        left = columns.start * self._tile
        right = min(columns.stop * self._tile, self.levels[row.level].size.width)
        if row.given is not None:
            return np.asarray(row.given[:, left:right])
        return self._scratched(row, left, right, row.begin, row.end)

    def _tiles_of(self, pixels: Rows, count: int) -> list[Rows]:
        """Copies of neighbouring tiles; where the format wants whole ones, the last pixels of
        those at the border are repeated."""
        side = self._tile
        height, width, bands = pixels.shape
        if self._sink.pads and (height, width) != (side, count * side):
            whole = np.empty((side, count * side, bands), np.uint8)
            whole[:height, :width] = pixels
            # JPEG rings at any border but a repeated one.
            whole[height:, :width] = pixels[-1:]
            whole[:, width:] = whole[:, width - 1 : width]
            pixels = whole
        full = pixels.shape[1] // side
        split = pixels[:, : full * side].reshape(len(pixels), full, side, bands)
        tiles = list(split.swapaxes(0, 1).copy())
        if full < count:
            tiles.append(pixels[:, full * side :].copy())
        return tiles

    def _scratched(self, row: TileRow, left: int, right: int, top: int, bottom: int) -> Rows:
        """Pixels of the row of tiles and what is kept of the one above."""
        side = self.scratch.unit
        units = range(left // side, -(-right // side))
        rows = range(top - row.begin, bottom - row.begin)
        pixels = self.scratch.read(row.level, row.slot, units, rows)
        first = units.start * side
        return pixels[:, left - first : right - first]

    def _shrink(self, row: TileRow, columns: range, pixels: Rows) -> None:
        """Makes the tiles' share of the next level."""
        level, side = self.levels[row.level], self._tile
        if self._carry:
            if row.end < level.size.height:  # the next row of tiles needs the last rows of this
                last = pixels[-self._carry :]
                self.scratch.write(
                    row.level, level.next_slot, 2 * columns.start, -self._carry, last
                )
            pixels = self._surrounded(row, columns)
        if not row.made:
            return
        halved = self._reduction.halve(pixels)
        following = self.levels[row.level + 1]
        begin = row.made.start
        while begin < row.made.stop:
            above = begin // side * side
            end = min(row.made.stop, above + side)
            slot = following.slot if above == following.done else following.next_slot
            piece = halved[begin - row.made.start : end - row.made.start]
            # Half of a tile is a unit.
            self.scratch.write(row.level + 1, slot, columns.start, begin - above, piece)
            begin = end

    def _surrounded(self, row: TileRow, columns: range) -> Rows:
        """What the reduction needs for the tiles' share; the image's borders are repeated."""
        size, reach = self.levels[row.level].size, self._reduction.reach
        left = columns.start * self._tile - reach
        right = min(columns.stop * self._tile, size.width + size.width % 2) + reach
        top, bottom = 2 * row.made.start - reach, 2 * row.made.stop + reach
        inner = (max(left, 0), min(right, size.width), max(top, 0), min(bottom, size.height))
        pixels = self._scratched(row, *inner)
        margins = ((inner[2] - top, bottom - inner[3]), (inner[0] - left, right - inner[1]), (0, 0))
        return np.pad(pixels, margins, mode="edge")
