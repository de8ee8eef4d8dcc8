# SPDX-License-Identifier: Apache-2.0
"""`batch_size="auto"`: the fastest micro-batch that fits into memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from small_models import small_model
from ssldiff_fast.canvas import micro_batch
from ssldiff_fast.canvas.micro_batch import auto_batch_size, choose_batch_size


def machine(fits: int, best: int, calls: list[int]) -> object:
    """Batches over `fits` run out of memory; up to `best` a window gets cheaper."""

    def seconds(size: int) -> float:
        calls.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1.0 + 0.1 * size if size <= best else 0.3 * size

    return seconds


@pytest.mark.parametrize(
    ("fits", "best", "most", "expected"),
    [(100, 100, 16, 16), (5, 100, 64, 4), (8, 100, 64, 8), (100, 8, 64, 8), (1, 1, 64, 1)],
)
def test_it_takes_the_fastest_that_fits(fits: int, best: int, most: int, expected: int) -> None:
    calls: list[int] = []
    chosen = choose_batch_size(machine(fits, best, calls), most=most)  # type: ignore[arg-type]
    assert chosen == expected
    assert chosen in calls
    assert calls == [2**i for i in range(len(calls))]
    assert max(calls) <= max(2 * fits, most)


def test_not_even_one_window_is_one_sentence() -> None:
    with pytest.raises(MemoryError, match="not even one window fits"):
        choose_batch_size(machine(0, 1, []), most=4)  # type: ignore[arg-type]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(size: int) -> float:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        choose_batch_size(broken, most=4)


def test_the_search_ends_after_some_seconds() -> None:
    ticks = itertools.count(0, 4)
    calls: list[int] = []
    seconds = machine(1000, 1000, calls)
    choose_batch_size(seconds, most=1024, clock=lambda: float(next(ticks)))  # type: ignore[arg-type]
    assert calls == [1, 2]


def test_a_model_is_measured_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(micro_batch.MOST, "cpu", 2)
    assert auto_batch_size(small_model(), guided=True) in (1, 2)
