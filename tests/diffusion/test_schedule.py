# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from ssldiff_fast.diffusion import Schedule
from ssldiff_fast.diffusion.prediction import PREDICTIONS, to_eps, to_v, to_x0


def test_scaled_linear_is_the_published_schedule() -> None:
    ramp = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    assert torch.equal(Schedule().alphas_cumprod, torch.cumprod(1 - ramp, 0))
    assert Schedule().beta(999) == pytest.approx(0.0195)
    assert Schedule().beta(0) == pytest.approx(0.0015)


@pytest.mark.parametrize(
    ("betas", "name"),
    [("scaled_linear", "scaled_linear"), ("linear", "linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_schedules_are_those_of_diffusers(betas: str, name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(beta_schedule=name, beta_start=0.0015, beta_end=0.0195)
    ours = Schedule(betas=betas).alphas_cumprod
    # diffusers sums float32 betas: 3e-7 was measured.
    torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=1e-5, atol=1e-6)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step() -> None:
    plain, rescaled = Schedule(), Schedule(zero_terminal_snr=True)
    assert rescaled.abar(999) == 0.0
    assert rescaled.abar(0) == pytest.approx(plain.abar(0))
    assert bool((rescaled.alphas_cumprod.diff() < 0).all())
    assert rescaled.snr(torch.tensor([999])).item() == 0.0


def test_a_schedule_comes_back_from_its_config() -> None:
    schedule = Schedule(betas="cosine", num_train_timesteps=400, zero_terminal_snr=True)
    again = Schedule.from_config(schedule.to_config())
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_timesteps_are_those_of_diffusers(steps: int, spacing: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert Schedule().timesteps(steps, spacing) == theirs.timesteps.tolist()


def test_trailing_steps_start_at_the_last_index_and_leading_end_at_the_first() -> None:
    assert Schedule().timesteps(20)[0] == 999
    assert Schedule().timesteps(20, "leading")[-1] == 0


def test_noised_images_keep_their_dtype_and_mix_by_abar() -> None:
    schedule = Schedule()
    x0, noise, t = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.tensor([0, 999])
    x = schedule.add_noise(x0, noise, t)
    assert x.dtype == torch.float32
    expected = [schedule.abar(0) ** 0.5, schedule.abar(999) ** 0.5]
    assert x[:, 0, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_converts_to_every_other(prediction: str) -> None:
    schedule, t = Schedule(), torch.tensor([400])
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in "ab")
    x, v = schedule.add_noise(x0, eps, t), schedule.velocity(x0, eps, t)
    output = {"eps": eps, "v": v, "x0": x0}[prediction]
    abar = schedule.abar(400)
    torch.testing.assert_close(to_x0(prediction, x, output, abar), x0)
    torch.testing.assert_close(to_eps(prediction, x, output, abar), eps)
    torch.testing.assert_close(to_v(prediction, x, output, abar), v)


def test_v_and_x0_stay_defined_in_pure_noise() -> None:
    x, output = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    assert torch.equal(to_x0("v", x, output, 0.0), -output)
    assert torch.equal(to_eps("v", x, output, 0.0), x)
    assert torch.equal(to_v("x0", x, output, 0.0), -output)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": "sigmoid"}, "betas is 'sigmoid'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start and beta_end"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


def test_an_unknown_setting_in_a_config_is_named() -> None:
    with pytest.raises(ValueError, match="unknown setting 'linear_start'"):
        Schedule.from_config({"linear_start": 0.1})


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_an_impossible_number_of_steps_is_named(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {steps}; expected 1 to 1000"):
        Schedule().timesteps(steps)


def test_an_unknown_spacing_or_prediction_is_named() -> None:
    with pytest.raises(ValueError, match="spacing is 'linspace'"):
        Schedule().timesteps(5, "linspace")
    with pytest.raises(ValueError, match="prediction is 'score'"):
        to_x0("score", torch.zeros(1), torch.zeros(1), 0.5)


def test_conversions_that_are_undetermined_say_so() -> None:
    with pytest.raises(ValueError, match="'eps' where alpha-bar is 0"):
        to_x0("eps", torch.zeros(1), torch.zeros(1), 0.0)
    with pytest.raises(ValueError, match="'x0' where alpha-bar is 1"):
        to_eps("x0", torch.zeros(1), torch.zeros(1), 1.0)
    with pytest.raises(ValueError, match="undetermined by x0 where alpha-bar is 1"):
        to_v("x0", torch.zeros(1), torch.zeros(1), 1.0)
