# SPDX-License-Identifier: Apache-2.0
"""Windows to their weighted mean on the canvas (Eq. 6 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C, _checks
from ._register import register

_CALL = "scatter_mean"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def scatter_mean(
    windows: Tensor,  # [P * Q, C, h, w] fp32 | bf16 | fp16 | fp64
    origins_y: Sequence[int] | Tensor,  # [P], ascending
    origins_x: Sequence[int] | Tensor,  # [Q], ascending
    weight_y: Sequence[float] | Tensor,  # [h]
    weight_x: Sequence[float] | Tensor,  # [w]
    *,
    height: int,
    width: int,
) -> Tensor:  # [C, H, W] fp32 (fp64 for fp64)
    r"""Weighted mean of overlapping windows on the canvas.

    With the windows' origins on the separable lattice `origins_y` x `origins_x` and weights
    `w(u, v) = weight_y[u] weight_x[v]`,

        out(y, x) = sum_k w(y - y_k, x - x_k) windows_k(y - y_k, x - x_k)
                    / sum_k w(y - y_k, x - x_k)                                         (Eq. 6)

    over the windows k that cover (y, x). Each pixel of the canvas gathers its windows in row-major
    order of their origins, in float32 (float64 for float64): no atomics, and the same bits for
    every thread count and, on a CPU, for every instruction set.

    Contiguous and channels-last windows are read where they lie; other strides are copied first.
    A NaN in a window reaches the pixels that this window covers, and no others. Gradients flow to
    `windows` only. Under `torch.compile` pass origins and weights as tuples: a tensor's values are
    not known while a graph is made.

    Args:
        windows: the windows, row-major over the lattice.
        origins_y: the lattice's rows, in latents; the first is 0, the last is `height - h`.
        origins_x: the lattice's columns, in latents; the first is 0, the last is `width - w`.
        weight_y: weight of each row of a window, finite and not negative.
        weight_x: weight of each column of a window, finite and not negative.
        height: rows of the canvas, in latents.
        width: columns of the canvas, in latents.

    Returns:
        The canvas [C, height, width].

    Raises:
        TypeError: a tensor of another dtype, or no tensor.
        ValueError: shapes that disagree, a window larger than the canvas, origins that leave it or
            leave a pixel uncovered, weights that are zero everywhere on some pixel.
        RuntimeError: the compiled operators are missing.
    """
    plan = _check(windows, origins_y, origins_x, weight_y, weight_x, height, width)
    _C.require(_CALL)
    return torch.ops.ssldiff.scatter_mean(windows, *plan, height, width)


def scatter_mean_reference(
    windows: Tensor,  # [P * Q, C, h, w]
    origins_y: Sequence[int] | Tensor,  # [P]
    origins_x: Sequence[int] | Tensor,  # [Q]
    weight_y: Sequence[float] | Tensor,  # [h]
    weight_x: Sequence[float] | Tensor,  # [w]
    *,
    height: int,
    width: int,
) -> Tensor:  # [C, H, W]
    """The same in plain PyTorch: the loop that every backend is tested against."""
    ys, xs, wy, wx = _check(windows, origins_y, origins_x, weight_y, weight_x, height, width)
    _, channels, h, w = windows.shape
    dtype = _accumulator(windows.dtype)
    a = torch.tensor(wy, dtype=dtype, device=windows.device)
    b = torch.tensor(wx, dtype=dtype, device=windows.device)
    weight = a[:, None] * b  # [h, w]
    total = torch.zeros(channels, height, width, dtype=dtype, device=windows.device)
    norm = torch.zeros(height, width, dtype=dtype, device=windows.device)
    origins = [(y, x) for y in ys for x in xs]
    for window, (y, x) in zip(windows.to(dtype), origins):
        total[:, y : y + h, x : x + w] += weight * window
        norm[y : y + h, x : x + w] += weight
    return total / norm


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(
    windows: Tensor,
    origins_y: Sequence[int] | Tensor,
    origins_x: Sequence[int] | Tensor,
    weight_y: Sequence[float] | Tensor,
    weight_x: Sequence[float] | Tensor,
    height: int,
    width: int,
) -> tuple[list[int], list[int], list[float], list[float]]:
    _checks.check_shape("windows", windows, "N C h w", call=_CALL)
    _checks.check_dtype("windows", windows, _DTYPES, call=_CALL)
    ys = _values("origins_y", origins_y, whole=True)
    xs = _values("origins_x", origins_x, whole=True)
    wy = _values("weight_y", weight_y)
    wx = _values("weight_x", weight_x)
    count, _, h, w = windows.shape
    if count != len(ys) * len(xs):
        raise ValueError(
            f"{_CALL}: windows holds {count} windows, but origins_y x origins_x gives "
            f"{len(ys)} x {len(xs)} = {len(ys) * len(xs)}; pass one window for each origin."
        )
    _check_axis("y", ys, wy, h, "height", height)
    _check_axis("x", xs, wx, w, "width", width)
    return ys, xs, wy, wx


def _values(name: str, values: Any, *, whole: bool = False) -> list[Any]:
    """A list of Python numbers from a sequence or a tensor of one dimension."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or (whole and (values.is_floating_point() or values.is_complex())):
            kind = "whole numbers" if whole else "numbers"
            raise ValueError(
                f"{_CALL}: {name} is a {str(values.dtype).removeprefix('torch.')} tensor of shape "
                f"{list(values.shape)}, but one dimension of {kind} was expected."
            )
        values = values.tolist()
    return [int(v) for v in values] if whole else [float(v) for v in values]


def _check_axis(
    axis: str, origins: list[int], weight: list[float], window: int, size_name: str, size: int
) -> None:
    if window < 1 or window > size:
        raise ValueError(
            f"{_CALL}: {size_name} is {size}, but windows are {window} latents along {axis}; the "
            f"canvas must be at least one window and the window at least 1."
        )
    if len(weight) != window:
        raise ValueError(
            f"{_CALL}: weight_{axis} has {len(weight)} entries, but windows are {window} latents "
            f"along {axis}; pass one weight for each."
        )
    covered = 0
    previous = -1
    for origin in origins:
        if origin < 0 or origin > size - window:
            raise ValueError(
                f"{_CALL}: origins_{axis} holds {origin}, but a window of {window} fits on "
                f"{size_name} {size} from 0 to {size - window} only."
            )
        if origin <= previous:
            raise ValueError(
                f"{_CALL}: origins_{axis} holds {origin} after {previous}, but origins must "
                f"ascend; sort them and drop repeats."
            )
        if origin > covered:
            break
        previous = origin
        covered = origin + window
    if covered != size:
        raise ValueError(
            f"{_CALL}: origins_{axis} leaves position {covered} of {size_name} {size} without a "
            f"window; every position must be covered."
        )
    _check_weight(axis, origins, weight, size)


def _check_weight(axis: str, origins: list[int], weight: list[float], size: int) -> None:
    for value in weight:
        if not math.isfinite(value) or value < 0:
            raise ValueError(
                f"{_CALL}: weight_{axis} holds {value}, but weights must be finite and not "
                f"negative."
            )
    if min(weight) > 0:
        return
    positive = [False] * size
    for origin in origins:
        for u, value in enumerate(weight):
            positive[origin + u] |= value > 0
    if not all(positive):
        raise ValueError(
            f"{_CALL}: weight_{axis} sums to zero at position {positive.index(False)}; every "
            f"position needs a window with a weight above zero."
        )


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
