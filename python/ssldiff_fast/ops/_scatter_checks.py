# SPDX-License-Identifier: Apache-2.0
"""What scatter_mean asks of its arguments."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import _checks
from .philox_normal import COUNTER_LIMIT, check_seed
from .window_plan import WindowPlan

if TYPE_CHECKING:
    from .scatter_mean import CanvasStep

_CALL = "scatter_mean"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Checked:
    """What the checks found out."""

    rows: tuple[int, int]
    guidance_scale: float  # the one of all windows, if `scale` is None
    scale: Tensor | None  # [M] or [rows, W], with the accumulator's dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which windows of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_scatter(
    windows: Tensor,
    plan: WindowPlan,
    index: Tensor | None,
    rows: tuple[int, int] | None,
    background: Tensor | None,
    uncond: Tensor | None,
    guidance_scale: float | Tensor,
    step: CanvasStep | None,
    *,
    compiled: bool = False,
) -> Checked:
    """All arguments of scatter_mean; `compiled`: of the registered operator, not the reference."""
    check_plan(plan, call=_CALL)
    given = len(plan)
    if index is not None:
        given = _checks.check_shape("index", index, "M", call=_CALL)["M"]
    sizes = {"M": given, "h": plan.window[0], "w": plan.window[1]}
    sizes = _checks.check_shape("windows", windows, "M C h w", sizes, call=_CALL)
    _checks.check_dtype("windows", windows, DTYPES, call=_CALL)
    begin, end = check_rows(rows, plan, call=_CALL)
    sizes |= {"rows": end - begin, "W": plan.width}
    if index is not None:
        check_index(index, plan, call=_CALL)
        if not torch.compiler.is_compiling():
            _check_ascending(index)
            if background is None:
                _check_cover(plan, index.numpy(), (begin, end))
    if background is not None:
        _check_band("background", background, windows, sizes)
        if compiled and background.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{_CALL}: background requires a gradient, but none flows to it; pass "
                "background.detach()."
            )
    number, scale = _check_guidance(windows, uncond, guidance_scale, sizes)
    if step is not None:
        _check_step(step, windows, sizes)
    return Checked((begin, end), number, scale)


def check_plan(plan: WindowPlan, *, call: str) -> None:
    """Raise TypeError unless `plan` is one."""
    if not isinstance(plan, WindowPlan):
        raise TypeError(
            f"{call}: plan is a {type(plan).__name__}, but a WindowPlan was expected; make one "
            "with WindowPlan.regular."
        )


def check_index(index: Tensor, plan: WindowPlan, *, call: str) -> None:
    """Window numbers [N] int64 on the CPU that the plan has."""
    _checks.check_shape("index", index, "N", call=call)
    _checks.check_dtype("index", index, (torch.int64,), call=call)
    if index.device.type != "cpu":
        raise ValueError(
            f"{call}: index is on {index.device}, but the numbers of windows are read on the CPU; "
            "pass index.cpu()."
        )
    if torch.compiler.is_compiling() or index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= len(plan):
        raise ValueError(
            f"{call}: index holds {low if low < 0 else high}, but the plan's windows are numbered "
            f"from 0 to {len(plan) - 1}."
        )


def check_rows(rows: tuple[int, int] | None, plan: WindowPlan, *, call: str) -> tuple[int, int]:
    """(begin, end) of canvas rows, all of them for None."""
    if rows is None:
        return 0, plan.height
    begin, end = rows
    if not 0 <= begin <= end <= plan.height:
        raise ValueError(
            f"{call}: rows is ({begin}, {end}), but canvas rows run from 0 to {plan.height}; pass "
            "(begin, end) between them."
        )
    return int(begin), int(end)


def _check_band(name: str, band: Tensor, windows: Tensor, sizes: dict[str, int]) -> None:
    _checks.check_shape(name, band, "C rows W", sizes, call=_CALL)
    _checks.check_dtype(name, band, (accumulator(windows.dtype),), call=_CALL)
    _checks.check_same_device(_CALL, windows=windows, **{name: band})


def _check_guidance(
    windows: Tensor, uncond: Tensor | None, guidance_scale: Any, sizes: dict[str, int]
) -> tuple[float, Tensor | None]:
    is_tensor = isinstance(guidance_scale, Tensor)
    if uncond is None:
        if is_tensor or guidance_scale != 1.0:
            shown = "a tensor" if is_tensor else repr(guidance_scale)
            raise ValueError(
                f"{_CALL}: guidance_scale is {shown}, but uncond is None; pass the unconditional "
                "outputs too, or leave the scale at 1."
            )
        return 1.0, None
    _checks.check_shape("uncond", uncond, "M C h w", sizes, call=_CALL)
    _checks.check_dtype("uncond", uncond, (windows.dtype,), call=_CALL)
    _checks.check_same_device(_CALL, windows=windows, uncond=uncond)
    if not is_tensor:
        return _checks.check_number("guidance_scale", guidance_scale, call=_CALL), None
    pattern = "M" if guidance_scale.dim() == 1 else "rows W"
    _checks.check_shape("guidance_scale", guidance_scale, pattern, sizes, call=_CALL)
    _checks.check_dtype("guidance_scale", guidance_scale, DTYPES, call=_CALL)
    _checks.check_same_device(_CALL, windows=windows, guidance_scale=guidance_scale)
    if guidance_scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{_CALL}: guidance_scale requires a gradient, but none flows to it; pass "
            "guidance_scale.detach()."
        )
    return 1.0, guidance_scale.to(accumulator(windows.dtype))


def _check_step(step: CanvasStep, windows: Tensor, sizes: dict[str, int]) -> None:
    _check_band("step.canvas", step.canvas, windows, sizes)
    names = ("x", "output", "noise", "history", "denoised_x", "denoised_output")
    for name in names:
        _checks.check_number(f"step.{name}", getattr(step, name), call=_CALL)
    if step.previous is not None:
        _check_band("step.previous", step.previous, windows, sizes)
    elif step.history != 0.0:
        raise ValueError(
            f"{_CALL}: step.previous is None, but step.history is {step.history}; pass the "
            "denoised canvas of the step before."
        )
    check_seed(step.seed, call=_CALL)
    if isinstance(step.step, bool) or not isinstance(step.step, numbers.Integral):
        raise TypeError(f"{_CALL}: step.step is {step.step!r}, but a whole number was expected.")
    if not 0 <= step.step < COUNTER_LIMIT:
        raise ValueError(
            f"{_CALL}: step.step is {step.step}, but the noise's steps count from 0 and end at "
            "2^32 - 1."
        )


def _check_ascending(index: Tensor) -> None:
    steps = index.diff()
    if bool((steps <= 0).any()):
        at = int((steps <= 0).nonzero()[0])
        raise ValueError(
            f"{_CALL}: index holds {int(index[at + 1])} after {int(index[at])}, but window numbers "
            "must ascend; sort them, the windows with them, and drop repeats."
        )


def _check_cover(plan: WindowPlan, index: npt.NDArray[np.int64], rows: tuple[int, int]) -> None:
    """Each pixel of the rows needs a window that is given, with a weight above zero."""
    begin, end = rows
    count = len(plan.origins_x)
    needed = plan.window_rows(begin, end) if begin < end else []
    starts = np.asarray(needed, dtype=np.int64) * count
    first, last = np.searchsorted(index, starts), np.searchsorted(index, starts + count)
    if bool((last - first == count).all()):
        return
    covered = {
        row: _columns_covered(plan, index[first[i] : last[i]] - starts[i])
        for i, row in enumerate(needed)
    }
    weighed = [float(np.float32(weight)) > 0.0 for weight in plan.weight_y]
    seen: set[tuple[int, ...]] = set()
    for y in range(begin, end):
        # The window rows that weigh here: the same for many rows of the canvas.
        here = tuple(
            row
            for row in needed
            if (u := (y - plan.origins_y[row]) % plan.height) < plan.window[0] and weighed[u]
        )
        if here in seen:
            continue
        seen.add(here)
        union = np.zeros(plan.width, dtype=bool)
        for row in here:
            union |= covered[row]
        if not union.all():
            raise ValueError(
                f"{_CALL}: index names no window that covers the pixel ({y}, "
                f"{int(union.argmin())}); pass more windows, or a background."
            )


def _columns_covered(plan: WindowPlan, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """[W]: where the windows in these columns of a window row weigh."""
    weighed = np.flatnonzero(np.asarray(plan.weight_x, dtype=np.float32) > 0.0)
    breaks = np.flatnonzero(np.diff(weighed) > 1)
    runs = zip(weighed[np.r_[0, breaks + 1]], weighed[np.r_[breaks, -1]] + 1)
    origins = np.asarray(plan.origins_x, dtype=np.int64)[columns]
    changes = np.zeros(2 * plan.width + 1, dtype=np.int64)  # twice round, for those that wrap
    for start, stop in runs:
        np.add.at(changes, origins + start, 1)
        np.add.at(changes, origins + stop, -1)
    twice = np.cumsum(changes[:-1]) > 0
    return twice[: plan.width] | twice[plan.width :]
