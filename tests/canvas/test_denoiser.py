# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import ColourDenoiser, ConvDenoiser

from ssldiff_fast.canvas import (
    CanvasDenoiser,
    GridField,
    ShiftedWindows,
    WindowPlan,
    canvas_noise,
)
from ssldiff_fast.diffusion import Schedule

WINDOW = (8, 8)


def field(rows: int = 4, columns: int = 4, width: int = 3, mode: str = "bilinear") -> GridField:
    cells = canvas_noise(11, rows * columns, 1, width).view(rows, columns, 1, width)
    return GridField(cells, WINDOW, mode)


def plan(stride: int = 4, weights: str = "uniform") -> WindowPlan:
    return WindowPlan.regular(32, 32, WINDOW, stride, weights)


@pytest.mark.parametrize("scale", [1.0, 1.75])
def test_the_canvas_output_is_the_mean_of_guided_window_outputs(scale: float) -> None:
    toy, windows, conditioning = ConvDenoiser(), plan(), field()
    x = canvas_noise(0, 3, 32, 32)
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    tokens = conditioning.at(windows.origins)
    for token, (y, left) in zip(tokens, windows.origins.tolist()):
        crop = x[None, :, y : y + 8, left : left + 8]
        state = (token[None], torch.zeros(1, 1, 3))
        cond, uncond = toy(crop, 300.0, state, torch.tensor([0]))[:, 0]
        total[:, y : y + 8, left : left + 8] += uncond + scale * (cond - uncond)
        count[:, y : y + 8, left : left + 8] += 1
    canvas = CanvasDenoiser(toy, windows, conditioning, guidance_scale=scale)
    torch.testing.assert_close(canvas(x, 300), total / count)


def test_one_window_is_the_network_itself() -> None:
    toy, x = ConvDenoiser(), canvas_noise(0, 3, 8, 8)
    one = WindowPlan.regular(8, 8, WINDOW, 8)
    output = CanvasDenoiser(toy, one, field(1, 1))(x, 10.0)
    expected = toy(x[None], 10.0, (field(1, 1).grid[0], None), torch.tensor([0]))[0, 0]
    torch.testing.assert_close(output, expected)


def test_no_guidance_costs_no_unconditional_evaluation() -> None:
    toy = ColourDenoiser(Schedule())
    CanvasDenoiser(toy, plan(8), field(), guidance_scale=1.0)(canvas_noise(0, 3, 32, 32), 100)
    cond, uncond = toy.prepare(torch.zeros(1, 1, 3), None)
    assert uncond is None
    assert toy(torch.zeros(1, 3, 8, 8), 5, (cond, uncond), torch.tensor([0])).shape[0] == 1


def test_micro_batches_of_a_plan_have_one_shape() -> None:
    toy = ColourDenoiser(Schedule())
    canvas = CanvasDenoiser(toy, plan(4), field(), batch_size=4)  # rows of 7 windows
    canvas(canvas_noise(0, 3, 32, 32), 100)
    assert toy.shapes == [(4, 3, 8, 8)] * 14


def test_a_window_row_is_prepared_once_for_a_fixed_plan_and_anew_for_another() -> None:
    toy, x = ColourDenoiser(Schedule()), canvas_noise(0, 3, 32, 32)
    canvas = CanvasDenoiser(toy, plan(8), field())
    for t in (300, 200, 100):
        canvas(x, t)
    assert toy.prepared == 4
    windows = ShiftedWindows(32, 32, WINDOW, seed=0)
    shifted = CanvasDenoiser(toy, windows, field())
    for step in range(3):
        shifted(x, 100, step=step)
    assert toy.prepared == 4 + sum(len(windows(step).origins_y) for step in range(3))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batch_size_changes_rounding_only(batch_size: int) -> None:
    x = canvas_noise(0, 3, 32, 32)
    some = CanvasDenoiser(ConvDenoiser(), plan(), field(), batch_size=batch_size)(x, 400)
    torch.testing.assert_close(
        some, CanvasDenoiser(ConvDenoiser(), plan(), field(), batch_size=7)(x, 400)
    )


