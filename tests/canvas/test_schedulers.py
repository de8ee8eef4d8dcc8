# SPDX-License-Identifier: Apache-2.0
"""The canvas as a drop-in for the network, and our loop beside diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import ConvDenoiser

from ssldiff_fast.canvas import CanvasDenoiser, GridField, WindowPlan, canvas_noise, sample
from ssldiff_fast.diffusion import Schedule

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WINDOW = (8, 8)
SCHEDULE = Schedule(beta_start=0.00085, beta_end=0.012)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
]


def field(rows: int, columns: int) -> GridField:
    cells = canvas_noise(3, rows * columns, 1, 3).view(rows, columns, 1, 3)
    return GridField(cells, WINDOW)


def on_canvas(height: int, width: int, prediction: str = "eps") -> CanvasDenoiser:
    plan = WindowPlan.regular(height, width, WINDOW, 4)
    cells = field(height // 8, width // 8)
    return CanvasDenoiser(ConvDenoiser(prediction=prediction), plan, cells, guidance_scale=1.5)


def scheduler(name: str, prediction: str = "eps", **options: Any) -> Any:
    kind = getattr(diffusers, name)
    if name in ("DDIMScheduler", "DDPMScheduler"):
        options = {"clip_sample": False, **options}
    return kind(**BETAS, prediction_type=NAMES[prediction], **options)


def run(scheduler: Any, model: Any, x: Tensor, steps: int = 6) -> Tensor:
    scheduler.set_timesteps(steps)
    generator = {"generator": torch.Generator().manual_seed(0)}
    options = generator if "generator" in scheduler.step.__code__.co_varnames else {}
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("batch", [False, True], ids=["canvas", "batch"])
def test_a_canvas_of_one_window_is_the_network_itself(name: str, batch: bool) -> None:
    network = ConvDenoiser(prediction="eps")
    state = network.prepare(
        field(1, 1).at(torch.zeros(1, 2, dtype=torch.long)), torch.zeros(1, 1, 3)
    )

    def plain(x: Tensor, t: Tensor) -> Tensor:
        index = torch.zeros(len(x) if batch else 1, dtype=torch.long)
        cond, uncond = network(x if batch else x[None], float(t), state, index)
        guided = uncond + 1.5 * (cond - uncond)
        return guided if batch else guided[0]

    x = canvas_noise(0, 6, 8, 8).view(2, 3, 8, 8) if batch else canvas_noise(0, 3, 8, 8)
    expected = run(scheduler(name), plain, x)
    torch.testing.assert_close(run(scheduler(name), on_canvas(8, 8), x), expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_runs_on_a_larger_canvas_as_it_is(name: str) -> None:
    x = canvas_noise(0, 3, 24, 32)
    made = run(scheduler(name), on_canvas(24, 32), x)
    assert made.shape == x.shape
    assert bool(torch.isfinite(made).all())
    both = run(scheduler(name), on_canvas(24, 32), torch.stack((x, -x)))
    assert both.shape == (2, *x.shape)
    if name != "DDPMScheduler":  # whose noise is drawn for the whole batch
        torch.testing.assert_close(both[0], made)


def step_by_step(theirs: Any, **ours: Any) -> None:
    """Every step of our loop against the scheduler's, on the same canvas and outputs."""
    canvas = on_canvas(16, 24, ours.pop("prediction"))
    seen: list[Tensor] = []

    def note(_: Any, step: int, t: float, shown: dict[str, Tensor]) -> None:
        seen.append(shown["latents"].clone())

    x = canvas_noise(1, 3, 16, 24)
    steps = ours["steps"]
    sample(canvas, x, schedule=SCHEDULE, callback_on_step_end=note, **ours)
    if ours["solver"] == "dpmpp_2m":
        # Of "leading" steps theirs makes one more and leaves out the first; it takes ours.
        theirs.set_timesteps(timesteps=SCHEDULE.timesteps(steps, ours["spacing"]))
    else:
        theirs.set_timesteps(steps)
    for number, t in enumerate(theirs.timesteps):
        x = theirs.step(canvas(x, t), t, x).prev_sample
        torch.testing.assert_close(seen[number], x, rtol=1e-4, atol=1e-4)
    assert len(seen) == steps


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_our_ddim_is_that_of_diffusers_step_by_step(prediction: str, spacing: str) -> None:
    # Theirs ends at the first training step's signal unless told that the end is clean.
    theirs = scheduler("DDIMScheduler", prediction, timestep_spacing=spacing, set_alpha_to_one=True)
    step_by_step(theirs, prediction=prediction, spacing=spacing, solver="ddim", steps=8)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_our_dpmpp_2m_is_that_of_diffusers_step_by_step(prediction: str, spacing: str) -> None:
    theirs = scheduler(
        "DPMSolverMultistepScheduler",
        prediction,
        timestep_spacing=spacing,
        final_sigmas_type="zero",
        lower_order_final=True,
        solver_order=2,
    )
    step_by_step(theirs, prediction=prediction, spacing=spacing, solver="dpmpp_2m", steps=8)


def test_fresh_noise_of_ddim_is_scaled_as_in_diffusers() -> None:
    canvas, x = on_canvas(16, 24), canvas_noise(1, 3, 16, 24)
    theirs = scheduler("DDIMScheduler", timestep_spacing="trailing", set_alpha_to_one=True)
    theirs.set_timesteps(5)
    drawn = [canvas_noise(7, 3, 16, 24, step=step + 1) for step in range(5)]
    ours = sample(
        canvas, x, schedule=SCHEDULE, steps=5, eta=0.7, step_noise=lambda step: drawn[step]
    )
    for number, t in enumerate(theirs.timesteps):
        x = theirs.step(canvas(x, t), t, x, eta=0.7, variance_noise=drawn[number]).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "t", [torch.tensor(300), torch.tensor([300.0]), 300, torch.tensor([300, 300])]
)
def test_times_come_as_schedulers_give_them(t: Any) -> None:
    canvas, x = on_canvas(8, 8), canvas_noise(0, 3, 8, 8)
    assert torch.equal(canvas(x, t), canvas(x, 300.0))


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (torch.zeros(3, 8, 8), torch.tensor([1, 2]), r"t has shape \[2\], but all windows"),
        (torch.zeros(3, 8, 8), float("nan"), "t is nan"),
        (torch.zeros(4, 8, 8), 1, r"x has shape \[4, 8, 8\]"),
        (torch.zeros(2, 3, 8, 9), 1, r"x has shape \[2, 3, 8, 9\]"),
        (torch.zeros(3, 64), 1, r"x has shape \[3, 64\]"),
    ],
)
def test_a_canvas_or_time_that_does_not_fit_is_named(x: Tensor, t: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_canvas(8, 8)(x, t)
