# SPDX-License-Identifier: Apache-2.0
"""Windows to their weighted mean on the canvas (Eq. 6 of the paper), guided and stepped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ._register import register
from ._scatter_checks import Checked, accumulator, check_scatter
from .window_plan import WindowPlan

_CALL = "scatter_mean"


@dataclass(frozen=True)
class CanvasStep:
    """An affine solver step of the canvas, taken where the mean of the windows is made.

    With the mean m of the (guided) model outputs and fresh noise z at (channel, y, x, step),

        next     = x canvas + output m + history previous + noise z
        denoised = denoised_x canvas + denoised_output m

    which are the coefficients of `diffusion.AffineStep`, and rounded in the same order.

    Args:
        canvas: [C, rows, W] fp32 (fp64 with fp64 windows), the rows made, before the step.
        x: Coefficient of the canvas.
        output: Coefficient of the model output.
        noise: Coefficient of fresh noise; 0 means that none is drawn.
        history: Coefficient of the previous step's denoised canvas; 0 means that it is not read.
        previous: [C, rows, W], the previous step's denoised canvas.
        denoised_x: Coefficient of the canvas in the denoised canvas.
        denoised_output: Coefficient of the model output there; with both 0 it is not made.
        seed: Of the noise, 0 to 2^64 - 1.
        step: Of the noise's counter, 0 to 2^32 - 1; see `philox_normal`.
    """

    canvas: Tensor  # [C, rows, W] fp32
    x: float
    output: float
    noise: float = 0.0
    history: float = 0.0
    previous: Tensor | None = None  # [C, rows, W] fp32
    denoised_x: float = 0.0
    denoised_output: float = 0.0
    seed: int = 0
    step: int = 0

    @property
    def coefficients(self) -> list[float]:
        """In the order of the registered operator."""
        own = (self.x, self.output, self.noise, self.history)
        return [float(value) for value in (*own, self.denoised_x, self.denoised_output)]

    @property
    def makes_denoised(self) -> bool:
        """Whether the denoised canvas is a second result."""
        return self.denoised_x != 0.0 or self.denoised_output != 0.0


def scatter_mean(
    windows: Tensor,  # [M, C, h, w] fp32 | bf16 | fp16 | fp64
    plan: WindowPlan,
    index: Tensor | None = None,  # [M] int64
    *,
    rows: tuple[int, int] | None = None,
    background: Tensor | None = None,  # [C, rows, W] fp32 (fp64 for fp64)
    uncond: Tensor | None = None,  # [M, C, h, w] as windows
    guidance_scale: float | Tensor = 1.0,  # [M] or [rows, W], floating point
    step: CanvasStep | None = None,
) -> Any:  # [C, rows, W] fp32 (fp64 for fp64); two of them with a step's denoised canvas
    r"""Weighted mean of overlapping windows on the canvas.

    With the plan's origins and its weights `w(u, v) = weight_y[u] weight_x[v]`,

        out(y, x) = sum_k w(y - y_k, x - x_k) windows_k(y - y_k, x - x_k)
                    / sum_k w(y - y_k, x - x_k)                                         (Eq. 6)

    over the windows k that cover (y, x); along an axis that wraps, positions count modulo its size.
    Each pixel of the canvas gathers its windows in row-major order of their origins (one that
    covers it past the border counts there with its origin less the canvas's size), in float32
    (float64 for float64): no atomics, and the same bits for every split into bands of `rows` and
    every thread count and, on a CPU, for every instruction set.

    In the same pass, nothing in between written to memory: guidance, which replaces each window
    by `uncond + guidance_scale (windows - uncond)`, and an affine solver step (`CanvasStep`).

    Contiguous and channels-last windows are read where they lie; other strides are copied first.
    A NaN in a window reaches the pixels that this window covers, and no others; one in
    `background` those where a window was left out. Gradients flow to `windows`, `uncond` and the
    step's `canvas` and `previous`. Under `torch.compile` the values of `index` are not known, so
    that a pixel which no window covers becomes NaN instead of an error.

    Args:
        windows: The windows of the plan in its order, or those that `index` names.
        plan: The canvas, the windows' origins and their weights.
        index: Ascending numbers of the windows given, on the CPU; None for all of the plan.
        rows: (begin, end) of the canvas rows to make, None for all. Windows that do not cover them
            may be given or not.
        background: What the windows that `index` leaves out would hold: they count with their
            weights. Without it they do not count, and each pixel needs a window that is given.
        uncond: The unconditional half of guidance.
        guidance_scale: One scale, one for each window, or one for each pixel of the rows made.
        step: The solver step to take; without it the mean itself is returned.

    Returns:
        The canvas rows [C, rows, W]: the mean, or the next canvas. With a step that has a
        coefficient for the denoised canvas, the pair of both.

    Raises:
        TypeError: a tensor of another dtype, no tensor, no plan, a number that is none.
        ValueError: shapes or devices that disagree, window numbers that do not ascend or that the
            plan does not have, rows beyond the canvas, a pixel that no window given covers, a scale
            without `uncond`, a coefficient that is not finite, a seed or a step beyond its range.
        RuntimeError: the compiled operators are missing.
    """
    checked = check_scatter(
        windows, plan, index, rows, background, uncond, guidance_scale, step, compiled=True
    )
    arguments = _arguments(windows, plan, index, background, uncond, checked)
    _C.require(_CALL)
    if step is None:
        return torch.ops.ssldiff.scatter_mean(*arguments, True)
    made, denoised = torch.ops.ssldiff.scatter_mean_step(
        windows,
        step.canvas,
        step.previous,
        *arguments[1:],
        step.coefficients,
        step.seed - 2**64 if step.seed >= 2**63 else step.seed,
        step.step,
    )
    return (made, denoised) if step.makes_denoised else made


def scatter_mean_reference(
    windows: Tensor,  # [M, C, h, w]
    plan: WindowPlan,
    index: Tensor | None = None,  # [M] int64
    *,
    rows: tuple[int, int] | None = None,
    background: Tensor | None = None,  # [C, rows, W]
    uncond: Tensor | None = None,  # [M, C, h, w]
    guidance_scale: float | Tensor = 1.0,  # [M] or [rows, W]
    step: CanvasStep | None = None,
) -> Any:  # [C, rows, W], or two of them
    """The same in plain PyTorch: the loop that every backend is tested against."""
    checked = check_scatter(windows, plan, index, rows, background, uncond, guidance_scale, step)
    begin, end = checked.rows
    dtype, device, (h, w) = accumulator(windows.dtype), windows.device, plan.window
    numbers = range(len(plan)) if index is None else index.tolist()
    held = dict(zip(numbers, range(len(numbers))))
    a, b = (torch.tensor(v, dtype=dtype, device=device) for v in (plan.weight_y, plan.weight_x))
    total = torch.zeros(windows.shape[1], end - begin, plan.width, dtype=dtype, device=device)
    norm = torch.zeros(end - begin, plan.width, dtype=dtype, device=device)
    for number, (y, x) in enumerate(plan.origins.tolist()):
        if number not in held and background is None:
            continue
        ys = (torch.arange(y, y + h, device=device) % plan.height) - begin
        inside = (ys >= 0) & (ys < end - begin)
        area = (ys[inside, None], (torch.arange(x, x + w, device=device) % plan.width)[None])
        weight = (a[:, None] * b)[inside]
        if number not in held:
            assert background is not None
            value = background[:, area[0], area[1]]
        else:
            slot = held[number]
            value = windows[slot].to(dtype)[:, inside]
            if uncond is not None:
                free = uncond[slot].to(dtype)[:, inside]
                value = free + _scale_at(checked, guidance_scale, slot, area) * (value - free)
        total[:, area[0], area[1]] += weight * value
        norm[area] += weight
    mean = total / norm
    return mean if step is None else _step_reference(step, mean, begin)


def _scale_at(
    checked: Checked, guidance_scale: float | Tensor, slot: int, area: tuple[Tensor, Tensor]
) -> Any:
    if checked.scale is None:
        return guidance_scale
    return checked.scale[slot] if checked.scale.dim() == 1 else checked.scale[area]


def _step_reference(step: CanvasStep, mean: Tensor, begin: int) -> Any:
    from .philox_normal import philox_normal_reference

    channels, height, width = mean.shape
    made = step.x * step.canvas + step.output * mean
    if step.history:
        assert step.previous is not None
        made = made + step.history * step.previous
    if step.noise:
        rows = (begin, begin + height)
        drawn = philox_normal_reference(step.seed, channels, rows, width, step=step.step)
        made = made + step.noise * drawn.to(mean)
    if not step.makes_denoised:
        return made
    return made, step.denoised_x * step.canvas + step.denoised_output * mean


def _arguments(
    windows: Tensor,
    plan: WindowPlan,
    index: Tensor | None,
    background: Tensor | None,
    uncond: Tensor | None,
    checked: Checked,
) -> tuple[Any, ...]:
    """What both registered operators take, but for the step."""
    geometry = [plan.height, plan.width, int(plan.wrap[0]), int(plan.wrap[1]), *checked.rows]
    axes = (plan.origins_y, plan.origins_x, plan.weight_y, plan.weight_x)
    # With nothing left out there is no place for the background.
    background = None if index is None else background
    number = 1.0 if checked.scale is not None else checked.guidance_scale
    return windows, index, uncond, checked.scale, background, *axes, geometry, number


def _fake(windows: Tensor, *others: Any) -> Tensor:
    geometry = others[8]
    shape = (windows.shape[1], geometry[5] - geometry[4], geometry[1])
    return windows.new_empty(shape, dtype=accumulator(windows.dtype))


def _fake_step(
    windows: Tensor, canvas: Tensor, previous: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    geometry, coefficients = others[8], others[10]
    made = _fake(windows, *others)
    wanted = coefficients[4] != 0.0 or coefficients[5] != 0.0
    channels = made.shape[0] if wanted else 0
    return made, made.new_empty(channels, geometry[5] - geometry[4], geometry[1])


def _save(ctx: Any, windows: Tensor, others: tuple[Any, ...]) -> None:
    """Of the arguments after `windows` those that the gradient needs."""
    index, uncond, scale, background, *ctx.axes, ctx.geometry, ctx.guidance_scale = others
    ctx.windows = (windows.shape, windows.dtype)
    ctx.is_guided, ctx.has_background = uncond is not None, background is not None
    ctx.save_for_backward(index, scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    windows, *others, ctx.normalise = inputs
    _save(ctx, windows, tuple(others))


def _setup_context_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    windows, _, _, *others, ctx.coefficients, _, _ = inputs
    ctx.normalise = True
    _save(ctx, windows, tuple(others))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: [C, rows, W]
    grad_windows, grad_uncond = _window_gradients(ctx, grad)
    # index; then scale, background, the four of the axes, geometry, guidance_scale, normalise
    return grad_windows, None, grad_uncond, *(None,) * 9


def _backward_step(
    ctx: Any,
    grad: Tensor,  # [C, rows, W]
    grad_denoised: Tensor,  # [C, rows, W], or empty where that is not made
) -> tuple[Tensor | None, ...]:
    x, output, _, history, denoised_x, denoised_output = ctx.coefficients
    grad_mean, grad_canvas = output * grad, x * grad
    if denoised_x or denoised_output:
        grad_mean = grad_mean + denoised_output * grad_denoised
        grad_canvas = grad_canvas + denoised_x * grad_denoised
    # The second of the inputs is the canvas, the third the previous denoised canvas.
    grad_previous = history * grad if ctx.needs_input_grad[2] else None
    grad_windows, grad_uncond = _window_gradients(ctx, grad_mean)
    # index; then scale, background, the four of the axes, geometry, guidance_scale, coefficients,
    # seed, step
    return grad_windows, grad_canvas, grad_previous, None, grad_uncond, *(None,) * 11


def _window_gradients(
    ctx: Any,
    grad: Tensor,  # [C, rows, W], of the mean
) -> tuple[Tensor, Tensor | None]:
    """The mean is linear in the windows: each gathers the gradient under it, times its share."""
    index, scale = ctx.saved_tensors
    (count, _, h, w), dtype = ctx.windows
    origins_y, origins_x, weight_y, weight_x = ctx.axes
    height, width, wrap_y, wrap_x, begin, end = ctx.geometry
    if ctx.normalise:
        # The sum of the weights is what windows of ones sum to; with a background all of them.
        given = None if ctx.has_background else index
        ones = grad.new_ones(1, 1, h, w)
        ones = ones.expand(len(origins_y) * len(origins_x) if given is None else count, 1, h, w)
        norm = torch.ops.ssldiff.scatter_mean(
            ones, given, None, None, None, *ctx.axes, ctx.geometry, 1.0, False
        )
        grad = grad / norm
    weight = grad.new_tensor(weight_y)[:, None] * grad.new_tensor(weight_x)
    numbers = torch.arange(count) if index is None else index

    def gathered(share: Tensor) -> Tensor:  # [C, rows, W]
        whole = torch.nn.functional.pad(share, (0, 0, begin, height - end))
        geometry = [height, width, wrap_y, wrap_x, h, w, 0]
        return weight * torch.ops.ssldiff.gather_windows(
            whole, numbers, origins_y, origins_x, geometry, grad.dtype, False
        )

    if not ctx.is_guided:
        return gathered(grad).to(dtype), None
    if scale is not None and scale.dim() == 2:
        return gathered(scale * grad).to(dtype), gathered((1.0 - scale) * grad).to(dtype)
    share = ctx.guidance_scale if scale is None else scale.view(-1, 1, 1, 1)
    taken = gathered(grad)
    return (share * taken).to(dtype), ((1.0 - share) * taken).to(dtype)


def _triton(*arguments: Any) -> Tensor:
    from ..kernels.scatter_mean import scatter_mean as kernel

    return kernel(*arguments)


def _triton_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.scatter_mean import scatter_mean_step as kernel

    return kernel(*arguments)


register(_CALL, fake=_fake, triton=_triton, setup_context=_setup_context, backward=_backward)
register(
    "scatter_mean_step",
    fake=_fake_step,
    triton=_triton_step,
    setup_context=_setup_context_step,
    backward=_backward_step,
)
