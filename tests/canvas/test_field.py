# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from golden_inputs import golden_input, golden_output, relative_error
from ssldiff_fast.canvas import GridField, WindowPlan

MODES = ["bilinear", "slerp", "nearest"]


def grid(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.golden
def test_slerp_is_that_of_the_published_code() -> None:
    embeddings = golden_input("panorama.embeddings", 4, 48).view(2, 2, 1, 48)
    plan = WindowPlan.regular(128, 128, (64, 64), 16)
    field = GridField(embeddings, (64, 64), "slerp").at(plan.origins)
    assert relative_error(field[:, 0], golden_output("panorama.field_slerp")) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_window_over_one_cell_gets_that_cell(mode: str) -> None:
    cells = grid(3, 4, 2, 8)
    plan = WindowPlan.regular(24, 64, (8, 16), (8, 16))
    assert torch.equal(GridField(cells, (8, 16), mode).at(plan.origins), cells.flatten(0, 1))


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_interpolated_by_themselves(mode: str) -> None:
    cells = grid(3, 3, 2, 6)
    plan = WindowPlan.regular(24, 24, (8, 8), 3)
    both = GridField(cells, (8, 8), mode).at(plan.origins)
    for token in range(2):
        alone = GridField(cells[:, :, token : token + 1], (8, 8), mode).at(plan.origins)
        torch.testing.assert_close(both[:, token : token + 1], alone)


@pytest.mark.parametrize("mode", MODES)
def test_cells_that_are_not_valid_take_no_part(mode: str) -> None:
    cells = grid(2, 2, 1, 4)
    cells[0, 1] = float("nan")
    valid = torch.tensor([[True, False], [True, True]])
    field = GridField(cells, (8, 8), mode, valid=valid)
    at = field.at(torch.tensor([[0, 3], [0, 8], [8, 8], [3, 3]]))
    torch.testing.assert_close(at[0], cells[0, 0])
    assert torch.equal(at[1], torch.zeros(1, 4))
    assert torch.equal(at[2], cells[1, 1])
    assert bool(torch.isfinite(at[3]).all())


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_without_holes_changes_nothing(mode: str) -> None:
    cells, valid = grid(3, 3, 1, 8), torch.ones(3, 3, dtype=torch.bool)
    origins = WindowPlan.regular(24, 24, (8, 8), 3).origins
    masked = GridField(cells, (8, 8), mode, valid=valid).at(origins)
    assert torch.equal(masked, GridField(cells, (8, 8), mode).at(origins))


def test_a_field_knows_the_canvas_it_describes() -> None:
    field = GridField(grid(3, 5, 2, 7), (8, 16))
    assert (field.size, field.tokens, field.embedding_width) == ((24, 80), 2, 7)


def test_bad_grids_are_named() -> None:
    with pytest.raises(ValueError, match=r"grid has shape \[3, 3, 8\]"):
        GridField(grid(3, 3, 8), (8, 8))
    with pytest.raises(ValueError, match="mode is 'cubic'"):
        GridField(grid(3, 3, 1, 8), (8, 8), "cubic")
    with pytest.raises(ValueError, match="no size may be 0"):
        GridField(torch.zeros(0, 3, 1, 8), (8, 8))
    with pytest.raises(ValueError, match="grid holds 8 values that are NaN"):
        GridField(torch.full((1, 1, 1, 8), float("nan")), (8, 8))
    with pytest.raises(ValueError, match=r"valid has shape \[2, 3\]"):
        GridField(grid(3, 3, 1, 8), (8, 8), valid=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="origins has shape"):
        GridField(grid(3, 3, 1, 8), (8, 8)).at(torch.zeros(4, dtype=torch.long))
