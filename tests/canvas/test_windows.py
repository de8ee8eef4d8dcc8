# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssldiff_fast.canvas import ShiftedWindows, WindowPlan


def cover(plan: WindowPlan) -> Tensor:
    count = torch.zeros(plan.height, plan.width, dtype=torch.long)
    for y, x in plan.origins.tolist():
        assert 0 <= y <= plan.height - plan.window[0]
        assert 0 <= x <= plan.width - plan.window[1]
        count[y : y + plan.window[0], x : x + plan.window[1]] += 1
    return count


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 40), st.data())
def test_regular_windows_cover_every_pixel_of_any_canvas(
    window: int, more_y: int, more_x: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    plan = WindowPlan.regular(window + more_y, window + more_x, (window, window), stride)
    assert int(cover(plan).min()) >= 1
    assert len(plan) == len(set(map(tuple, plan.origins.tolist())))


@given(st.integers(1, 12), st.integers(0, 40), st.integers(-50, 50), st.data())
def test_shifted_windows_cover_every_pixel_for_any_offset(
    window: int, more: int, offset: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    size = window + more
    plan = WindowPlan.shifted(size, size, (window, window), (offset, -offset), stride=stride)
    assert int(cover(plan).min()) >= 1


def test_the_last_window_of_a_row_and_column_sits_flush_with_the_border() -> None:
    plan = WindowPlan.regular(100, 71, (32, 32), 16)
    assert plan.origins_y == (0, 16, 32, 48, 64, 68)
    assert plan.origins_x == (0, 16, 32, 39)


def test_origins_are_row_major() -> None:
    plan = WindowPlan.regular(64, 96, (32, 32), 32)
    assert plan.origins.tolist() == [[0, 0], [0, 32], [0, 64], [32, 0], [32, 32], [32, 64]]
    assert plan.origins.dtype == torch.int64


def test_a_canvas_of_one_window_has_one_window_in_every_plan() -> None:
    assert WindowPlan.regular(8, 8, (8, 8), 2).origins.tolist() == [[0, 0]]
    assert WindowPlan.shifted(8, 8, (8, 8), (3, 5)).origins.tolist() == [[0, 0]]


def test_shifted_windows_are_disjoint_but_for_the_flush_ones() -> None:
    plan = WindowPlan.shifted(256, 256, (32, 32), (13, 0))
    assert plan.origins_y == (0, *range(13, 206, 32), 224)
    assert plan.origins_x == tuple(range(0, 256, 32))
    count = cover(plan)
    assert int(count[32:224].max()) == 1
    assert int(count.max()) == 2


def test_every_pixel_is_denoised_about_once_a_step_on_a_large_canvas() -> None:
    windows = ShiftedWindows(1024, 1024, (32, 32), seed=0)
    evaluated = [len(windows(step)) * 32 * 32 / 1024**2 for step in range(20)]
    assert max(evaluated) < 1.07


def test_borders_between_shifted_windows_never_stay_in_one_place() -> None:
    windows = ShiftedWindows(256, 256, (32, 32), seed=5)
    for axis in (0, 1):
        offsets = [windows.offset(step)[axis] for step in range(20)]
        assert len(set(offsets)) >= 14
        jumps = [abs(a - b) for a, b in itertools.pairwise(offsets)]
        # Two steps in a row keep their borders far apart, around the lattice too.
        assert min(min(jump, 32 - jump) for jump in jumps) >= 10
        for first in range(16):
            # Any four steps in a row have one in nearly every quarter of the window.
            assert len({offset // 8 for offset in offsets[first : first + 4]}) >= 3


def test_windows_overlap_by_a_quarter_in_the_last_steps() -> None:
    windows = ShiftedWindows(256, 256, (32, 32), seed=5, overlap_from=18)
    assert [windows.stride(step) for step in (0, 17, 18, 19)] == [(32, 32)] * 2 + [(24, 24)] * 2
    assert int(cover(windows(18)).min()) == 1
    inside = windows(18).origins_y[1:-1]
    assert {b - a for a, b in itertools.pairwise(inside)} == {24}


def test_offsets_are_a_function_of_seed_and_step() -> None:
    plans = [ShiftedWindows(256, 256, (32, 32), seed=9) for _ in range(2)]
    assert plans[0](7) == plans[1](7)
    assert ShiftedWindows(256, 256, (32, 32), seed=10)(7) != plans[0](7)


@pytest.mark.parametrize("name", ["uniform", "gaussian", "sine", "hann"])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_weights_are_symmetric_and_above_zero(name: str, size: int) -> None:
    plan = WindowPlan.regular(size, size, (size, size), size, name)
    weight = torch.tensor(plan.weight_y)
    assert float(weight.min()) > 0
    torch.testing.assert_close(weight, weight.flip(0))
    assert int(weight.argmax()) in {(size - 1) // 2, size // 2} or name == "uniform"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowPlan.regular(31, 64, (32, 32), 8), "canvas is 31 x 64.*window, 32 x 32"),
        (lambda: WindowPlan.shifted(64, 8, (32, 32), (0, 0)), "canvas is 64 x 8"),
        (lambda: ShiftedWindows(8, 8, (32, 32), seed=0), "canvas is 8 x 8"),
        (lambda: WindowPlan.regular(64, 64, (32, 32), 0), "stride is 0"),
        (lambda: WindowPlan.regular(64, 64, (32, 32), 33), "stride is 33.*1 to the window's 32"),
        (lambda: WindowPlan.regular(64, 64, (0, 32), 8), r"window is \(0, 32\)"),
        (lambda: WindowPlan.regular(64, 64, (32, 32), 8, "flat"), "weights is 'flat'"),
        (lambda: ShiftedWindows(64, 64, (32, 32), seed=0, weights="flat"), "weights is 'flat'"),
        (lambda: plan(origins_y=(0, 9)), "origins_y holds 9.*must start from 0 to 8"),
        (lambda: plan(origins_y=(-1, 8)), "origins_y holds -1"),
        (lambda: plan(origins_y=(0,)), "origins_y leaves position 8 of 16 without a window"),
        (lambda: plan(origins_y=()), "origins_y leaves position 0 of 16 without a window"),
        (lambda: plan(origins_y=(1, 8)), "origins_y leaves position 0 of 16 without a window"),
        (lambda: plan(origins_y=(0, 0, 8)), "origins_y holds 0 after 0.* must ascend"),
        (lambda: plan(weight_y=(1.0, 1.0)), "weight_y has 2 entries, but windows are 8 latents"),
        (lambda: plan(weight_y=(0.0,) * 8), "weight_y sums to zero at position 0"),
        (lambda: plan(weight_y=(1.0,) * 7 + (0.0,)), "weight_y sums to zero at position 7"),
        (lambda: plan(weight_y=(-1.0,) * 8), "weight_y holds -1.0"),
        (lambda: plan(weight_y=(float("nan"),) * 8), "weight_y holds nan"),
        (lambda: wrapped(origins_y=(0, 16)), "origins_y holds 16.*must start from 0 to 15"),
        (lambda: wrapped(origins_y=(0, 6)), "origins_y leaves position 14 of 16"),
        (lambda: wrapped(origins_y=(4, 13)), "origins_y leaves position 12 of 16"),
        (lambda: wrapped(origins_y=(6, 12)), "origins_y leaves position 4 of 16"),
    ],
)
def test_impossible_plans_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def plan(
    origins_y: tuple[int, ...] = (0, 8), weight_y: tuple[float, ...] = (1.0,) * 8
) -> WindowPlan:
    return WindowPlan(16, 8, (8, 8), origins_y, (0,), weight_y, (1.0,) * 8)


def wrapped(origins_y: tuple[int, ...]) -> WindowPlan:
    ones = (1.0,) * 8
    return WindowPlan(16, 8, (8, 8), origins_y, (0,), ones, ones, wrap=(True, False))


@given(st.integers(1, 12), st.integers(0, 40), st.integers(-50, 50), st.data())
def test_windows_that_wrap_cover_every_pixel(
    window: int, more: int, offset: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    size = window + more
    options = {"stride": stride, "wrap": (True, False)}
    plans = [
        WindowPlan.regular(size, size, (window, window), **options),
        WindowPlan.shifted(size, size, (window, window), (offset, offset), **options),
    ]
    for plan in plans:
        count = torch.zeros(size, dtype=torch.long)
        for y in plan.origins_y:
            count[torch.arange(y, y + window) % size] += 1
        assert int(count.min()) >= 1


def test_wrapped_lattices_go_through_the_border() -> None:
    assert WindowPlan.regular(40, 40, (16, 16), 8, wrap=(True, False)).origins_y == (
        *range(0, 40, 8),
    )
    plan = WindowPlan.shifted(40, 40, (16, 16), (11, 0), wrap=(True, True))
    assert plan.origins_y == (3, 11, 27)
    assert plan.scaled(2, torch.ones(32), torch.ones(32)).wrap == (True, True)


def test_a_canvas_row_knows_the_window_rows_that_cover_it() -> None:
    plan = WindowPlan.regular(40, 8, (8, 8), 4)
    assert plan.window_rows(0, 1) == [0]
    assert plan.window_rows(7, 9) == [0, 1, 2]
    assert plan.window_rows(39, 40) == [8]
    around = WindowPlan.regular(40, 8, (8, 8), 4, wrap=(True, False))
    assert around.window_rows(0, 1) == [0, 9]
    assert around.window_rows(36, 40) == [8, 9]


def test_the_origins_of_some_windows_are_those_of_their_numbers() -> None:
    plan = WindowPlan.regular(64, 96, (32, 32), 16)
    index = torch.tensor([7, 0, 7, 14])
    assert torch.equal(plan.origins_of(index), plan.origins[index])
