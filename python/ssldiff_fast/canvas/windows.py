# SPDX-License-Identifier: Apache-2.0
"""Which windows of the canvas are evaluated, and how they weigh where they overlap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssldiff_fast._checks import check_choice
from ssldiff_fast.canvas.noise import offset_shares

# Half-width of the Gaussian window weight, as a share of the window's own half-width. The same
# figure shapes the published decode (paper, supplement): exp(-(u / 0.8)^2) for u in [-1, 1].
GAUSSIAN_WIDTH = 0.8
# The golden and the silver ratio, less their whole parts.
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_SILVER = math.sqrt(2.0) - 1.0


def _uniform(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.float32)


def gaussian(size: int) -> Tensor:
    """exp(-(u / 0.8)^2) at `size` points of u from -1 to 1: [size] fp32."""
    u = torch.linspace(-1.0, 1.0, size, dtype=torch.float64) if size > 1 else torch.zeros(1)
    return torch.exp(-((u / GAUSSIAN_WIDTH) ** 2)).to(torch.float32)


def _hann(size: int) -> Tensor:
    # Sampled at pixel centres, so that no weight is 0 and a window may stand alone.
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return (torch.sin(math.pi * centres) ** 2).to(torch.float32)


WEIGHTS: dict[str, Callable[[int], Tensor]] = {
    "uniform": _uniform,
    "gaussian": gaussian,
    "hann": _hann,
}


def _regular_origins(size: int, window: int, stride: int) -> tuple[int, ...]:
    origins = list(range(0, size - window + 1, stride))
    if origins[-1] + window < size:
        origins.append(size - window)
    return tuple(origins)


def _shifted_origins(size: int, window: int, stride: int, offset: int) -> tuple[int, ...]:
    # A lattice through `offset`; the flush windows of both borders cover what it leaves over.
    lattice = range(offset % stride, size - window + 1, stride)
    return tuple(sorted({0, *lattice, size - window}))


@dataclass(frozen=True)
class WindowPlan:
    """The windows of one step: a separable lattice of origins that covers the canvas.

    Windows are numbered in row-major order of their origins, and `weight_y[u] * weight_x[v]` is
    the weight of a window's pixel (u, v) in the average (paper Eq. 6).

    Args:
        height: Canvas height H in latents.
        width: Canvas width W in latents.
        window: (h, w) of a window in latents.
        origins_y: Ascending origins of the P window rows.
        origins_x: Ascending origins of the Q windows of a row.
        weight_y: h weights.
        weight_x: w weights.
    """

    height: int
    width: int
    window: tuple[int, int]
    origins_y: tuple[int, ...]
    origins_x: tuple[int, ...]
    weight_y: tuple[float, ...]
    weight_x: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_canvas(self.height, self.width, self.window)
        axes = (
            ("origins_y", self.origins_y, self.height, self.window[0], self.weight_y),
            ("origins_x", self.origins_x, self.width, self.window[1], self.weight_x),
        )
        for name, origins, size, window, weight in axes:
            _check_origins(name, origins, size, window)
            if len(weight) != window or min(weight) <= 0.0:
                raise ValueError(
                    f"WindowPlan: the weights beside {name} are {len(weight)} from {min(weight)} "
                    f"up; expected {window}, one a window pixel, all above zero."
                )

    @classmethod
    def regular(
        cls,
        height: int,
        width: int,
        window: tuple[int, int],
        stride: int | tuple[int, int],
        weights: str = "uniform",
    ) -> WindowPlan:
        """Windows every `stride` latents, the last of each axis flush with the border."""
        _check_canvas(height, width, window)
        stride_y, stride_x = window_strides(stride, window)
        return cls._of(
            height,
            width,
            window,
            _regular_origins(height, window[0], stride_y),
            _regular_origins(width, window[1], stride_x),
            weights,
        )

    @classmethod
    def shifted(
        cls,
        height: int,
        width: int,
        window: tuple[int, int],
        offset: tuple[int, int],
        *,
        stride: int | tuple[int, int] | None = None,
        weights: str = "hann",
    ) -> WindowPlan:
        """Windows side by side on a lattice through `offset`, flush at the borders.

        Without `stride` the windows are disjoint but for the two flush ones of each axis, where
        the Hann weight hands over smoothly from one to the other; a smaller stride lets all
        neighbours overlap a little.
        """
        _check_canvas(height, width, window)
        stride_y, stride_x = window_strides(window if stride is None else stride, window)
        return cls._of(
            height,
            width,
            window,
            _shifted_origins(height, window[0], stride_y, offset[0]),
            _shifted_origins(width, window[1], stride_x, offset[1]),
            weights,
        )

    @classmethod
    def _of(
        cls,
        height: int,
        width: int,
        window: tuple[int, int],
        origins_y: tuple[int, ...],
        origins_x: tuple[int, ...],
        weights: str,
    ) -> WindowPlan:
        check_choice("weights", weights, WEIGHTS, call="WindowPlan")
        weight_y, weight_x = (tuple(WEIGHTS[weights](size).tolist()) for size in window)
        return cls(height, width, window, origins_y, origins_x, weight_y, weight_x)

    def __len__(self) -> int:
        return len(self.origins_y) * len(self.origins_x)

    @property
    def origins(self) -> Tensor:
        """The origin (y, x) of every window, row-major: [N, 2] int64."""
        y, x = torch.tensor(self.origins_y), torch.tensor(self.origins_x)
        return torch.cartesian_prod(y, x).view(-1, 2)

    def scaled(self, factor: int, weight_y: Tensor, weight_x: Tensor) -> WindowPlan:
        """The same windows on a canvas `factor` times as large, with weights of that size."""
        return WindowPlan(
            self.height * factor,
            self.width * factor,
            (self.window[0] * factor, self.window[1] * factor),
            tuple(y * factor for y in self.origins_y),
            tuple(x * factor for x in self.origins_x),
            tuple(weight_y.tolist()),
            tuple(weight_x.tolist()),
        )


class ShiftedWindows:
    """A plan for every step: disjoint windows whose offset moves from step to step.

    The offsets are an additive recurrence, a low-discrepancy sequence in the plane, by the two
    numbers that fractions approximate worst: along each axis every few steps in a row are spread
    evenly, so that no border between windows stays in one place and no seam can form. (The usual
    choice for the plane, powers of the plastic number, nearly repeats every four steps.) The seed
    sets where the sequence starts.

    What the last steps leave is not painted over by later ones, so from step `overlap_from` on
    neighbours overlap by a quarter window.
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
    ) -> None:
        _check_canvas(height, width, window)
        check_choice("weights", weights, WEIGHTS, call="ShiftedWindows")
        self.height, self.width, self.window, self.weights = height, width, window, weights
        self._stride = window_strides(window if stride is None else stride, window)
        self._overlap_from = overlap_from
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
        )