def test_the_canvas_is_left_as_it_was() -> None:
    x = canvas_noise(0, 3, 32, 32)
    before = x.clone()
    output = CanvasDenoiser(ConvDenoiser(), plan(), field())(x, 400)
    assert torch.equal(x, before)
    assert output.dtype == torch.float32


def test_half_precision_outputs_are_averaged_in_float32() -> None:
    class Half(ConvDenoiser):
        def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
            return super().__call__(x, t, state, index).bfloat16()

    x = canvas_noise(0, 3, 32, 32)
    half = CanvasDenoiser(Half(), plan(), field())(x, 400)
    assert half.dtype == torch.float32
    exact = CanvasDenoiser(ConvDenoiser(), plan(), field())(x, 400)
    torch.testing.assert_close(half, exact, rtol=1e-2, atol=1e-2)


def test_a_scheduler_of_diffusers_runs_on_the_canvas() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(3)
    canvas = CanvasDenoiser(ConvDenoiser(), plan(), field(), guidance_scale=1.5)
    x = canvas_noise(0, 3, 32, 32) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(canvas(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    assert x.shape == (3, 32, 32)
    assert bool(torch.isfinite(x).all())


def test_nan_is_reported_with_step_window_and_dtype() -> None:
    class Broken(ConvDenoiser):
        def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
            output = super().__call__(x, t, state, index).half()
            output[0][index == 3] = float("inf")
            return output

    canvas = CanvasDenoiser(Broken(), plan(4), field())
    message = r"NaN or infinite at step 2, in the window with origin \(0, 12\), in float16"
    with pytest.raises(RuntimeError, match=message):
        canvas(canvas_noise(0, 3, 32, 32), 400, step=2)
    with pytest.raises(RuntimeError, match="at t = 400"):
        canvas(canvas_noise(0, 3, 32, 32), 400)


def test_a_model_output_of_another_shape_is_reported() -> None:
    class Wide(ConvDenoiser):
        def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
            return super().__call__(x, t, state, index).repeat(1, 1, 2, 1, 1)

    message = r"at step 0 has shape \[1, 7, 6, 8, 8\], but \[1, 7, 3, 8, 8\]"
    with pytest.raises(RuntimeError, match=message):
        CanvasDenoiser(Wide(), plan(4), field())(canvas_noise(0, 3, 32, 32), 400, step=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CanvasDenoiser(ConvDenoiser(), plan(), field(3, 4)), "field covers 24 x 32.*32 x"),
        (
            lambda: CanvasDenoiser(ConvDenoiser(window=(16, 16)), plan(), field()),
            r"windows are \(8, 8\), but the model denoises windows of \(16, 16\)",
        ),
        (lambda: CanvasDenoiser(ConvDenoiser(), plan(), field(), batch_size=0), "batch_size is 0"),
        (
            lambda: CanvasDenoiser(ConvDenoiser(), plan(), field(), guidance_scale=float("nan")),
            "guidance_scale is nan",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_canvas_of_another_kind_is_refused() -> None:
    canvas = CanvasDenoiser(ConvDenoiser(), plan(), field())
    with pytest.raises(ValueError, match=r"x has shape \[3, 32, 24\]"):
        canvas(canvas_noise(0, 3, 32, 24), 1)
    with pytest.raises(TypeError, match="x is float64"):
        canvas(canvas_noise(0, 3, 32, 32).double(), 1)


def test_moving_windows_ask_for_the_step() -> None:
    canvas = CanvasDenoiser(ConvDenoiser(), ShiftedWindows(32, 32, WINDOW, seed=0), field())
    with pytest.raises(ValueError, match="step is None"):
        canvas(canvas_noise(0, 3, 32, 32), 1)
