# SPDX-License-Identifier: Apache-2.0
"""Threads for tasks, of which the one that gives out the tasks is one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_Then = Callable[[Any], Any]
_Tasks = SimpleQueue[tuple[Future[Any], Callable[[], Any], _Then | None] | None]


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

    def submit(self, work: Callable[[], Any], then: _Then | None = None) -> Future[Any]:
        """Begins a task, in any thread; what follows it is given what it returned, and waits behind
        the tasks that were begun before."""
        future: Future[Any] = Future()
        self._tasks.put((future, work, then))
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
            _work(self._tasks, *task)
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
        _work(tasks, *task)
        del task  # its pixels, while the thread waits for the next


def _work(tasks: _Tasks, future: Future[Any], work: Callable[[], Any], then: _Then | None) -> None:
    try:
        made = work()
        if then is None:
            future.set_result(made)
        else:
            tasks.put((future, partial(then, made), None))
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):  # Ctrl-C reaches the caller's thread
            raise
