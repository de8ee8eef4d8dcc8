# SPDX-License-Identifier: Apache-2.0
"""Which windows hold tissue: the others are not evaluated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssldiff_fast._checks import check_shape
from ssldiff_fast.ops import WindowPlan


class TissueMask:
    """Tissue on the canvas, in cells of any size: a window is evaluated where it touches some.

    What no evaluated window covers becomes the background latent; where evaluated windows end,
    their weights hand over to it, which makes the edge soft. Tiles are left out likewise when the
    canvas is decoded (`Glass`).

    Args:
        tissue: [R, K] bool, spread evenly over the canvas: the grid's valid cells, or finer.
    """

    def __init__(
        self,
        tissue: Tensor,  # [R, K] bool
    ) -> None:
        check_shape("tissue", tissue, "R K", call="TissueMask")
        if tissue.dtype != torch.bool:
            dtype = str(tissue.dtype).removeprefix("torch.")
            raise TypeError(f"TissueMask: tissue is {dtype}, but bool was expected; compare it.")
        if not bool(tissue.any()):
            raise ValueError(
                "TissueMask: tissue has no cell that is true, so there is nothing to make; check "
                "the mask, or leave it out."
            )
        self.tissue = tissue.detach().cpu()

    def columns(self, plan: WindowPlan, row: int) -> Tensor:
        """[M] int64 columns of the windows of window row `row` that touch tissue."""
        first, last = _cells([plan.origins_y[row]], plan.window[0], plan.height, len(self.tissue))
        there = self.tissue[torch.arange(int(first), int(last)) % len(self.tissue)].any(0)
        first, last = _cells(plan.origins_x, plan.window[1], plan.width, len(there))
        # Twice round, for windows that run over the end.
        before = torch.nn.functional.pad(there.repeat(2).cumsum(0), (1, 0))
        return (before[last] > before[first]).nonzero().flatten()

    def cells(
        self, rows: tuple[int, int], columns: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:  # [r, k] bool
        """The cells that latents [begin, end) of each axis touch, of a canvas of (H, W)."""
        spans = []
        for (begin, end), side, cells in zip((rows, columns), size, self.tissue.shape):
            first, last = _cells([begin], end - begin, side, cells)
            spans.append(slice(int(first), int(last)))
        return self.tissue[spans[0], spans[1]]


def _cells(origins: Sequence[int], window: int, size: int, cells: int) -> tuple[Tensor, Tensor]:
    """The cells, from first to before last, that latents `origin` to `origin + window` touch."""
    starts = torch.tensor(origins)
    return starts * cells // size, -(-(starts + window) * cells // size)
