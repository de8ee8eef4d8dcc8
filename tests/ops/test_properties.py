# SPDX-License-Identifier: Apache-2.0
"""What must hold for any input: properties of the operators, on inputs that hypothesis draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssldiff_fast.ops import (
    WindowPlan,
    gather_windows,
    interpolate_grid,
    philox_normal,
    scatter_mean,
)

# The same examples every time, and no limit on the time of one: nothing here fails by chance.
bounded = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def plans(draw: st.DrawFn) -> WindowPlan:
    """A regular plan whose windows overlap, touch or wrap."""
    window = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    size = [n + draw(st.integers(0, 8)) for n in window]
    stride = draw(st.integers(1, min(window)))
    weight = draw(st.sampled_from(["uniform", "gaussian", "sine", "hann"]))
    wrap = (draw(st.booleans()), draw(st.booleans()))
    return WindowPlan.regular(*size, window, stride, weight, wrap=wrap)


@given(plan=plans(), constant=st.floats(-1e3, 1e3, width=32))
@bounded
def test_the_mean_of_constants_is_the_constant(plan: WindowPlan, constant: float) -> None:
    windows = torch.full((len(plan), 1, *plan.window), constant)
    out = scatter_mean(windows, plan)
    # A pixel sums up to 81 windows, each sum rounded by up to 6e-8.
    torch.testing.assert_close(out, torch.full_like(out, constant), rtol=1e-5, atol=1e-35)


@given(plan=plans(), seed=st.integers(0, 2**32))
@bounded
def test_the_mean_does_not_depend_on_the_order_in_which_micro_batches_arrive(
    plan: WindowPlan, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(len(plan), 2, *plan.window, generator=generator)
    windows = torch.full_like(expected, torch.nan)
    for batch in torch.randperm(len(plan), generator=generator).split(3):
        windows[batch] = expected[batch]
    assert torch.equal(scatter_mean(windows, plan), scatter_mean(expected, plan))


@given(plan=plans(), cuts=st.lists(st.floats(0, 1), max_size=4))
@bounded
def test_the_mean_does_not_depend_on_the_bands(plan: WindowPlan, cuts: list[float]) -> None:
    windows = torch.randn(len(plan), 2, *plan.window)
    bounds = sorted({0, plan.height, *(int(cut * plan.height) for cut in cuts)})
    bands = [scatter_mean(windows, plan, rows=rows) for rows in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(bands, 1), scatter_mean(windows, plan))


@given(plan=plans())
@bounded
def test_the_shares_of_the_windows_sum_to_one(plan: WindowPlan) -> None:
    # Window k is one in channel k and zero in the others, so that channel k holds its share.
    one = torch.eye(len(plan))[:, :, None, None].expand(-1, -1, *plan.window)
    total = scatter_mean(one, plan).sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=0)


@given(plan=plans())
@bounded
def test_the_mean_of_a_canvas_s_own_windows_is_the_canvas(plan: WindowPlan) -> None:
    canvas = torch.randn(2, plan.height, plan.width)
    windows = gather_windows(canvas, plan, torch.arange(len(plan)))
    torch.testing.assert_close(scatter_mean(windows, plan), canvas, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "slerp", "nearest"])
@given(size=st.tuples(*(st.integers(1, n) for n in (5, 5, 3, 19))))
@bounded
def test_at_a_cell_s_centre_the_interpolation_is_that_cell(
    mode: str, size: tuple[int, int, int, int]
) -> None:
    cells = torch.randn(size)
    centres = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1])).double()
    assert torch.equal(interpolate_grid(cells, centres, mode=mode), cells.flatten(0, 1))


@given(
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**32 - 40),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    width=st.integers(1, 300),
    step=st.integers(0, 2**32 - 1),
)
@bounded
def test_noise_does_not_depend_on_how_its_rows_are_split(
    seed: int, first: int, counts: list[int], width: int, step: int
) -> None:
    bounds = [first + sum(counts[:i]) for i in range(len(counts) + 1)]
    bands = [philox_normal(seed, 2, rows, width, step=step) for rows in itertools.pairwise(bounds)]
    whole = philox_normal(seed, 2, (bounds[0], bounds[-1]), width, step=step)
    assert torch.equal(torch.cat(bands, 1), whole)
