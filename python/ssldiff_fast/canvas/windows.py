# SPDX-License-Identifier: Apache-2.0
"""Window plans that change from step to step."""

from __future__ import annotations

import math

from ssldiff_fast._checks import check_choice
from ssldiff_fast.canvas.noise import offset_shares
from ssldiff_fast.ops.window_plan import WEIGHTS, WindowPlan, check_canvas, window_strides

# The golden and the silver ratio, less their whole parts.
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_SILVER = math.sqrt(2.0) - 1.0


class ShiftedWindows:
    """A plan for every step: disjoint windows whose offset moves from step to step.

    The offsets are an additive recurrence, a low-discrepancy sequence in the plane, by the two
    numbers that fractions approximate worst: along each axis every few steps in a row are spread
    evenly, so that no border between windows stays in one place and no seam can form. (The usual
    choice for the plane, powers of the plastic number, nearly repeats every four steps.) The seed
    sets where the sequence starts.

    What the last steps leave is not painted over by later ones, so from step `overlap_from` on
    neighbours overlap by a quarter window. Along axes that wrap, windows go on round the end.
    """

    def __init__(
        self,
        height: int,
        width: int,
        window: tuple[int, int],
        *,
        seed: int,
        stride: int | tuple[int, int] | None = None,
        weights: str = "hann",
        overlap_from: int | None = None,
        wrap: tuple[bool, bool] = (False, False),
    ) -> None:
        check_canvas(height, width, window)
        check_choice("weights", weights, WEIGHTS, call="ShiftedWindows")
        self.height, self.width, self.window, self.weights = height, width, window, weights
        self._stride = window_strides(window if stride is None else stride, window)
        self._overlap_from = overlap_from
        self.wrap = wrap
        self._start = offset_shares(seed)

    def stride(self, step: int) -> tuple[int, int]:
        """The stride (y, x) of a step."""
        if self._overlap_from is None or step < self._overlap_from:
            return self._stride
        y, x = (max(1, size - size // 4) for size in self.window)
        return min(self._stride[0], y), min(self._stride[1], x)

    def offset(self, step: int) -> tuple[int, int]:
        """The lattice offset (y, x) of a step."""
        share_y = (self._start[0] + step * _GOLDEN) % 1.0
        share_x = (self._start[1] + step * _SILVER) % 1.0
        stride_y, stride_x = self.stride(step)
        return int(share_y * stride_y), int(share_x * stride_x)

    def __call__(self, step: int) -> WindowPlan:
        return WindowPlan.shifted(
            self.height,
            self.width,
            self.window,
            self.offset(step),
            stride=self.stride(step),
            weights=self.weights,
            wrap=self.wrap,
        )