def window_strides(
    stride: int | tuple[int, int], window: tuple[int, int], *, name: str = "stride"
) -> tuple[int, int]:
    """The stride (y, x) as whole latents, or an error that calls it `name`."""
    pair = stride if isinstance(stride, tuple) else (stride, stride)
    for value, size in zip(pair, window):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(
                f"WindowPlan: {name} is {stride!r}, but it must be a whole number of latents, or a "
                "pair (y, x) of them."
            )
        if not 1 <= value <= size:
            raise ValueError(
                f"WindowPlan: {name} is {value}, but it must be from 1 to the window's {size} "
                "latents, so that every canvas pixel is covered."
            )
    return int(pair[0]), int(pair[1])


def _check_canvas(height: int, width: int, window: tuple[int, int]) -> None:
    if min(window) < 1:
        raise ValueError(f"WindowPlan: window is {window}, but it must be at least 1 x 1 latents.")
    if height < window[0] or width < window[1]:
        raise ValueError(
            f"WindowPlan: the canvas is {height} x {width} latents, but it must be at least one "
            f"window, {window[0]} x {window[1]}; ask for a larger image."
        )


def _check_origins(name: str, origins: Sequence[int], size: int, window: int) -> None:
    covered = 0
    for origin in origins:
        if not 0 <= origin <= size - window:
            raise ValueError(
                f"WindowPlan: {name} has {origin}, but a window of {window} in {size} latents "
                f"must start from 0 to {size - window}."
            )
        if origin > covered:
            break
        covered = origin + window
    ascending = all(a < b for a, b in itertools.pairwise(origins))
    if covered < size or not ascending:
        raise ValueError(
            f"WindowPlan: {name} is {list(origins)}, but origins must ascend and cover 0 to "
            f"{size} with windows of {window}."
        )
