# SPDX-License-Identifier: Apache-2.0
"""Which windows of the canvas there are, and how they weigh where they overlap."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._checks import check_choice

# Half-width of the Gaussian window weight, as a share of the window's own half-width. The same
# figure shapes the published decode (paper, supplement): exp(-(u / 0.8)^2) for u in [-1, 1].
GAUSSIAN_WIDTH = 0.8


def _uniform(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.float32)


def gaussian(size: int) -> Tensor:
    """exp(-(u / 0.8)^2) at `size` points of u from -1 to 1: [size] fp32."""
    u = torch.linspace(-1.0, 1.0, size, dtype=torch.float64) if size > 1 else torch.zeros(1)
    return torch.exp(-((u / GAUSSIAN_WIDTH) ** 2)).to(torch.float32)


def _arch(size: int) -> Tensor:
    # Sampled at pixel centres, so that no weight is 0 and a window may stand alone.
    return torch.sin(math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size)


def _sine(size: int) -> Tensor:
    return _arch(size).to(torch.float32)


def _hann(size: int) -> Tensor:
    return (_arch(size) ** 2).to(torch.float32)


WEIGHTS: dict[str, Callable[[int], Tensor]] = {
    "uniform": _uniform,
    "gaussian": gaussian,
    "sine": _sine,
    "hann": _hann,
}


def _regular_origins(size: int, window: int, stride: int, wrap: bool) -> tuple[int, ...]:
    if wrap:
        return tuple(range(0, size, stride))
    origins = list(range(0, size - window + 1, stride))
    if origins[-1] + window < size:
        origins.append(size - window)
    return tuple(origins)


def _shifted_origins(
    size: int, window: int, stride: int, offset: int, wrap: bool
) -> tuple[int, ...]:
    if wrap:
        return tuple(sorted({(offset + start) % size for start in range(0, size, stride)}))
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
        weight_y: h weights, finite and not negative, with a sum above zero wherever windows meet.
        weight_x: w weights likewise.
        wrap: Whether windows that run over the end of the axis y, and x, go on at its beginning,
            which makes the image tileable along it; origins there are from 0 to the size less 1.

    Raises:
        ValueError: A canvas smaller than a window, origins that leave it, do not ascend or leave a
            position uncovered, weights that are negative, not finite or sum to zero somewhere.
    """

    height: int
    width: int
    window: tuple[int, int]
    origins_y: tuple[int, ...]
    origins_x: tuple[int, ...]
    weight_y: tuple[float, ...]
    weight_x: tuple[float, ...]
    wrap: tuple[bool, bool] = (False, False)

    def __post_init__(self) -> None:
        check_canvas(self.height, self.width, self.window)
        for axis, (size, window, origins, weight, wrap) in zip("yx", self.axes):
            _check_origins(f"origins_{axis}", origins, size, window, wrap)
            _check_weight(axis, origins, weight, size, window)

    @classmethod
    def regular(
        cls,
        height: int,
        width: int,
        window: tuple[int, int],
        stride: int | tuple[int, int],
        weights: str = "uniform",
        *,
        wrap: tuple[bool, bool] = (False, False),
    ) -> WindowPlan:
        """Windows every `stride` latents, the last of each axis flush with the border.

        An axis that wraps has no border: windows go on every `stride` latents to its end.
        """
        return cls.shifted(height, width, window, None, stride=stride, weights=weights, wrap=wrap)

    @classmethod
    def shifted(
        cls,
        height: int,
        width: int,
        window: tuple[int, int],
        offset: tuple[int, int] | None,
        *,
        stride: int | tuple[int, int] | None = None,
        weights: str = "hann",
        wrap: tuple[bool, bool] = (False, False),
    ) -> WindowPlan:
        """Windows side by side on a lattice through `offset`, flush at the borders.

        Without `stride` the windows are disjoint but for the two flush ones of each axis, where
        the Hann weight hands over smoothly from one to the other; a smaller stride lets all
        neighbours overlap a little. On an axis that wraps no window is flush.
        """
        check_canvas(height, width, window)
        check_choice("weights", weights, WEIGHTS, call="WindowPlan")
        strides = window_strides(window if stride is None else stride, window)
        origins = [
            _regular_origins(size, extent, step, wraps)
            if offset is None
            else _shifted_origins(size, extent, step, offset[axis], wraps)
            for axis, (size, extent, step, wraps) in enumerate(
                zip((height, width), window, strides, wrap)
            )
        ]
        weight_y, weight_x = (tuple(WEIGHTS[weights](size).tolist()) for size in window)
        return cls(height, width, window, origins[0], origins[1], weight_y, weight_x, wrap)

    def __len__(self) -> int:
        return len(self.origins_y) * len(self.origins_x)

    @property
    def axes(self) -> tuple[tuple[int, int, tuple[int, ...], tuple[float, ...], bool], ...]:
        """Of y and of x: size, window, origins, weights, whether it wraps."""
        return (
            (self.height, self.window[0], self.origins_y, self.weight_y, self.wrap[0]),
            (self.width, self.window[1], self.origins_x, self.weight_x, self.wrap[1]),
        )

    @property
    def origins(self) -> Tensor:
        """The origin (y, x) of every window, row-major: [N, 2] int64."""
        y, x = torch.tensor(self.origins_y), torch.tensor(self.origins_x)
        return torch.cartesian_prod(y, x).view(-1, 2)

    def origins_of(
        self,
        index: Tensor,  # [N] int64
    ) -> Tensor:
        """The origins (y, x) of the windows with these numbers: [N, 2] int64."""
        y, x = torch.tensor(self.origins_y), torch.tensor(self.origins_x)
        columns = len(self.origins_x)
        return torch.stack((y[index // columns], x[index % columns]), dim=1)

    def window_rows(self, begin: int, end: int) -> list[int]:
        """The window rows that cover a canvas row from `begin` to `end` - 1, ascending."""
        window = self.window[0]
        first = bisect.bisect_right(self.origins_y, begin - window)
        covering = set(range(first, bisect.bisect_left(self.origins_y, end)))
        if self.wrap[0]:
            past = bisect.bisect_right(self.origins_y, begin + self.height - window)
            covering |= set(range(past, len(self.origins_y)))
        return sorted(covering)

    def part(self, rows: range, columns: range) -> WindowPlan:
        """The windows of some neighbouring rows and columns, on the canvas that they cover."""
        origins_y, origins_x = (
            tuple(origins[kept.start : kept.stop])
            for origins, kept in zip((self.origins_y, self.origins_x), (rows, columns))
        )
        y, x = origins_y[0], origins_x[0]
        return WindowPlan(
            origins_y[-1] + self.window[0] - y,
            origins_x[-1] + self.window[1] - x,
            self.window,
            tuple(origin - y for origin in origins_y),
            tuple(origin - x for origin in origins_x),
            self.weight_y,
            self.weight_x,
        )

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
            self.wrap,
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


def check_canvas(height: int, width: int, window: tuple[int, int]) -> None:
    """Raise ValueError unless at least one window fits on the canvas."""
    if min(window) < 1:
        raise ValueError(f"WindowPlan: window is {window}, but it must be at least 1 x 1 latents.")
    if height < window[0] or width < window[1]:
        raise ValueError(
            f"WindowPlan: the canvas is {height} x {width} latents, but it must be at least one "
            f"window, {window[0]} x {window[1]}; ask for a larger image."
        )


def _check_origins(name: str, origins: Sequence[int], size: int, window: int, wrap: bool) -> None:
    last = size - 1 if wrap else size - window
    # On an axis that wraps the last window covers the first positions too.
    covered = origins[-1] + window - size if wrap and origins else 0
    previous = -1
    for origin in origins:
        if not 0 <= origin <= last:
            raise ValueError(
                f"WindowPlan: {name} holds {origin}, but a window of {window} in {size} latents "
                f"must start from 0 to {last}."
            )
        if origin <= previous:
            raise ValueError(
                f"WindowPlan: {name} holds {origin} after {previous}, but origins must ascend; "
                "sort them and drop repeats."
            )
        if origin > covered:
            break
        previous, covered = origin, origin + window
    if covered < size:
        raise ValueError(
            f"WindowPlan: {name} leaves position {covered % size} of {size} without a window; "
            "every position must be covered."
        )


def _check_weight(
    axis: str, origins: Sequence[int], weight: Sequence[float], size: int, window: int
) -> None:
    if len(weight) != window:
        raise ValueError(
            f"WindowPlan: weight_{axis} has {len(weight)} entries, but windows are {window} "
            f"latents along {axis}; pass one weight for each."
        )
    for value in weight:
        if not math.isfinite(value) or value < 0.0:
            raise ValueError(
                f"WindowPlan: weight_{axis} holds {value}, but weights must be finite and not "
                "negative."
            )
    # What float32 cannot hold counts as zero.
    rounded = np.asarray(weight, dtype=np.float32)
    if rounded.min() > 0.0:
        return
    weighed = np.zeros(size, dtype=bool)
    for origin in origins:
        weighed[(origin + np.flatnonzero(rounded)) % size] = True
    if not weighed.all():
        raise ValueError(
            f"WindowPlan: weight_{axis} sums to zero at position {int(weighed.argmin())}; every "
            "position needs a window with a weight above zero."
        )
