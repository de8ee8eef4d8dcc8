# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssldiff_fast.canvas import WindowPlan, canvas_noise
from ssldiff_fast.canvas.bands import RowBlend, blend_window_rows, even_parts, micro_batches
from ssldiff_fast.canvas.wide import Memory
from ssldiff_fast.ops import scatter_mean

PLANS = {
    "one window": WindowPlan.regular(8, 8, (8, 8), 3),
    "stride": WindowPlan.regular(41, 23, (8, 6), (2, 3), "gaussian"),
    "disjoint": WindowPlan.regular(32, 24, (8, 8), 8),
    "shifted": WindowPlan.shifted(40, 40, (8, 8), (3, 5)),
    "one column": WindowPlan.regular(30, 8, (8, 8), 5, "hann"),
}


def window_rows(plan: WindowPlan) -> list[Tensor]:
    height, width = plan.window
    count = len(plan.origins_x)
    noise = canvas_noise(0, 2 * len(plan), height, width)
    return list(noise.view(len(plan.origins_y), count, 2, height, width))


def mean_of_windows(plan: WindowPlan) -> Tensor:
    """Eq. 6, as it is written."""
    weight = torch.tensor(plan.weight_y).double()[:, None] * torch.tensor(plan.weight_x).double()
    total = torch.zeros(2, plan.height, plan.width, dtype=torch.float64)
    norm = torch.zeros(plan.height, plan.width, dtype=torch.float64)
    windows = torch.cat(window_rows(plan))
    for window, (y, x) in zip(windows, plan.origins.tolist()):
        area = (slice(y, y + plan.window[0]), slice(x, x + plan.window[1]))
        total[(slice(None), *area)] += weight * window
        norm[area] += weight
    return (total / norm).float()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_bands_are_the_weighted_mean_of_the_windows(plan: WindowPlan) -> None:
    image = torch.cat(list(blend_window_rows(plan, window_rows(plan))), dim=1)
    torch.testing.assert_close(image, mean_of_windows(plan))


class Pieces(Memory):
    """Works on so many columns of windows at once."""

    def __init__(self, columns: int) -> None:
        self._columns = columns

    def share(self, count: int, each: int) -> int:
        return self._columns


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_the_bytes_do_not_depend_on_the_number_of_bands_and_pieces(plan: WindowPlan) -> None:
    whole = scatter_mean(torch.cat(window_rows(plan)), plan)
    assert torch.equal(torch.cat(list(blend_window_rows(plan, window_rows(plan))), dim=1), whole)
    for columns in (1, 2, 5):
        blend, made = RowBlend(plan, Pieces(columns)), torch.empty_like(whole)
        end = 0
        for row in window_rows(plan):
            rows = blend.push(row)
            assert rows.start == end
            end, right = rows.stop, 0
            for left, piece in blend.pieces(rows) if rows else ():
                assert left == right
                right += piece.shape[2]
                made[:, rows.start : rows.stop, left:right] = piece
        assert end == plan.height
        assert torch.equal(made, whole)


def test_a_band_is_handed_on_as_soon_as_its_rows_are_final() -> None:
    plan = WindowPlan.regular(40, 8, (8, 8), 4)
    taken = 0

    def rows() -> object:
        nonlocal taken
        for row in window_rows(plan):
            taken += 1
            yield row

    finished = 0
    for band in blend_window_rows(plan, rows()):
        finished += band.shape[1]
        assert finished == (plan.origins_y[taken] if taken < 9 else 40)
    assert finished == 40


@pytest.mark.parametrize(
    ("count", "batch_size", "expected"),
    [
        (9, 32, [[0, 1, 2, 3, 4, 5, 6, 7, 8]]),
        (9, 4, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        (7, 4, [[0, 1, 2, 3], [4, 5, 6, 6]]),
        (3, 1, [[0], [1], [2]]),
        (5, 3, [[0, 1, 2], [3, 4, 4]]),
    ],
)
def test_micro_batches_are_few_equal_and_hardly_padded(
    count: int, batch_size: int, expected: list[list[int]]
) -> None:
    assert [columns.tolist() for columns in micro_batches(count, batch_size)] == expected


def test_every_window_is_in_a_micro_batch_once_padding_aside() -> None:
    for count in range(1, 40):
        for batch_size in range(1, 12):
            batches = micro_batches(count, batch_size)
            assert len({len(columns) for columns in batches}) == 1
            assert len(batches[0]) <= batch_size
            assert torch.cat(batches)[:count].tolist() == list(range(count))


def test_parts_are_as_few_as_can_be_and_hold_every_column_once() -> None:
    assert [list(part) for part in even_parts(range(11), 8)] == [[0, 1, 2, 3, 4], [*range(5, 11)]]
    for count in range(40):
        for most in range(1, 12):
            parts = even_parts(range(count), most)
            assert len(parts) == -(-count // most)
            assert max(map(len, parts), default=0) - min(map(len, parts), default=0) <= 1
            assert [column for part in parts for column in part] == list(range(count))
