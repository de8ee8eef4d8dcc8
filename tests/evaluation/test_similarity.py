# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from ssldiff_fast.evaluation import grid_similarity
from ssldiff_fast.slides.grid import Grid

ENCODER = {"name": "an-encoder", "weights_hash": "aaaa"}


def make_grid(embeddings: torch.Tensor | None = None, **changes: Any) -> Grid:
    if embeddings is None:
        embeddings = torch.randn(3, 4, 2, 6, generator=torch.Generator().manual_seed(1))
    settings = {
        "valid": torch.ones(embeddings.shape[:2], dtype=torch.bool),
        "mpp": 0.5,
        "cell_px": 32,
        "encoder": ENCODER,
        **changes,
    }
    return Grid(embeddings, **settings)


def test_a_grid_is_wholly_similar_to_itself_at_any_length() -> None:
    grid = make_grid()
    found = grid_similarity(grid, make_grid(3 * grid.embeddings))
    assert found.mean == pytest.approx(1)
    assert found.count == 12
    assert found.cells.shape == (3, 4)
    assert found.cells.max() <= 1


def test_cosines_are_those_of_the_formula_cell_by_cell() -> None:
    a, b = make_grid(), make_grid(torch.randn(3, 4, 2, 6))
    found = grid_similarity(a, b)
    for row, column in np.ndindex(3, 4):
        x, y = a.embeddings[row, column], b.embeddings[row, column]
        cosines = [float(p @ q / (p.norm() * q.norm())) for p, q in zip(x, y)]
        assert found.cells[row, column] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found.mean == pytest.approx(found.cells.mean(), abs=1e-6)
    assert found.quantile(0.5) == pytest.approx(np.median(found.cells), abs=1e-6)


def test_only_cells_valid_in_both_grids_count() -> None:
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[0] = False
    grid = make_grid()
    turned = -grid.embeddings.clone()
    turned[1:] *= -1
    turned[0, 0] = 0
    found = grid_similarity(make_grid(valid=valid), make_grid(turned))
    assert found.mean == pytest.approx(1)
    assert found.count == 8
    assert np.isnan(found.cells[0]).all()


def test_the_summary_is_plain_json_with_the_distribution() -> None:
    summary = grid_similarity(make_grid(), make_grid(torch.randn(3, 4, 2, 6))).summary()
    assert list(summary) == ["mean", "std", "cells", "q05", "q25", "q50", "q75", "q95"]
    assert json.loads(json.dumps(summary)) == summary
    assert summary["q05"] <= summary["q25"] <= summary["q50"] <= summary["q95"] <= 1


def test_a_shuffled_grid_is_less_similar_than_a_noisy_one() -> None:
    grid = make_grid()
    noisy = make_grid(grid.embeddings + 0.3 * torch.randn(3, 4, 2, 6))
    assert grid_similarity(grid.shuffled(), noisy).mean < 0.5 < grid_similarity(grid, noisy).mean


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: make_grid(torch.ones(3, 4, 1, 6)), "expected the same"),
        (lambda: make_grid(encoder={**ENCODER, "name": "b"}), "different encoders"),
        (lambda: make_grid(encoder={**ENCODER, "weights_hash": "b"}), "different weights"),
        (lambda: make_grid(valid=torch.zeros(3, 4, dtype=torch.bool)), "no cell is valid in both"),
        (lambda: make_grid(torch.zeros(3, 4, 2, 6)), "other has zero embeddings"),
        (lambda: make_grid(torch.full((3, 4, 2, 6), float("nan"))), "other has NaN"),
    ],
)
def test_grids_that_cannot_be_compared_are_named(other: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        grid_similarity(make_grid(), other())


def test_a_grid_that_does_not_say_its_encoder_is_compared() -> None:
    assert grid_similarity(make_grid(), make_grid(encoder={})).mean == pytest.approx(1)
