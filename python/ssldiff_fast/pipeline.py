# SPDX-License-Identifier: Apache-2.0
"""Rows of latents to rows of pixels to a file, while the next rows are denoised.

The network, the decoder and the writer's encoders work at once, with a short queue between them, so
that memory does not depend on the size of the image. What the writer has saved is not made again:
the state of the canvas keeps the rows that are still needed, and no others.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

from torch import Tensor

from ssldiff_fast.canvas.stages import Rows
from ssldiff_fast.canvas.wide import Where
from ssldiff_fast.slides.output import RowWriter
from ssldiff_fast.synthesis_plan import Plan

# Bands that wait between denoising and decoding.
_DEPTH = 4
# Seconds between two states of the writer, and how many times what one costs they are apart.
_SECONDS = 5.0
_SPACING = 200


class PixelSink:
    """Decodes bands of latents and writes their pixels; goes on where the writer is.

    Args:
        plan: the run.
        writer: takes the pixels.
        saves: whether the writer saves its state.
        progress: show a progress bar.
        scratch: where rows wait; None: in memory.
    """

    def __init__(
        self,
        plan: Plan,
        writer: RowWriter,
        *,
        saves: bool,
        progress: bool,
        scratch: Where = None,
    ) -> None:
        self._plan = plan
        self._writer = writer
        self._progress = progress
        self._saves = saves
        self._begin = writer.rows_written // plan.factor
        self._decoder = plan.decoder(scratch)
        self._saved = writer.rows_written
        self._last = time.perf_counter()
        self._cost = 0.0

    @property
    def first(self) -> int:
        """The first row of latents that is needed; rows before it may be left out."""
        return self._first_for(self._begin)

    def durable(self) -> int:
        """Rows of latents, from the top, that will never be needed again, whatever happens."""
        return self._first_for(self._saved // self._plan.factor)

    def _first_for(self, row: int) -> int:
        if row >= self._plan.canvas_denoiser.size[0]:
            return row
        return self._plan.first_latent(self._decoder, row)

    def take(self, bands: Iterable[Tensor]) -> None:
        """Decode and write what follows from bands [C, n, W], which begin with row `first`."""
        if self._begin >= self._plan.canvas_denoiser.size[0]:
            return  # all rows are written, and only the file's name is missing
        skip = self._writer.rows_written - self._begin * self._plan.factor
        pixels = self._plan.decode(
            bands, decoder=self._decoder, begin=self._begin, progress=self._progress
        )
        for band in pixels:
            self._writer.write_rows(band[skip:])
            skip = max(0, skip - len(band))
            self._save_if_due()

    def _save_if_due(self) -> None:
        if not self._saves:
            return
        now = time.perf_counter()
        if now - self._last < max(_SECONDS, _SPACING * self._cost):
            return
        self._writer.checkpoint()
        self._saved = self._writer.rows_written
        self._last = time.perf_counter()
        self._cost = self._last - now


def needed(rows: Iterable[Rows], first: int) -> Iterator[Tensor]:
    """The canvas from row `first` down, of rows [C, n, W] that may begin before it."""
    for part in rows:
        if part.end > first:
            yield part.canvas[:, max(0, first - part.begin) :]


class _Abandoned(Exception):
    """Ends the thread when what feeds it has failed."""


class Background:
    """Runs `work` on what is put in, in a thread behind a bounded queue; a context manager.

    An error of `work` is raised by the next `put` or at the end.
    """

    def __init__(self, work: Callable[[Iterator[Any]], None], *, depth: int = _DEPTH) -> None:
        self._work = work
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ssldiff-decode", daemon=True)

    def put(self, item: Any) -> None:
        """Hand on an item; waits while the queue is full."""
        while self._error is None:
            if not self._thread.is_alive():
                raise RuntimeError("the background has ended, but more was put in.")
            try:
                self._queue.put((item, None), timeout=0.1)
            except queue.Full:
                continue
            return
        raise self._error

    def _items(self) -> Iterator[Any]:
        while True:
            item, end = self._queue.get()
            if end is not None:
                if end is not StopIteration:
                    raise end
                return
            yield item

    def _run(self) -> None:
        try:
            self._work(self._items())
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end = StopIteration if kind is None else _Abandoned
        while self._thread.is_alive():
            try:
                self._queue.put((None, end), timeout=0.1)
            except queue.Full:
                continue
            break
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error
