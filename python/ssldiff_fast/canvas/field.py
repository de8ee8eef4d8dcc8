# SPDX-License-Identifier: Apache-2.0
"""Conditioning as a function of position: a grid of embeddings (section 3.2), or one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ssldiff_fast._checks import check_choice, check_finite, check_shape
from ssldiff_fast.canvas.conditioning import Conditioning, as_conditioning, one_window
from ssldiff_fast.ops import interpolate_grid
from ssldiff_fast.ops.interpolate_grid import MODES


class GridField:
    """A grid of embeddings seen as a function of window origin.

    The centre of the window with origin (y, x) lies at grid coordinate (y / h, x / w), since a
    cell spans one window (h, w). Raw embeddings are interpolated; the conditioner normalises.

    Args:
        grid: [R, K, T, D] fp32, one cell a window without overlap.
        window: (h, w) of a cell in latents.
        mode: "bilinear", "slerp" (the published code) or "nearest".
        valid: [R, K] bool; cells that are not take no part. Where none of the four nearest is
            valid the field is zero, the null embedding.
        uncond: [T, D] what guidance goes away from; the null embedding unless given.
        wrap: whether the last cells of y, and of x, have the first ones for neighbours, for
            images that are tileable along it.
    """

    def __init__(
        self,
        grid: Tensor,  # [R, K, T, D] fp32
        window: tuple[int, int],
        mode: str = "bilinear",
        *,
        valid: Tensor | None = None,  # [R, K] bool
        uncond: Tensor | None = None,  # [T, D] fp32
        wrap: tuple[bool, bool] = (False, False),
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
        if uncond is not None:
            check_shape("uncond", uncond, "T D", sizes, call=call)
            check_finite("uncond", uncond, call=call)
        # The null embedding is the zero vector: what the published models were trained with.
        null = torch.zeros(grid.shape[2:]) if uncond is None else uncond.detach()
        self.uncond = null.to("cpu", torch.float32)[None]
        self.valid = valid
        self.window = window
        self.mode = mode
        self.wrap = wrap
        self._grid, self._valid = _wrapped(self.grid, wrap), valid
        if valid is not None:
            self._valid = _wrapped(valid, wrap)

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
        return interpolate_grid(self._grid, points, mode=self.mode, valid=self._valid)


def _wrapped(cells: Tensor, wrap: tuple[bool, bool]) -> Tensor:
    """Cells with the first row and column once more after the last, along axes that wrap."""
    for axis, wraps in enumerate(wrap):
        if wraps:
            cells = torch.cat((cells, cells.narrow(axis, 0, 1)), dim=axis)
    return cells


class PromptField:
    """One prompt for all windows; it is held once, whatever the canvas.

    Args:
        cond: the prompt's tokens, [T, D] or [1, T, D], or a `Conditioning` of one window (pooled
            embeddings, a class).
        uncond: the negative prompt's, likewise; needed for guidance.
    """

    # A prompt is the same everywhere, on a canvas of any size.
    size = (2**62, 2**62)
    everywhere = True

    def __init__(
        self,
        cond: Tensor | Conditioning,
        *,
        uncond: Tensor | Conditioning | None = None,
    ) -> None:
        call = "PromptField"
        if isinstance(cond, Tensor) and cond.ndim == 2:
            cond = cond[None]
        self.cond = as_conditioning(cond, call=call)
        if len(self.cond) != 1:
            raise ValueError(
                f"{call}: cond is for {len(self.cond)} windows, but one prompt was expected: "
                "[T, D] or [1, T, D]; use RegionField for several prompts."
            )
        self.uncond = None if uncond is None else one_window(uncond, call=call).plain()

    def at(self, origins: Tensor) -> Tensor | Conditioning:
        """The prompt for each of these windows, without a copy.

        Args:
            origins: [N, 2] int64, (y, x) in latents.

        Returns:
            [N, T, D], or a `Conditioning` of N windows.
        """
        check_shape("origins", origins, "N 2", call="PromptField.at")
        return self.cond.expand(len(origins)).plain()
