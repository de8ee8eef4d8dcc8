# SPDX-License-Identifier: Apache-2.0
"""How similar a result's embeddings are to the grid that it was made from, cell by cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ssldiff_fast.slides.grid import Grid

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class Similarity:
    """Cosines between the embeddings of two grids.

    Attributes:
        cells: [R, K] fp32, the cosine of each cell, averaged over its tokens; NaN where a cell is
            not valid in both grids.
    """

    cells: np.ndarray  # [R, K] fp32

    @property
    def count(self) -> int:
        """Cells that were compared."""
        return int(np.isfinite(self.cells).sum())

    @property
    def mean(self) -> float:
        """Mean over the cells that were compared."""
        return float(np.nanmean(self.cells, dtype=np.float64))

    def quantile(self, share: float) -> float:
        """The cosine below which a share of the cells lies."""
        return float(np.nanquantile(self.cells.astype(np.float64), share))

    def summary(self) -> dict[str, float]:
        """Mean, standard deviation, count and quantiles, to be written as JSON."""
        deviation = float(np.nanstd(self.cells, dtype=np.float64))
        return {
            "mean": round(self.mean, 4),
            "std": round(deviation, 4),
            "cells": self.count,
            **{f"q{round(100 * q):02d}": round(self.quantile(q), 4) for q in QUANTILES},
        }


def grid_similarity(grid: Grid, other: Grid) -> Similarity:
    """Cosine between the embeddings of each cell that is valid in both grids.

    Args:
        grid: what a result was made from, or any other grid.
        other: the result encoded again: as many cells, by the same encoder.

    Returns:
        The cosine of each cell and what sums them up. Tokens are compared one by one, and their
        cosines averaged.

    Raises:
        ValueError: the grids have other shapes or encoders, or no valid cell in common, or a
            cell's embedding is zero or not finite.
    """
    _check_comparable(grid, other)
    valid = grid.valid & other.valid
    if not bool(valid.any()):
        raise ValueError("grid_similarity: no cell is valid in both grids, so none can be compared")
    a = _unit(grid.embeddings[valid], "grid")
    b = _unit(other.embeddings[valid], "other")
    cells = torch.full(valid.shape, float("nan"))
    # Equal vectors may come out as 1 + 1e-16.
    cells[valid] = (a * b).sum(-1).clamp(-1, 1).mean(-1).float()
    return Similarity(cells.numpy())


def _unit(
    embeddings: Tensor,  # [N, T, D]
    name: str,
) -> Tensor:  # [N, T, D] fp64, of length 1
    wide = embeddings.double()
    if not bool(wide.isfinite().all()):
        raise ValueError(f"grid_similarity: {name} has NaN or infinite values in valid cells")
    length = wide.norm(dim=-1, keepdim=True)
    if not bool((length > 0).all()):
        raise ValueError(
            f"grid_similarity: {name} has zero embeddings in valid cells, which have no direction; "
            "mark these cells as not valid"
        )
    return wide / length


def _check_comparable(grid: Grid, other: Grid) -> None:
    if grid.embeddings.shape != other.embeddings.shape:
        raise ValueError(
            f"grid_similarity: grid is {list(grid.embeddings.shape)} and other is "
            f"{list(other.embeddings.shape)}; expected the same [R, K, T, D]"
        )
    for entry, words in (("name", "encoders"), ("weights_hash", "weights of the encoder")):
        mine, theirs = grid.encoder.get(entry), other.encoder.get(entry)
        if mine and theirs and mine != theirs:
            raise ValueError(
                f"grid_similarity: the grids were made by different {words} ({mine} and {theirs}); "
                "encode both with the same"
            )
