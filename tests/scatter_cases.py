# SPDX-License-Identifier: Apache-2.0
"""Calls of scatter_mean and gather_windows with everything that they can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from operator_cases import PLANS, Case
from ssldiff_fast.ops import CanvasStep, WindowPlan


@dataclass(frozen=True)
class Call:
    """Arguments of one call of scatter_mean."""

    windows: Tensor
    plan: WindowPlan
    index: Tensor | None
    options: dict[str, Any]

    def run(self, function: Callable[..., Any]) -> tuple[Tensor, ...]:
        """The results, one or two."""
        made = function(self.windows, self.plan, self.index, **self.options)
        return made if isinstance(made, tuple) else (made,)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same with all tensors but the index changed."""
        options = {k: change(v) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        step = options.get("step")
        if step is not None:
            previous = None if step.previous is None else change(step.previous)
            options["step"] = replace(step, canvas=change(step.canvas), previous=previous)
        return replace(self, windows=change(self.windows), options=options)

    def double(self) -> Call:
        """The same values in float64."""
        return self.map(lambda tensor: tensor.double())


# What a call has beside its windows.
BAND, MASK, BACKGROUND, SCALE, SCALES, PIXELS, STEP, FULL_STEP = (
    "band",
    "mask",
    "background",
    "scale",
    "scales",
    "pixels",
    "step",
    "full step",
)
ASKED: dict[str, tuple[str, tuple[str, ...]]] = {
    "band": ("odd-overlap", (BAND,)),
    "band-past-a-tile": ("rows-past-a-tile", (BAND,)),
    "wrapped-band": ("wrapped", (BAND,)),
    "left-out": ("full-overlap", (MASK,)),
    "background": ("odd-overlap", (MASK, BACKGROUND)),
    "background-band": ("wrapped", (BAND, MASK, BACKGROUND)),
    "background-wide": ("wider-than-a-tile", (MASK, BACKGROUND)),
    "guided": ("flush-border", (SCALE,)),
    "guided-windows": ("wrapped", (MASK, BACKGROUND, SCALES)),
    "guided-pixels": ("odd-overlap", (BAND, PIXELS)),
    "step": ("odd-overlap", (STEP,)),
    "full-step": ("rows-past-a-tile", (FULL_STEP,)),
    "wide-step": ("wider-than-a-tile", (BAND, FULL_STEP)),
    "everything": ("wrapped", (BAND, MASK, BACKGROUND, PIXELS, FULL_STEP)),
}


def make_call(name: str, dtype: torch.dtype = torch.float32) -> Call:
    """The call of this name, with windows of this dtype."""
    plan_name, asked = ASKED[name]
    case = PLANS[plan_name]
    plan, height, total = case.plan, case.plan.height, accumulated(dtype)
    rows = (height // 4, height - height // 5) if BAND in asked else (0, height)
    band = (case.channels, rows[1] - rows[0], plan.width)
    windows, index = case.windows(dtype), None
    if MASK in asked:
        kept = [k for k in range(len(plan)) if k not in _left_out(plan_name, len(plan))]
        index = torch.tensor(kept)
        windows = windows[index]
    elif BAND in asked:
        index = covering(plan, rows)
        windows = windows[index]
    options: dict[str, Any] = {"rows": rows if BAND in asked else None}
    if BACKGROUND in asked:
        options["background"] = torch.randn(band).to(total)
    if {SCALE, SCALES, PIXELS} & set(asked):
        options["uncond"] = torch.randn(windows.shape).to(dtype)
        shape = {SCALES: (len(windows),), PIXELS: band[1:]}
        options["guidance_scale"] = next(
            (torch.rand(shape[kind]).to(total) * 3 for kind in asked if kind in shape), 1.75
        )
    if STEP in asked:
        options["step"] = CanvasStep(torch.randn(band).to(total), x=0.75, output=-0.625)
    if FULL_STEP in asked:
        options["step"] = CanvasStep(
            torch.randn(band).to(total),
            x=0.75,
            output=-0.625,
            noise=0.5,
            history=0.125,
            previous=torch.randn(band).to(total),
            denoised_x=1.5,
            denoised_output=-0.25,
            seed=2**63 + 5,
            step=3,
        )
    return Call(windows, plan, index, options)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the canvas."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def covering(plan: WindowPlan, rows: tuple[int, int]) -> Tensor:
    """The numbers of the windows that cover these canvas rows."""
    columns = torch.arange(len(plan.origins_x))
    window_rows = torch.tensor(plan.window_rows(*rows))
    return (window_rows[:, None] * len(columns) + columns).flatten()


def _left_out(plan_name: str, count: int) -> set[int]:
    # Of full overlap the inner windows: the outer ones still cover every pixel.
    return {5, 6, 9} if plan_name == "full-overlap" else {k for k in range(count) if k % 3 == 1}


@dataclass(frozen=True)
class Gather:
    """Arguments of one call of gather_windows, but for dtype and layout."""

    case: Case
    index: list[int]
    rows: tuple[int, int] | None = None  # first row and number of rows given

    def canvas(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random canvas rows, exact in bfloat16."""
        plan = self.case.plan
        count = plan.height if self.rows is None else self.rows[1]
        values = torch.randn(self.case.channels, count, plan.width)
        return values.bfloat16().to(dtype)

    @property
    def first_row(self) -> int:
        return 0 if self.rows is None else self.rows[0]


GATHERS = {
    "all": Gather(PLANS["odd-overlap"], list(range(20))),
    "some": Gather(PLANS["flush-border"], [3, 19, 0, 7]),
    "repeats": Gather(PLANS["odd-overlap"], [5, 0, 5, 19, 19, 5]),
    "none": Gather(PLANS["odd-overlap"], []),
    "no-channels": Gather(PLANS["no-channels"], [0, 3]),
    "one-pixel": Gather(PLANS["one-pixel"], [0, 0]),
    "width-one": Gather(PLANS["width-one"], [2, 8]),
    "band": Gather(PLANS["odd-overlap"], [6, 10, 14], (3, 11)),
    "wrapped": Gather(PLANS["wrapped"], list(range(12))),
    "wrapped-band": Gather(PLANS["wrapped"], [9, 11, 0], (15, 14)),
    "wider-than-a-block": Gather(PLANS["wider-than-a-tile"], [1, 5]),
}
