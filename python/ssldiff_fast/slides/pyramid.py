# SPDX-License-Identifier: Apache-2.0
"""Rows in, a pyramid of tiles out, in the memory of a few tiles.

All levels are made while the rows come. The bytes depend neither on how the rows are split into
calls nor on the number of threads nor on interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .levels import Level, TileRow, check_tile, level_sizes
from .output import RowWriter, atomic_bytes, check_output, check_space, part_path, write_error
from .raster import Rows, recipe_json, sidecar
from .reduction import REDUCTIONS, Reduction
from .scratch import Scratch
from .tile_sink import TileSink
from .writer_state import WriterState, remove_state

# Tiles begun and not yet written, for each thread: enough that none waits for its turn.
_TILES_PER_THREAD = 4
_MOST_THREADS = 16


class PyramidWriter(RowWriter):
    """Writes an image of any height and width row by row, in the format of a `TileSink`.

    A context manager; `open_writer` makes it. The output lies under a hidden name beside `path`
    until all rows have come. Without `state` it is removed when the block fails. With `state`, a
    folder, it is kept: whoever opens the writer again with the same settings goes on at
    `rows_written`, the first row that is still needed, and the result has the same bytes.

    Args:
        path: the output.
        sink: the format.
        reduction: "box" or "lanczos", from one level to the next.
        overwrite: replace an existing output.
        threads: that encode tiles.
        state: the folder of the saved state.

    Raises:
        ValueError, TypeError, OSError: before anything is written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sink: TileSink,
        *,
        reduction: str = "box",
        overwrite: bool = False,
        threads: int | None = None,
        state: str | os.PathLike[str] | None = None,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction {reduction!r} is unknown, expected one of {sorted(REDUCTIONS)}"
            )
        self.path, self._sink, self._raster = Path(path), sink, sink.raster
        self._tile = check_tile(sink.tile)
        self._reduction: Reduction = REDUCTIONS[reduction]
        self._state = None if state is None else Path(state)
        self._threads = threads or min(_MOST_THREADS, os.cpu_count() or 1)
        sizes = level_sizes(sink.raster, self._tile, sink.smallest)
        self._levels = [Level(size) for size in sizes]
        self._queue: deque[tuple[int, int, int, Future[bytes]]] = deque()
        self._open = False
        self._broken = False
        saved = None if state is None else WriterState.load(state, self._settings)
        self._part = part_path(self.path, kept=state is not None)
        self._rows_path = self._part.with_name(f"{self._part.name}.rows")
        self._published = saved is not None and saved.whole and not self._part.exists()
        if self._published:
            self._resume_published()
        else:
            self._check(overwrite, saved)
            self._begin(saved)

    @property
    def _settings(self) -> dict[str, Any]:
        raster = self._raster
        return {
            "output": os.path.abspath(self.path),
            "size": [int(raster.width), int(raster.height)],
            "mpp": raster.mpp,
            "bands": raster.bands,
            "tile": self._tile,
            "reduction": self._reduction.name,
            **self._sink.settings,
            "description": hashlib.sha256(self._sink.description.encode()).hexdigest(),
        }

    def _resume_published(self) -> None:
        """The last run ended between giving the name and removing its state."""
        if not self.path.exists():
            raise FileNotFoundError(
                f"{self._part} is gone, which the state in {self._state} goes on from: remove "
                "that state to begin the output anew"
            )
        for level in self._levels:
            level.done = level.size.height
        self._open = True

    def _check(self, overwrite: bool, saved: WriterState | None) -> None:
        if saved is None or not saved.whole:
            self._sink.check(self.path, overwrite=overwrite)
            check_output(sidecar(self.path), overwrite=overwrite)
        if saved is None:
            line = self._tile * self._raster.bands * 2  # two rows of tiles of each level are used
            needs = self._sink.bytes_needed + 2 * line * int(self._raster.width)
            check_space(self.path, needs)
        elif not self._part.exists():
            raise FileNotFoundError(
                f"{self._part} is gone, which the state in {self._state} goes on from: remove "
                "that state to begin the output anew"
            )

    def _begin(self, saved: WriterState | None) -> None:
        carry = 2 * (self._reduction.reach + 1) if self._reduction.reach else 0
        units = [-(-level.size.width // (self._tile // 2)) for level in self._levels]
        self._scratch = Scratch(
            self._rows_path,
            units,
            tile=self._tile,
            carry=carry,
            bands=self._raster.bands,
        )
        self._carry = carry
        try:
            sizes = [level.size for level in self._levels]
            self._sink.begin(self._part, sizes, None if saved is None else saved.arrays)
        except OSError as error:
            self._scratch.close()
            if error.errno is None:  # it is a sentence already
                raise
            raise write_error(self.path, error) from None
        for level, (done, filled, slot) in zip(self._levels, saved.levels if saved else []):
            level.done, level.filled, level.slot, level.pinned = done, filled, slot, slot
        self._pool = ThreadPoolExecutor(self._threads, "ssldiff-tiles")
        self._open = True

    @property
    def rows_written(self) -> int:
        """Rows that the writer has: the next row that it needs has this number."""
        return self._levels[0].done + self._levels[0].filled

    def write_rows(self, rows: Any) -> None:
        """Appends rows of pixels, uint8 [rows, width, bands], any number of them.

        Fastest with bands that begin and end at multiples of the tile's side. The array may be
        used again when the call returns.
        """
        if not self._open:
            raise RuntimeError(f"{self.path} is closed: no more rows can be written")
        if self._broken:
            raise RuntimeError(f"{self.path} has failed before: open it again to go on")
        rows = self._raster.check_rows(rows, self.rows_written)
        with self._breaking():
            while len(rows):
                rows = rows[self._take(rows) :]

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """After any failure only the last saved state is sound."""
        self._broken = True
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            kept = "" if self._state is None else str(self._part)
            raise write_error(
                self.path, error, f" near row {self._levels[0].done}", kept=kept
            ) from None
        self._broken = False

    def _take(self, rows: Rows) -> int:
        """Takes rows up to the end of the current row of tiles; returns how many."""
        level = self._levels[0]
        count = min(len(rows), level.capacity - level.filled)
        if count == level.capacity and not self._carry:
            level.filled = count
            self._flush(0, rows[:count])
            return count
        self._keep(0, level.filled, range(-(-level.size.width // self._scratch.unit)), rows[:count])
        self._advance(0, count)
        return count

    def _keep(self, index: int, row: int, units: range, rows: Rows) -> None:
        """Keeps rows of the current row of tiles, from its row `row` on."""
        side, slot = self._scratch.unit, self._levels[index].slot
        for place, unit in enumerate(units):
            self._scratch.write(index, slot, unit, row, rows[:, place * side : (place + 1) * side])

    def _advance(self, index: int, count: int) -> None:
        """Counts rows that the scratch file holds, and writes rows of tiles that are full."""
        level = self._levels[index]
        while count:
            taken = min(count, level.capacity - level.filled)
            level.filled += taken
            count -= taken
            if level.filled == level.capacity:
                self._flush(index, None)

    def _flush(self, index: int, given: Rows | None) -> None:
        """Sends a row of tiles to the file, and on to the next level."""
        level = self._levels[index]
        if index == 0 and not self._part.exists():
            raise OSError(
                f"the output folder {self.path.parent} has vanished while {self.path.name} was "
                "written: make it again, and begin anew"
            )
        end = level.done + level.filled
        made = self._made_of(index, end)
        row = TileRow(index, level.done, end, level.slot, given, made, level.size.columns)
        for column in range(level.size.columns):
            while len(self._queue) >= self._threads * _TILES_PER_THREAD:
                self._write_oldest()
            future = self._pool.submit(self._work, row, column)
            self._queue.append((index, level.done // self._tile, column, future))
        row.read.wait()
        level.slot, level.done, level.filled = level.next_slot, end, 0
        if made:
            self._advance(index + 1, len(made))

    def _made_of(self, index: int, end: int) -> range:
        """The rows of the next level that need no row of this one from `end` on."""
        if index + 1 == len(self._levels):
            return range(0)
        following = self._levels[index + 1]
        last = end == self._levels[index].size.height
        ready = following.size.height if last else (end - self._reduction.reach) // 2
        return range(following.done + following.filled, ready)

    def _write_oldest(self) -> None:
        level, row, column, future = self._queue.popleft()
        self._sink.put(level, row, column, future.result())

    def _drain(self) -> None:
        while self._queue:
            self._write_oldest()

    def _work(self, row: TileRow, column: int) -> bytes:
        """Encodes a tile, once its pixels have reached the next level. In any thread."""
        try:
            pixels = self._pixels(row, column)
            if row.level + 1 < len(self._levels):
                self._shrink(row, column, pixels)
        finally:
            row.arrived()
        missing = self._tile - pixels.shape[0], self._tile - pixels.shape[1]
        if self._sink.pads and any(missing):
            # JPEG rings at any border but a repeated one.
            pixels = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        return self._sink.encode(row.level, pixels)

    def _pixels(self, row: TileRow, column: int) -> Rows:
        left = column * self._tile
        right = min(left + self._tile, self._levels[row.level].size.width)
        if row.given is not None:
            return np.ascontiguousarray(row.given[:, left:right])
        return self._scratched(row, left, right, row.begin, row.end)

    def _scratched(self, row: TileRow, left: int, right: int, top: int, bottom: int) -> Rows:
        """Pixels of the row of tiles and what is kept of the one above."""
        side = self._scratch.unit
        units = range(left // side, -(-right // side))
        rows = range(top - row.begin, bottom - row.begin)
        pixels = self._scratch.read(row.level, row.slot, units, rows)
        first = units.start * side
        return np.ascontiguousarray(pixels[:, left - first : right - first])

    def _shrink(self, row: TileRow, column: int, pixels: Rows) -> None:
        level, side = self._levels[row.level], self._tile
        if self._carry:
            if row.end < level.size.height:  # the next row of tiles needs the last rows of this
                units = range(2 * column, 2 * column + -(-pixels.shape[1] // self._scratch.unit))
                for place, unit in enumerate(units):
                    piece = pixels[-self._carry :, place * side // 2 : (place + 1) * side // 2]
                    self._scratch.write(row.level, level.next_slot, unit, -self._carry, piece)
            pixels = self._surrounded(row, column)
        if not row.made:
            return
        halved = self._reduction.halve(pixels)
        following = self._levels[row.level + 1]
        begin = row.made.start
        while begin < row.made.stop:
            above = begin // side * side
            end = min(row.made.stop, above + side)
            slot = following.slot if above == following.done else following.next_slot
            piece = halved[begin - row.made.start : end - row.made.start]
            self._scratch.write(row.level + 1, slot, column, begin - above, piece)
            begin = end

    def _surrounded(self, row: TileRow, column: int) -> Rows:
        """What the reduction needs for a tile's share of the next level; borders repeated."""
        size, reach = self._levels[row.level].size, self._reduction.reach
        left = column * self._tile - reach
        right = min((column + 1) * self._tile, size.width + size.width % 2) + reach
        top, bottom = 2 * row.made.start - reach, 2 * row.made.stop + reach
        inner = (max(left, 0), min(right, size.width), max(top, 0), min(bottom, size.height))
        pixels = self._scratched(row, *inner)
        margins = ((inner[2] - top, bottom - inner[3]), (inner[0] - left, right - inner[1]), (0, 0))
        return np.pad(pixels, margins, mode="edge")

    def checkpoint(self) -> None:
        """Saves the state, crash-safe: a run that dies later goes on from here.

        Costs the tiles in flight and an fsync; the state is 12 bytes a tile at most. Save what
        makes the rows after this, not before: it may then have to give rows again, which are
        skipped below `rows_written`, but never rows that nobody has.
        """
        if self._state is None:
            raise RuntimeError(
                f"{self.path} has no folder for its state: open it with open_writer(..., state=...)"
            )
        if not self._open or self._broken:
            raise RuntimeError(f"{self.path} is closed or has failed: there is nothing to save")
        if not self._published:
            self._save(whole=False)

    def _save(self, *, whole: bool) -> None:
        if self._state is None:
            return
        with self._breaking():
            self._drain()
            arrays = self._sink.sync()
            self._scratch.sync()
            levels = [[level.done, level.filled, level.slot] for level in self._levels]
            WriterState(self._settings, levels, whole, arrays).save(self._state)
            for level in self._levels:
                level.pinned = level.slot

    def finish(self) -> None:
        """Completes the output and gives it its name; needs all rows."""
        if not self._open:
            return
        try:
            if self.rows_written != self._raster.height:
                raise RuntimeError(
                    f"{self.path} has {self.rows_written} of {self._raster.height} rows: it is "
                    "not written"
                )
            if not self._published:
                self._complete()
        except BaseException:
            self.suspend()
            raise
        self.abort()

    def _complete(self) -> None:
        if self._broken:
            raise RuntimeError(f"{self.path} has failed before: open it again to go on")
        with self._breaking():
            self._drain()
            self._sink.finish()
        self._save(whole=True)
        with self._breaking():
            recipe = recipe_json(self._sink.description).encode()
            atomic_bytes(sidecar(self.path), recipe, kept=self._state is not None)
            self._sink.close()
            self._sink.publish(self.path)

    def _close(self) -> None:
        self._open = False
        if not self._published:
            self._pool.shutdown(cancel_futures=True)
            self._queue.clear()
            self._sink.close()
            self._scratch.close()

    def suspend(self) -> None:
        """Closes the output and keeps its part and state, which is saved once more if it is sound.

        Without a folder for the state everything is removed.
        """
        if self._state is None:
            self.abort()
        elif self._open:
            if not self._broken:
                with contextlib.suppress(OSError):
                    self.checkpoint()
            self._close()

    def abort(self) -> None:
        """Removes the part and the state; a finished output stays."""
        if self._open:
            self._close()
            if not self._published:
                self._sink.drop()
            self._rows_path.unlink(missing_ok=True)
            if self._state is not None:
                remove_state(self._state)
