# SPDX-License-Identifier: Apache-2.0
"""Windows to their weighted mean on the canvas (Eq. 6 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C, _checks
from ._register import register
from .window_plan import WindowPlan

_CALL = "scatter_mean"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def scatter_mean(
    windows: Tensor,  # [P * Q, C, h, w] fp32 | bf16 | fp16 | fp64
    plan: WindowPlan,
) -> Tensor:  # [C, H, W] fp32 (fp64 for fp64)
    r"""Weighted mean of overlapping windows on the canvas.

    With the plan's origins and its weights `w(u, v) = weight_y[u] weight_x[v]`,

        out(y, x) = sum_k w(y - y_k, x - x_k) windows_k(y - y_k, x - x_k)
                    / sum_k w(y - y_k, x - x_k)                                         (Eq. 6)

    over the windows k that cover (y, x). Each pixel of the canvas gathers its windows in row-major
    order of their origins, in float32 (float64 for float64): no atomics, and the same bits for
    every thread count and, on a CPU, for every instruction set.

    Contiguous and channels-last windows are read where they lie; other strides are copied first.
    A NaN in a window reaches the pixels that this window covers, and no others. Gradients flow to
    `windows` only.

    Args:
        windows: all windows of the plan, in its order.
        plan: the canvas, the windows' origins and their weights.

    Returns:
        The canvas [C, H, W].

    Raises:
        TypeError: a tensor of another dtype, or no tensor.
        ValueError: shapes that disagree.
        RuntimeError: the compiled operators are missing.
    """
    _check(windows, plan)
    _C.require(_CALL)
    return torch.ops.ssldiff.scatter_mean(windows, *_arguments(plan))


def scatter_mean_reference(
    windows: Tensor,  # [P * Q, C, h, w]
    plan: WindowPlan,
) -> Tensor:  # [C, H, W]
    """The same in plain PyTorch: the loop that every backend is tested against."""
    _check(windows, plan)
    _, channels, h, w = windows.shape
    dtype = _accumulator(windows.dtype)
    a = torch.tensor(plan.weight_y, dtype=dtype, device=windows.device)
    b = torch.tensor(plan.weight_x, dtype=dtype, device=windows.device)
    weight = a[:, None] * b  # [h, w]
    total = torch.zeros(channels, plan.height, plan.width, dtype=dtype, device=windows.device)
    norm = torch.zeros(plan.height, plan.width, dtype=dtype, device=windows.device)
    for window, (y, x) in zip(windows.to(dtype), plan.origins.tolist()):
        total[:, y : y + h, x : x + w] += weight * window
        norm[y : y + h, x : x + w] += weight
    return total / norm


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _arguments(plan: WindowPlan) -> tuple[Any, ...]:
    """What the registered operator takes of a plan."""
    return (
        plan.origins_y,
        plan.origins_x,
        plan.weight_y,
        plan.weight_x,
        plan.height,
        plan.width,
    )


def _check(windows: Tensor, plan: WindowPlan) -> None:
    if not isinstance(plan, WindowPlan):
        raise TypeError(
            f"{_CALL}: plan is a {type(plan).__name__}, but a WindowPlan was expected; make one "
            "with WindowPlan.regular."
        )
    if any(plan.wrap):
        raise ValueError(f"{_CALL}: plan wraps around the canvas, which needs a later version.")
    h, w = plan.window
    _checks.check_shape("windows", windows, "N C h w", {"N": len(plan), "h": h, "w": w}, call=_CALL)
    _checks.check_dtype("windows", windows, _DTYPES, call=_CALL)


def _fake(
    windows: Tensor,
    origins_y: list[int],
    origins_x: list[int],
    weight_y: list[float],
    weight_x: list[float],
    height: int,
    width: int,
) -> Tensor:
    shape = (windows.shape[1], height, width)
    return windows.new_empty(shape, dtype=_accumulator(windows.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    windows, *ctx.plan, ctx.height, ctx.width = inputs
    ctx.dtype = windows.dtype
    ctx.window = windows.shape[-2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: [C, H, W]
    """The mean is linear in the windows: each gathers the gradient under it, times its share."""
    ys, xs, wy, wx = ctx.plan
    h, w = ctx.window
    rows = _axis_shares(ys, wy, ctx.height, grad)  # [P, h]
    columns = _axis_shares(xs, wx, ctx.width, grad)  # [Q, w]
    index_y = torch.tensor(ys, device=grad.device)[:, None] + torch.arange(h, device=grad.device)
    index_x = torch.tensor(xs, device=grad.device)[:, None] + torch.arange(w, device=grad.device)
    gathered = grad[:, index_y][:, :, :, index_x]  # [C, P, h, Q, w]
    shares = rows[:, :, None, None] * columns
    grad_windows = (gathered * shares).permute(1, 3, 0, 2, 4).flatten(0, 1).to(ctx.dtype)
    # origins_y, origins_x, weight_y, weight_x, height, width
    return grad_windows, None, None, None, None, None, None


def _axis_shares(origins: list[int], weight: list[float], size: int, like: Tensor) -> Tensor:
    """weight(u) / sum of the weights at that position, for each window of one axis."""
    a = torch.tensor(weight, dtype=like.dtype, device=like.device)
    norm = torch.zeros(size, dtype=like.dtype, device=like.device)
    for origin in origins:
        norm[origin : origin + len(weight)] += a
    return torch.stack([a / norm[origin : origin + len(weight)] for origin in origins])


def _triton(*arguments: Any) -> Tensor:
    from ..kernels.scatter_mean import scatter_mean as kernel

    return kernel(*arguments)


register(_CALL, fake=_fake, triton=_triton, setup_context=_setup_context, backward=_backward)
