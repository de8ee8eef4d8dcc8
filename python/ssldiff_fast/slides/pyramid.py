# SPDX-License-Identifier: Apache-2.0
"""Rows in, a pyramid of tiles out, in the memory of a few tiles.

All levels are made while the rows come. The bytes depend neither on how the rows are split into
calls nor on the number of threads nor on interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cascade import Cascade
from .levels import check_tile
from .output import (
    RowWriter,
    atomic_bytes,
    check_output,
    check_space,
    check_there,
    part_path,
    write_error,
)
from .raster import recipe_json, sidecar
from .reduction import REDUCTIONS, Reduction
from .tile_sink import TileSink
from .writer_state import WriterState, remove_state

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
        more_bytes: that something else needs on the same disk.

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
        more_bytes: int = 0,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction {reduction!r} is unknown, expected one of {sorted(REDUCTIONS)}"
            )
        self.path, self._sink, self._raster = Path(path), sink, sink.raster
        check_tile(sink.tile)
        self._reduction: Reduction = REDUCTIONS[reduction]
        self._state = None if state is None else Path(state)
        self._threads = threads or min(_MOST_THREADS, os.cpu_count() or 1)
        self._open = False
        self._broken = False
        saved = None if state is None else WriterState.load(state, self._settings)
        self._part = part_path(self.path, kept=state is not None)
        self._rows_path = self._part.with_name(f"{self._part.name}.rows")
        self._published = saved is not None and saved.whole and not self._part.exists()
        if self._published:
            self._resume_published()
        else:
            self._check(overwrite, saved, more_bytes)
            self._begin(saved)

    @property
    def _settings(self) -> dict[str, Any]:
        raster = self._raster
        return {
            "output": os.path.abspath(self.path),
            "size": [int(raster.width), int(raster.height)],
            "mpp": raster.mpp,
            "bands": raster.bands,
            "tile": self._sink.tile,
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
        self._open = True

    def _check(self, overwrite: bool, saved: WriterState | None, more_bytes: int) -> None:
        if saved is None or not saved.whole:
            self._sink.check(self.path, overwrite=overwrite)
            check_output(sidecar(self.path), overwrite=overwrite)
        if saved is None:
            # Of each level two rows of tiles wait; all levels together are twice as wide as one.
            waiting = 4 * self._sink.tile * self._raster.bands * int(self._raster.width)
            needs = self._sink.bytes_needed + waiting
            check_space(self.path, needs + more_bytes)
        elif not self._part.exists():
            raise FileNotFoundError(
                f"{self._part} is gone, which the state in {self._state} goes on from: remove "
                "that state to begin the output anew"
            )
        else:
            check_space(self.path, more_bytes)

    def _begin(self, saved: WriterState | None) -> None:
        self._cascade = Cascade(self._sink, self._reduction, self._rows_path, self._threads)
        levels = self._cascade.levels
        try:
            sizes = [level.size for level in levels]
            self._sink.begin(self._part, sizes, None if saved is None else saved.arrays)
        except OSError as error:
            self._cascade.close()
            if error.errno is None:  # it is a sentence already
                raise
            raise write_error(self.path, error) from None
        for level, (done, filled, slot) in zip(levels, saved.levels if saved else []):
            level.done, level.filled, level.slot, level.pinned = done, filled, slot, slot
        self._open = True

    @property
    def rows_written(self) -> int:
        """Rows that the writer has: the next row that it needs has this number."""
        return int(self._raster.height) if self._published else self._cascade.rows

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
                check_there(self.path, self._part)
                rows = rows[self._cascade.take(rows) :]

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
                self.path, error, f" near row {self._cascade.levels[0].done}", kept=kept
            ) from None
        self._broken = False

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
            self._cascade.drain()
            arrays = self._sink.sync()
            self._cascade.scratch.sync()
            levels = self._cascade.levels
            reached = [[level.done, level.filled, level.slot] for level in levels]
            WriterState(self._settings, reached, whole, arrays).save(self._state)
            for level in levels:
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
            self._cascade.drain()
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
            self._cascade.close()
            self._sink.close()

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
