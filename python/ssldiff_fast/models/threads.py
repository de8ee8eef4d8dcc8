# SPDX-License-Identifier: Apache-2.0
"""The number of threads that a network runs on, on a CPU: fewer where other processes are busy.

An evaluation is some hundred parallel regions, and at the end of each all of OpenMP's threads wait
for the slowest. Where another process has taken one's core, that is a time slice of the scheduler
in every region, and who waits spins meanwhile (GOMP_SPINCOUNT and OMP_WAIT_POLICY say how long, but
only to a process that begins with them). Measured on two cores beside one busy process, two threads
are 1.5 times slower than one (benchmarks/threads.py); on another day it was six times.

So a run tries half as many threads on evaluations that it makes anyway, and again when they get
slower. Results do not change: our networks have the same bits on any number of threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from ssldiff_fast import settings

if TYPE_CHECKING:
    from ssldiff_fast.models.ldm import LatentDiffusion

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Fewer threads have to be so many times faster to be taken.
WORTH = 1.1
# Half as many threads are tried next unless these are so many times slower than the best so far.
_NEAR = 1.5
# Evaluations so many times slower than the usual, so often in a row, and all is tried again.
_SLOWER, _OFTEN = 1.5, 3
# Seconds after which more threads are tried again, doubled as long as they do not pay.
_SOON, _LATE = 30.0, 480.0


class ThreadChoice:
    """Chooses the number of threads by the evaluations of a run.

    Args:
        given: the number of threads without it, which is never exceeded.
        set_threads: sets the number.
        clock: seconds.
    """

    def __init__(
        self,
        given: int,
        *,
        set_threads: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.given = self.threads = self._settled = given
        self._set_threads, self._clock = set_threads, clock
        self._usual: dict[int, float] = {}  # seconds of an evaluation by the batch's size
        self._slow = 0
        self._wait, self._due = _SOON, 0.0
        self._tried: dict[int, list[float]] | None = None
        self._is_first = True
        self._try_all(rounds=2)

    def evaluate(self, function: Callable[[], T], count: int) -> T:
        """What `function` returns, which is one call of the network for `count` evaluations."""
        begin = self._clock()
        result = function()
        each = (self._clock() - begin) / count
        if self._is_first:  # loads and chooses kernels
            self._is_first = False
        elif self._tried is not None:
            self._note(self._tried, each)
        else:
            self._watch(each, count)
        return result

    def _set(self, threads: int) -> None:
        self.threads = threads
        self._set_threads(threads)

    def _try_all(self, rounds: int) -> None:
        self._tried, self._rounds = {}, rounds
        self._set(self.given)

    def _note(self, tried: dict[int, list[float]], each: float) -> None:
        tried.setdefault(self.threads, []).append(each)
        if len(tried[self.threads]) < self._rounds:
            return
        best = self.given
        for threads in sorted(tried, reverse=True):
            if min(tried[threads]) * WORTH < min(tried[best]):
                best = threads
        near = min(tried[self.threads]) < _NEAR * min(tried[best])
        if near and self.threads > 1:
            self._set(self.threads // 2)
        else:
            self._settle(best, {threads: min(times) for threads, times in tried.items()})

    def _settle(self, best: int, seconds: dict[int, float]) -> None:
        self._tried, self._slow = None, 0
        self._usual.clear()
        self._set(best)
        self._wait = min(2 * self._wait, _LATE) if best == self._settled else _SOON
        self._due = self._clock() + self._wait
        if best != self._settled:
            logger.warning(
                "threads: %d of %d (an evaluation takes %s)",
                best,
                self.given,
                ", ".join(f"{each:.3g} s with {threads}" for threads, each in seconds.items()),
            )
        self._settled = best

    def _watch(self, each: float, count: int) -> None:
        usual = self._usual[count] = min(each, self._usual.get(count, each))
        self._slow = self._slow + 1 if each > _SLOWER * usual else 0
        if self._slow >= _OFTEN or (self.threads < self.given and self._clock() > self._due):
            self._try_all(rounds=1)


_choice: ContextVar[ThreadChoice | None] = ContextVar("_choice", default=None)


@contextlib.contextmanager
def measured_threads(model: LatentDiffusion) -> Iterator[None]:
    """Within it a model on a CPU chooses its number of threads; afterwards it is what it was.

    Not where the user has chosen it: by OMP_NUM_THREADS or MKL_NUM_THREADS, or by
    `torch.set_num_threads` to another number than PyTorch's own. Nor for a compiled network, which
    is compiled anew for every number.
    """
    given = torch.get_num_threads()
    on_cpu = next(model.unet.parameters()).device.type == "cpu"
    chosen = settings.has_thread_number() or given not in _usual_numbers()
    if chosen or given == 1 or not on_cpu or model.execution == "compile":
        yield
        return
    token = _choice.set(ThreadChoice(given))
    try:
        yield
    finally:
        _choice.reset(token)
        torch.set_num_threads(given)


def timed(function: Callable[[], T], count: int) -> T:
    """What `function` returns, a call of a network on a CPU that makes `count` evaluations."""
    choice = _choice.get()
    return function() if choice is None else choice.evaluate(function, count)


def given_threads() -> int:
    """The number of threads without any choice of ours."""
    choice = _choice.get()
    return torch.get_num_threads() if choice is None else choice.given


def _usual_numbers() -> set[int]:
    """What PyTorch takes by itself: the processors that this process may use, or their cores."""
    if not hasattr(os, "sched_getaffinity"):
        return {os.cpu_count() or 1}
    processors = os.sched_getaffinity(0)
    places = [Path(f"/sys/devices/system/cpu/cpu{n}/topology") for n in processors]
    with contextlib.suppress(OSError):
        return {len(processors), len({(p / "thread_siblings_list").read_text() for p in places})}
    return {len(processors)}
