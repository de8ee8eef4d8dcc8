# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssldiff_fast.diffusion import SOLVERS, Schedule, apply_step, denoised, get_solver, guide

DIFFUSERS_PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
Network = Callable[[Tensor, float], Tensor]


def network(x: Tensor, t: float) -> Tensor:
    """A smooth stand-in for a network, in the range of a real one."""
    return torch.tanh(x * (0.3 + t / 2000.0) + 0.1)


def start() -> Tensor:
    return torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def trajectory(
    solver: str, schedule: Schedule, steps: int, prediction: str, *, eta: float = 0.0
) -> list[Tensor]:
    x, history, seen = start(), None, []
    timesteps = schedule.timesteps(steps)
    for step in SOLVERS[solver](schedule, timesteps, prediction=prediction, eta=eta):
        output = network(x, step.time)
        noise = torch.ones_like(x) if step.noise else None
        now = denoised(step, x, output)
        x = apply_step(step, x, output, noise=noise, history=history)
        history = now
        seen.append(x)
    return seen


def diffusers_trajectory(scheduler: Any, steps: int, **options: Any) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    x, seen = start(), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, **options).prev_sample
        seen.append(x)
    return seen


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_steps_are_those_of_diffusers(prediction: str, eta: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=DIFFUSERS_PREDICTION[prediction],
    )
    theirs = diffusers_trajectory(scheduler, 10, eta=eta, variance_noise=torch.ones(3, 8, 8))
    ours = trajectory("ddim", Schedule(), 10, prediction, eta=eta)
    for mine, other in zip(ours, theirs):
        # diffusers keeps abar in float32.
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_2m_steps_are_those_of_diffusers(prediction: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type=DIFFUSERS_PREDICTION[prediction],
        final_sigmas_type="zero",
    )
    theirs = diffusers_trajectory(scheduler, steps)
    ours = trajectory("dpmpp_2m", Schedule(), steps, prediction)
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_dpmpp_2m_in_pure_noise_is_the_limit_that_diffusers_approximates(prediction: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type=DIFFUSERS_PREDICTION[prediction],
        rescale_betas_zero_snr=True,
    )
    theirs = diffusers_trajectory(scheduler, 20)
    ours = trajectory("dpmpp_2m", Schedule(zero_terminal_snr=True), 20, prediction)
    # diffusers puts abar = 2^-24 where we put 0: its first weight is off by 2^-12, and its second
    # step extrapolates by a finite difference where the limit has none.
    for mine, other in zip(ours, theirs):
        assert bool(torch.isfinite(mine).all())
        assert float((mine - other).norm() / other.norm()) < 2e-2


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_a_first_step_from_pure_noise_keeps_the_noise_and_adds_the_image(solver: str) -> None:
    schedule = Schedule(zero_terminal_snr=True)
    x = start()
    timesteps = schedule.timesteps(4)
    step = SOLVERS[solver](schedule, timesteps, prediction="v", eta=0.0)[0]
    output = network(x, step.time)
    abar = schedule.abar(timesteps[1])
    expected = math.sqrt(1 - abar) * x - math.sqrt(abar) * output
    torch.testing.assert_close(apply_step(step, x, output), expected)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_perfect_network_leads_to_its_image(solver: str, prediction: str) -> None:
    schedule, image, noise = Schedule(), start(), start().flip(0)
    x = math.sqrt(schedule.abar(999)) * image + math.sqrt(1 - schedule.abar(999)) * noise
    history = None
    for step in SOLVERS[solver](schedule, schedule.timesteps(7), prediction=prediction, eta=0.0):
        abar = schedule.abar(step.t)
        eps = (x - math.sqrt(abar) * image) / math.sqrt(1 - abar)
        v = math.sqrt(abar) * eps - math.sqrt(1 - abar) * image
        output = {"eps": eps, "v": v, "x0": image}[prediction]
        now = denoised(step, x, output)
        x = apply_step(step, x, output, history=history)
        history = now
    torch.testing.assert_close(x, image)


def test_the_published_loop_tells_the_network_a_time_of_one_more() -> None:
    schedule = Schedule()
    steps = SOLVERS["authors"](schedule, schedule.timesteps(50), prediction="eps", eta=1.0)
    assert [step.time for step in steps[:3]] == [1000.0, 980.0, 960.0]
    assert [step.t for step in steps[:3]] == [999, 979, 959]
    abar, abar_next = schedule.abar(999), schedule.abar(979)
    assert steps[0].noise ** 2 == pytest.approx(0.0195 * (1 - abar_next) / (1 - abar))


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_the_last_step_returns_the_denoised_image(solver: str) -> None:
    schedule = Schedule()
    eta = 0.0 if solver == "dpmpp_2m" else 1.0
    last = SOLVERS[solver](schedule, schedule.timesteps(5), prediction="v", eta=eta)[-1]
    assert (last.noise, last.history) == (0.0, 0.0)
    assert last.x == pytest.approx(last.denoised_x)
    assert last.output == pytest.approx(last.denoised_output)


def test_one_step_is_enough_for_every_solver() -> None:
    schedule = Schedule(zero_terminal_snr=True)
    for solver in SOLVERS.values():
        (step,) = solver(schedule, schedule.timesteps(1), prediction="v", eta=0.0)
        assert (step.x, step.output) == (0.0, -1.0)


def test_an_eps_network_in_pure_noise_is_refused() -> None:
    schedule = Schedule(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="'eps' where alpha-bar is 0"):
        SOLVERS["ddim"](schedule, schedule.timesteps(4), prediction="eps", eta=0.0)


def test_an_unknown_solver_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'euler'; expected one of ddim, dpmpp_2m, authors"):
        get_solver("euler")


def test_dpmpp_2m_refuses_an_eta() -> None:
    with pytest.raises(ValueError, match=r"eta is 0\.5, but this solver draws no noise"):
        SOLVERS["dpmpp_2m"](Schedule(), [999, 499], prediction="eps", eta=0.5)


def test_a_missing_noise_or_history_is_named() -> None:
    schedule, x = Schedule(), start()
    noisy = SOLVERS["ddim"](schedule, schedule.timesteps(4), prediction="eps", eta=1.0)[0]
    with pytest.raises(ValueError, match="noise is None"):
        apply_step(noisy, x, x)
    second = SOLVERS["dpmpp_2m"](schedule, schedule.timesteps(4), prediction="eps", eta=0.0)[1]
    with pytest.raises(ValueError, match="history is None"):
        apply_step(second, x, x)


def test_a_guidance_scale_of_one_is_no_guidance() -> None:
    cond, uncond = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, 4.0), (1 + 3) * cond - 3 * uncond)
