# SPDX-License-Identifier: Apache-2.0
"""The grid of embeddings as a function of position on the canvas (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssldiff_fast._checks import check_choice, check_finite, check_shape

# Above this |cos| the sine in slerp's denominator is too small, and a straight line as good.
_SLERP_LIMIT = 0.9995
# [4, N, T, D] corners (top left, top right, bottom left, bottom right), [4, N, 1, 1] which of them
# are there, [2, N, 1, 1] shares of the lower row and of the right column -> [N, T, D]
Mode = Callable[[Tensor, Tensor, Tensor], Tensor]


def _bilinear(corners: Tensor, there: Tensor, shares: Tensor) -> Tensor:
    y, x = shares
    weights = torch.stack(((1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x)) * there
    total = weights.sum(0)
    # Divided only where a cell is missing, so that whole grids keep their exact weights.
    total = torch.where(there.all(0) | (total == 0), torch.ones_like(total), total)
    return (weights * corners).sum(0) / total


def _slerp_pair(
    a: Tensor,  # [N, T, D] fp32
    b: Tensor,  # [N, T, D] fp32
    share: Tensor,  # [N, 1, 1] fp32
) -> Tensor:
    # A zero embedding has no direction: its cosine counts as 1, hence a straight line.
    norms = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    cosine = torch.where(norms > 0, (a * b).sum(-1, keepdim=True) / norms, 1.0)
    straight = cosine.abs() > _SLERP_LIMIT
    angle = torch.arccos(torch.where(straight, 0.0, cosine))
    arc = (torch.sin((1.0 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return torch.where(straight, (1.0 - share) * a + share * b, arc)


def _slerp(corners: Tensor, there: Tensor, shares: Tensor) -> Tensor:
    def pair(
        a: Tensor, b: Tensor, has_a: Tensor, has_b: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        # A cell of weight 0 does not count as there: it must not stand in for a missing one.
        has_a, has_b = has_a & (share < 1.0), has_b & (share > 0.0)
        single = torch.where(has_a, a, torch.where(has_b, b, torch.zeros_like(b)))
        return torch.where(has_a & has_b, _slerp_pair(a, b, share), single), has_a | has_b

    top = pair(corners[0], corners[1], there[0], there[1], shares[1])
    bottom = pair(corners[2], corners[3], there[2], there[3], shares[1])
    return pair(top[0], bottom[0], top[1], bottom[1], shares[0])[0]


MODES: dict[str, Mode] = {"bilinear": _bilinear, "slerp": _slerp}


def interpolate_grid(
    grid: Tensor,  # [R, K, T, D] fp32
    points: Tensor,  # [N, 2] fp64, (row, column) in cells
    *,
    mode: str = "bilinear",
    valid: Tensor | None = None,  # [R, K] bool
) -> Tensor:
    """The grid between its cells: "bilinear", or "slerp" along columns and then along rows.

    Points beyond the outer cells replicate them. Cells that are not `valid` are left out, whatever
    they hold: bilinear weights are renormalised over the others, slerp takes the other cell of the
    pair in full. Where no cell of weight above zero is left the result is zeros, the null
    embedding.

    Returns:
        [N, T, D] fp32, not normalised.
    """
    limit = torch.tensor([grid.shape[0] - 1, grid.shape[1] - 1], dtype=torch.float64)
    points = torch.minimum(points.clamp(min=0.0), limit)
    low = points.floor().long()
    high = torch.minimum(low + 1, limit.long())
    shares = (points - low).to(torch.float32).T[:, :, None, None]
    rows = torch.stack((low[:, 0], low[:, 0], high[:, 0], high[:, 0]))
    columns = torch.stack((low[:, 1], high[:, 1], low[:, 1], high[:, 1]))
    corners = grid[rows, columns]
    there = torch.ones_like(corners[..., :1, :1], dtype=torch.bool)
    if valid is not None:
        there = valid[rows, columns][:, :, None, None]
        corners = torch.where(there, corners, torch.zeros_like(corners))
    return MODES[mode](corners, there, shares)


class GridField:
    """A grid of embeddings seen as a function of window origin.

    The centre of the window with origin (y, x) lies at grid coordinate (y / h, x / w), since a
    cell spans one window (h, w). Raw embeddings are interpolated; the conditioner normalises.

    Args:
        grid: [R, K, T, D] fp32, one cell a window without overlap.
        window: (h, w) of a cell in latents.
        mode: "bilinear" or "slerp" (the published code).
        valid: [R, K] bool; cells that are not take no part. Where none of the four nearest is
            valid the field is zero, the null embedding.
    """

    def __init__(
        self,
        grid: Tensor,  # [R, K, T, D] fp32
        window: tuple[int, int],
        mode: str = "bilinear",
        *,
        valid: Tensor | None = None,  # [R, K] bool
    ) -> None:
        call = "GridField"
        sizes = check_shape("grid", grid, "R K T D", call=call)
        check_choice("mode", mode, MODES, call=call)
        if min(grid.shape) < 1:
            raise ValueError(f"{call}: grid has shape {list(grid.shape)}, but no size may be 0.")
        if valid is not None:
            check_shape("valid", valid, "R K", sizes, call=call)
            valid = valid.to("cpu", torch.bool)
        self.grid = grid.detach().to("cpu", torch.float32)
        check_finite("grid", self.grid if valid is None else self.grid[valid], call=call)
        self.valid = valid
        self.window = window
        self.mode = mode

    @property
    def size(self) -> tuple[int, int]:
        """The canvas (H, W) in latents that the grid describes."""
        return self.grid.shape[0] * self.window[0], self.grid.shape[1] * self.window[1]

    @property
    def tokens(self) -> int:
        """Number of tokens T."""
        return self.grid.shape[2]

    @property
    def embedding_width(self) -> int:
        """Embedding width D."""
        return self.grid.shape[3]

    def at(self, origins: Tensor) -> Tensor:
        """The embeddings of the windows with these origins.

        Args:
            origins: [N, 2] int64, (y, x) in latents.

        Returns:
            [N, T, D] fp32.
        """
        check_shape("origins", origins, "N 2", call="GridField.at")
        points = origins.to("cpu", torch.float64) / torch.tensor(self.window, dtype=torch.float64)
        return interpolate_grid(self.grid, points, mode=self.mode, valid=self.valid)
