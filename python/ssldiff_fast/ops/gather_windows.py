# SPDX-License-Identifier: Apache-2.0
"""Windows cut from the canvas, in the layout and dtype that a network wants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C, _checks
from ._register import register
from ._scatter_checks import DTYPES, accumulator, check_index, check_plan
from .window_plan import WindowPlan

_CALL = "gather_windows"
_LAYOUTS = (torch.contiguous_format, torch.channels_last)


def gather_windows(
    canvas: Tensor,  # [C, n, W] fp32 | bf16 | fp16 | fp64
    plan: WindowPlan,
    index: Tensor,  # [N] int64
    *,
    first_row: int = 0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:  # [N, C, h, w] of `dtype`
    r"""The windows of the canvas that `index` names.

        out(n, c, u, v) = canvas(c, y_n + u - first_row, x_n + v)

    with (y_n, x_n) the origin of window `index[n]`; along an axis that wraps, positions count
    modulo its size. Values are cast on the way, to the nearest, ties to even. A window may be named
    more than once and in any order. Gradients flow to `canvas`: each pixel sums those of its
    windows in row-major order of their origins, in float32 (float64 for float64).

    Args:
        canvas: Rows `first_row` to `first_row + n - 1` of the plan's canvas, all that the windows
            need; where the plan wraps along y these rows may run over the end of the canvas. Rows
            of contiguous values are read where they lie.
        plan: The canvas and the windows' origins.
        index: Numbers of windows, on the CPU.
        first_row: The canvas row that is first in `canvas`.
        dtype: Of the windows; None for that of the canvas.
        memory_format: `torch.contiguous_format` or `torch.channels_last`.

    Returns:
        The windows [N, C, h, w].

    Raises:
        TypeError: a tensor or a dtype of another kind, no plan.
        ValueError: shapes that disagree, window numbers that the plan does not have, windows that
            need rows which were not given, another memory format.
        RuntimeError: the compiled operators are missing.
    """
    _check(canvas, plan, index, first_row, dtype, memory_format)
    _C.require(_CALL)
    return torch.ops.ssldiff.gather_windows(
        canvas,
        index.contiguous(),
        plan.origins_y,
        plan.origins_x,
        [plan.height, plan.width, int(plan.wrap[0]), int(plan.wrap[1]), *plan.window, first_row],
        dtype or canvas.dtype,
        memory_format == torch.channels_last,
    )


def gather_windows_reference(
    canvas: Tensor,  # [C, n, W]
    plan: WindowPlan,
    index: Tensor,  # [N] int64
    *,
    first_row: int = 0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:  # [N, C, h, w]
    """The same in plain PyTorch."""
    _check(canvas, plan, index, first_row, dtype, memory_format)
    (h, w), device = plan.window, canvas.device
    crops = [canvas.new_empty(0, canvas.shape[0], h, w)]
    for y, x in plan.origins_of(index).tolist():
        ys = (torch.arange(y, y + h, device=device) - first_row) % plan.height
        xs = torch.arange(x, x + w, device=device) % plan.width
        crops.append(canvas[:, ys[:, None], xs][None])
    made = torch.cat(crops).to(dtype or canvas.dtype)
    return made.contiguous(memory_format=memory_format)


def _check(
    canvas: Tensor,
    plan: WindowPlan,
    index: Tensor,
    first_row: int,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
) -> None:
    check_plan(plan, call=_CALL)
    sizes = _checks.check_shape("canvas", canvas, "C n W", {"W": plan.width}, call=_CALL)
    _checks.check_dtype("canvas", canvas, DTYPES, call=_CALL)
    check_index(index, plan, call=_CALL)
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(
            f"{_CALL}: dtype is {dtype}, but float32, bfloat16, float16 or float64 was expected."
        )
    if memory_format not in _LAYOUTS:
        raise ValueError(
            f"{_CALL}: memory_format is {memory_format}, but torch.contiguous_format or "
            "torch.channels_last was expected."
        )
    if not (0 <= first_row < plan.height and sizes["n"] <= plan.height):
        raise ValueError(
            f"{_CALL}: canvas holds {sizes['n']} rows from first_row {first_row}, but the plan's "
            f"canvas has rows 0 to {plan.height - 1}."
        )
    if not torch.compiler.is_compiling():
        _check_rows(plan, index, first_row, sizes["n"])


def _check_rows(plan: WindowPlan, index: Tensor, first_row: int, count: int) -> None:
    wraps = plan.wrap[0]
    if count == plan.height and (wraps or first_row == 0):
        return
    for row in sorted(set((index // len(plan.origins_x)).tolist())):
        first = plan.origins_y[row] - first_row
        if wraps:
            first %= plan.height
        if first < 0 or first + plan.window[0] > count:
            begin = plan.origins_y[row]
            raise ValueError(
                f"{_CALL}: index names a window of the canvas rows {begin} to "
                f"{begin + plan.window[0] - 1}, but canvas holds {first_row} to "
                f"{first_row + count - 1}; pass every row that the windows need."
            )


def _fake(
    canvas: Tensor,
    index: Tensor,
    origins_y: list[int],
    origins_x: list[int],
    geometry: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    shape = (index.shape[0], canvas.shape[0], geometry[4], geometry[5])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=canvas.device, memory_format=layout)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    canvas, index, *ctx.axes, ctx.geometry, _, _ = inputs
    ctx.rows, ctx.dtype = canvas.shape[1], canvas.dtype
    ctx.save_for_backward(index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: [N, C, h, w]
    (index,) = ctx.saved_tensors
    summed = torch.ops.ssldiff.gather_windows_backward(
        grad, index, *ctx.axes, ctx.geometry, ctx.rows
    )
    # index, origins_y, origins_x, geometry, dtype, channels_last
    return summed.to(ctx.dtype), None, None, None, None, None, None


def _triton(*arguments: Any) -> Tensor:
    from ..kernels.gather_windows import gather_windows as kernel

    return kernel(*arguments)


@torch.library.custom_op("ssldiff::gather_windows_backward", mutates_args=())
def _sum_windows(
    grad: Tensor,  # [N, C, h, w]
    index: Tensor,  # [N] int64
    origins_y: list[int],
    origins_x: list[int],
    geometry: list[int],
    rows: int,
) -> Tensor:  # [C, rows, W] fp32 (fp64 for fp64)
    """Each pixel sums its windows, as scatter_mean does before it divides.

    An operator of its own, since what it does depends on the values of `index`.
    """
    height, width, wrap_y, wrap_x, h, w, first_row = geometry
    numbers, slots = index.unique(return_inverse=True)
    once = grad.new_zeros(len(numbers), *grad.shape[1:], dtype=accumulator(grad.dtype))
    # A window that is named more than once sums its gradients in the order in which it is named.
    left = torch.arange(len(index))
    while len(left):
        place = torch.full((len(numbers),), len(index)).scatter_reduce_(
            0, slots[left], left, "amin", include_self=True
        )
        first = place[place < len(index)]
        there = slots[first].to(grad.device)
        once[there] += grad[first.to(grad.device)].to(once.dtype)
        left = left[~torch.isin(left, first)]
    # Rows that run over the end of the canvas are summed on the whole of it.
    whole = first_row + rows > height
    band = (0, height) if whole else (first_row, first_row + rows)
    summed = torch.ops.ssldiff.scatter_mean(
        once,
        numbers,
        None,
        None,
        None,
        origins_y,
        origins_x,
        [1.0] * h,
        [1.0] * w,
        [height, width, wrap_y, wrap_x, *band],
        1.0,
        False,
    )
    return summed.roll(-first_row, 1)[:, :rows].contiguous() if whole else summed


@_sum_windows.register_fake
def _fake_sum(
    grad: Tensor,
    index: Tensor,
    origins_y: list[int],
    origins_x: list[int],
    geometry: list[int],
    rows: int,
) -> Tensor:
    return grad.new_empty(grad.shape[1], rows, geometry[1], dtype=accumulator(grad.dtype))


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, index, *ctx.axes, ctx.geometry, _ = inputs
    ctx.dtype = grad.dtype
    ctx.save_for_backward(index)


def _backward_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: [C, rows, W]
    (index,) = ctx.saved_tensors
    taken = torch.ops.ssldiff.gather_windows(grad, index, *ctx.axes, ctx.geometry, ctx.dtype, False)
    # index, origins_y, origins_x, geometry, rows
    return taken, None, None, None, None, None


_sum_windows.register_autograd(_backward_sum, setup_context=_setup_sum)
register(
    _CALL,
    fake=_fake,
    triton=_triton,
    setup_context=_setup_context,
    backward=_backward,
    cuda_sources=False,
)
