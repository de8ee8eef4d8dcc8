# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import sd3, tokens, unet_2d_condition
from samplers import ancestral, euler, heun, k_diffusion_sampling
from torch import Tensor

from ssldiff_fast.adapters import DenoisedPrediction, from_diffusers, from_kdiffusion
from ssldiff_fast.adapters.sigmas import Sigmas
from ssldiff_fast.canvas import (
    CanvasDenoiser,
    Conditioning,
    PromptField,
    WindowPlan,
    canvas_noise,
    sample,
)
from ssldiff_fast.diffusion import Schedule

WINDOW = (8, 8)
ONE = WindowPlan.regular(8, 8, WINDOW, 8)
PLAN = WindowPlan.regular(12, 16, WINDOW, 4)
SCHEDULE = Schedule()
SAMPLERS = {"euler": euler, "heun": heun, "ancestral": ancestral}
THEIRS = ("euler", "heun", "dpmpp_2m", "lms", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde")


class ToyDenoiser:
    """(x, sigma, cond) -> denoised, as `k_diffusion.external` makes it of an eps network."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        mean = cond.mean(1)[:, :4, None, None]
        return mean + (x - mean) / (1 + level**2)


def canvas(prediction: str = "eps", plan: WindowPlan = ONE) -> CanvasDenoiser:
    denoiser = from_diffusers(unet_2d_condition(), prediction=prediction)
    return CanvasDenoiser(denoiser, plan, PromptField(tokens(1)))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_view_is_the_denoised_image_of_every_prediction(prediction: str) -> None:
    x0, noise, t = canvas_noise(1, 4, 8, 8), canvas_noise(2, 4, 8, 8), 640
    abar = SCHEDULE.abar(t)
    outputs = {"eps": noise, "x0": x0, "v": abar**0.5 * noise - (1 - abar) ** 0.5 * x0}
    asked: list[float] = []

    class Known:
        def __call__(self, x: Tensor, t: float) -> Tensor:
            asked.append(t)
            torch.testing.assert_close(x, abar**0.5 * x0 + (1 - abar) ** 0.5 * noise)
            return outputs[prediction]

    Known.prediction = prediction  # type: ignore[attr-defined]
    sigma = ((1 - abar) / abar) ** 0.5
    view = DenoisedPrediction(Known(), SCHEDULE)
    x = x0 + sigma * noise
    torch.testing.assert_close(view(x, torch.full((4,), sigma)), x0, rtol=1e-4, atol=1e-4)
    assert asked[0] == pytest.approx(t, abs=1e-4)


def test_a_flow_model_takes_sigma_times_its_timesteps() -> None:
    network = sd3()
    cond = Conditioning(tokens(1), torch.zeros(1, 12))
    one = CanvasDenoiser(from_diffusers(network), ONE, PromptField(cond))
    x = canvas_noise(1, 4, 8, 8)
    torch.testing.assert_close(DenoisedPrediction(one)(x, 0.25), x - 0.25 * one(x, 250.0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_on_one_window_is_the_sampler_on_the_network(name: str) -> None:
    sigmas, network = Sigmas(SCHEDULE, call="test"), unet_2d_condition()

    @torch.no_grad()
    def plain(x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        time = torch.tensor(sigmas.time(level))
        scaled = x / math.sqrt(1 + level**2)
        return x - level * network(scaled, time, encoder_hidden_states=tokens(1)).sample

    view = DenoisedPrediction(canvas(), SCHEDULE)
    levels = view.get_sigmas(4)
    x = canvas_noise(0, 4, 8, 8) * view.sigma_max
    theirs = SAMPLERS[name](plain, x[None], levels)
    ours = SAMPLERS[name](lambda x, sigma: view(x[0], sigma)[None], x[None], levels)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.parametrize("name", THEIRS)
def test_samplers_of_k_diffusion_run_on_a_canvas(name: str) -> None:
    sampling = k_diffusion_sampling()
    if sampling is None:
        pytest.skip("k-diffusion is not installed")
    view = DenoisedPrediction(canvas(plan=PLAN), SCHEDULE)
    x = canvas_noise(0, 4, 12, 16) * view.sigma_max
    more = {}
    if "sde" in name or "ancestral" in name:
        more["noise_sampler"] = lambda sigma, following: torch.zeros_like(x)
    sampler = getattr(sampling, f"sample_{name}")
    done = sampler(view, x, view.get_sigmas(3), disable=True, **more)
    assert done.shape == x.shape
    assert bool(torch.isfinite(done).all())
    if name in ("euler", "heun"):
        torch.testing.assert_close(done, SAMPLERS[name](view, x, view.get_sigmas(3)))


def test_euler_by_sigma_is_ddim_by_timestep() -> None:
    """DDIM with eta 0 is Euler in sigma (Karras et al. 2022, appendix C.2.3)."""
    one, x = canvas(), canvas_noise(0, 4, 8, 8)
    times = SCHEDULE.timesteps(5)
    view = DenoisedPrediction(one, SCHEDULE)
    levels = torch.tensor([*(Sigmas(SCHEDULE, call="test").at(t) for t in times), 0.0])
    start = x * math.sqrt(1 + float(levels[0]) ** 2)
    by_sigma = euler(view, start, levels)
    by_time = sample(one, x, schedule=SCHEDULE, solver="ddim", steps=5)
    assert float((by_sigma - by_time).norm() / by_time.norm()) < 1e-4


def test_a_batch_of_canvases_has_one_sigma_for_all() -> None:
    view, x = DenoisedPrediction(canvas(), SCHEDULE), canvas_noise(0, 8, 8, 8).view(2, 4, 8, 8)
    both = view(x, torch.tensor([2.0, 2.0]))
    for number in range(2):
        torch.testing.assert_close(both[number], view(x[number], 2.0), rtol=1e-4, atol=1e-4)


def test_sigma_and_timestep_are_each_others_inverse() -> None:
    sigmas = Sigmas(SCHEDULE, call="test")
    for t in (0.0, 0.25, 17.0, 500.5, 999.0):
        assert sigmas.time(sigmas.at(t)) == pytest.approx(t, abs=1e-6)
    assert sigmas.time(1e9) == 999.0
    assert sigmas.time(1e-9) == 0.0


def test_noise_levels_fall_from_the_largest_to_nothing() -> None:
    view = DenoisedPrediction(canvas(), SCHEDULE)
    levels = view.get_sigmas(10)
    assert levels.shape == (11,)
    assert bool((levels.diff() < 0).all())
    assert float(levels[0]) == pytest.approx(view.sigma_max)
    assert float(levels[-2]) == pytest.approx(view.sigma_min)
    assert float(levels[-1]) == 0.0


def test_a_schedule_that_ends_in_pure_noise_starts_below_it() -> None:
    view = DenoisedPrediction(canvas("v"), Schedule(zero_terminal_snr=True))
    assert math.isfinite(view.sigma_max)


def test_a_scheduler_of_diffusers_is_a_schedule() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195
    )
    theirs, ours = (DenoisedPrediction(canvas(), one) for one in (scheduler, SCHEDULE))
    assert theirs.sigma_max == pytest.approx(ours.sigma_max, rel=1e-4)


def test_a_k_diffusion_denoiser_without_a_schedule_counts_in_sigma() -> None:
    denoiser = from_kdiffusion(ToyDenoiser(), window=8, channels=4)
    one = CanvasDenoiser(denoiser, ONE, PromptField(tokens(1)))
    x = canvas_noise(0, 4, 8, 8) * 10
    expected = ToyDenoiser()(x[None], torch.tensor([10.0]), tokens(1))[0]
    torch.testing.assert_close(one(x, 10.0), expected)
    view = DenoisedPrediction(one)
    torch.testing.assert_close(view(x, torch.full((4,), 10.0)), expected)
    levels = torch.tensor([10.0, 4.0, 1.0, 0.0])
    theirs = heun(ToyDenoiser(), x[None], levels, {"cond": tokens(1)})[0]
    torch.testing.assert_close(heun(view, x, levels), theirs)


def test_a_k_diffusion_denoiser_with_a_schedule_counts_in_timesteps() -> None:
    denoiser = from_kdiffusion(ToyDenoiser(), window=8, channels=4, schedule=SCHEDULE)
    assert denoiser.prediction == "x0"
    one = CanvasDenoiser(denoiser, ONE, PromptField(tokens(1)))
    x, abar = canvas_noise(0, 4, 8, 8), SCHEDULE.abar(300)
    sigma = ((1 - abar) / abar) ** 0.5
    expected = ToyDenoiser()(x[None] / abar**0.5, torch.tensor([sigma]), tokens(1))[0]
    torch.testing.assert_close(one(x, 300), expected, rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(sample(one, x, schedule=SCHEDULE, steps=3)).all())


def test_names_say_what_the_denoiser_calls_its_conditioning() -> None:
    given: dict[str, Any] = {}

    def denoiser(x: Tensor, sigma: Tensor, **extra: Tensor) -> Tensor:
        given.update(extra)
        return x

    adapted = from_kdiffusion(
        denoiser, window=8, channels=4, names={"tokens": "cross_cond", "labels": "class_cond"}
    )
    state = adapted.prepare(Conditioning(tokens(2), labels=torch.tensor([3, 5])), None)
    adapted(torch.zeros(1, 4, 8, 8), 1.0, state, torch.tensor([1]))
    assert given["class_cond"].tolist() == [5]
    assert torch.equal(given["cross_cond"], tokens(2)[1:])


def view() -> DenoisedPrediction:
    return DenoisedPrediction(canvas(), SCHEDULE)


def toy(**more: Any) -> Any:
    return from_kdiffusion(ToyDenoiser(), window=8, channels=4, **more)


def by_sigma() -> CanvasDenoiser:
    return CanvasDenoiser(toy(), ONE, PromptField(tokens(1)))


X = torch.zeros(4, 8, 8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DenoisedPrediction(canvas()), ValueError, "schedule is None, but this model"),
        (lambda: DenoisedPrediction(canvas(), "cosine"), TypeError, "schedule is a str"),
        (
            lambda: DenoisedPrediction(canvas(), torch.linspace(0.1, 0.9, 10)),
            ValueError,
            "do not fall from step to step",
        ),
        (
            lambda: DenoisedPrediction(by_sigma(), SCHEDULE),
            ValueError,
            "schedule is given, but this model counts in sigma",
        ),
        (
            lambda: DenoisedPrediction(by_sigma()).sigma_max,
            ValueError,
            "has no schedule",
        ),
        (lambda: view()(X, torch.tensor([1.0, 2.0])), ValueError, r"sigma is \[1.0, 2.0\]"),
        (lambda: view()(X, 0.0), ValueError, "one finite level above 0"),
        (lambda: view()(X.double(), 1.0), TypeError, "x is float64"),
        (lambda: view()(X, 1.0, cond=X), TypeError, "extra_args has 'cond'"),
        (lambda: from_kdiffusion(3, window=8, channels=4), TypeError, "denoiser is a int"),
        (lambda: toy(names={"text": "cond"}), ValueError, "names has 'text'"),
        (
            lambda: toy().prepare(Conditioning(labels=torch.tensor([1])), None),
            ValueError,
            "needs 'cond', but the field gives no tokens",
        ),
        (
            lambda: toy().prepare(Conditioning(tokens(1), labels=torch.tensor([1])), None),
            ValueError,
            "gives labels, but names does not say",
        ),
        (
            lambda: CanvasDenoiser(toy(schedule=SCHEDULE), ONE, PromptField(tokens(1)))(X, 1200),
            ValueError,
            "t is 1200, but this schedule has finite noise from 0 to 999",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
