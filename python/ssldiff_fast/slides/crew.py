# SPDX-License-Identifier: Apache-2.0
"""Threads for tasks, of which the one that gives out the tasks is one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_Tasks = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class Crew:
    """Who gives out tasks works on them while it waits for one.

    A pool with a thread more than cores, which gives out tasks and waits, takes turns with those
    that work: beside JPEG's tiles that cost a twentieth of the time.

    Args:
        threads: that work, the caller's included.
    """

    def __init__(self, threads: int) -> None:
        self._tasks: _Tasks = SimpleQueue()
        self._others = [
            # Daemons, so that a crew that nobody closes keeps no program from its end.
            threading.Thread(target=_serve, args=(self._tasks,), name="ssldiff-tiles", daemon=True)
            for _ in range(threads - 1)
        ]
        for thread in self._others:
            thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Begins a task, in any thread."""
        future: Future[T] = Future()
        self._tasks.put((future, work))
        return future

    def result(self, future: Future[T]) -> T:
        """What a task returned, or raises what it raised."""
        while not future.done() and self._help():
            pass
        return future.result()

    def wait(self, event: threading.Event) -> None:
        """Until a task has set an event."""
        while not event.is_set() and self._help():
            pass
        event.wait()

    def _help(self) -> bool:
        """Works on the oldest task that nobody has begun; whether there was one."""
        try:
            task = self._tasks.get_nowait()
        except Empty:
            return False
        if task is not None:
            _work(*task)
        return True

    def close(self) -> None:
        """Waits for the tasks that were begun and gives up the others; may be called twice."""
        while True:
            try:
                self._tasks.get_nowait()
            except Empty:
                break
        for _ in self._others:
            self._tasks.put(None)
        for thread in self._others:
            thread.join()
        self._others = []


def _serve(tasks: _Tasks) -> None:
    while (task := tasks.get()) is not None:
        _work(*task)
        del task  # its pixels, while the thread waits for the next


def _work(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):  # Ctrl-C reaches the caller's thread
            raise
