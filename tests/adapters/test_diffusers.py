# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from networks import CASES, pixart, pooled, sd3, tokens, unet_2d, unet_2d_condition
from torch import Tensor

from ssldiff_fast.adapters import check_scheduler, from_diffusers
from ssldiff_fast.canvas import (
    CanvasDenoiser,
    Conditioning,
    PromptField,
    RegionField,
    WindowPlan,
    canvas_noise,
    sample,
)
from ssldiff_fast.diffusion import Schedule

diffusers = pytest.importorskip("diffusers")

WINDOW = (8, 8)
ONE = WindowPlan.regular(8, 8, WINDOW, 8)
# The schedulers that the README names, each as people set it up.
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "DDIM-v": lambda: diffusers.DDIMScheduler(prediction_type="v_prediction"),
    "DDPM": lambda: diffusers.DDPMScheduler(),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "EulerAncestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(),
    "DPMSolverMultistep": lambda: diffusers.DPMSolverMultistepScheduler(),
    "DPMSolverMultistep-SDE": lambda: diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
    ),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(),
    "PNDM": lambda: diffusers.PNDMScheduler(),
    "FlowMatchEuler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


def denoise(scheduler: Any, model: Callable[[Tensor, Any], Tensor], x: Tensor) -> Tensor:
    """The plain loop of diffusers."""
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(5)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    takes_noise = "generator" in scheduler.step.__code__.co_varnames
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        more = {"generator": generator} if takes_noise else {}
        x = scheduler.step(model(scaled, t), t, x, **more).prev_sample
    return x


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_one_window_is_the_network_called_as_its_pipeline_does(case: str) -> None:
    make, conditioning, call = CASES[case]
    network, cond, t = make(), conditioning(3), torch.tensor(421)
    x = canvas_noise(3, 12, 8, 8).view(3, 4, 8, 8)
    denoiser = from_diffusers(network)
    both = denoiser(x, 421.0, denoiser.prepare(cond, conditioning(1)), torch.tensor([2, 0, 1]))
    assert both.shape == (2, 3, 4, 8, 8)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(both[0], call(network, x, t, cond[order]), rtol=1e-4, atol=1e-5)
    null = conditioning(1).expand(3)
    torch.testing.assert_close(both[1], call(network, x, t, null), rtol=1e-4, atol=1e-5)
    alone = denoiser(x, 421.0, denoiser.prepare(cond, None), order)
    torch.testing.assert_close(alone[0], both[0], rtol=1e-4, atol=1e-5)
    assert bool((alone[0] - both[1]).abs().max() > 1e-3)  # the conditioning is not lost


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_a_canvas_of_one_window_is_the_plain_loop(name: str) -> None:
    network, prompt, negative, x = (
        unet_2d_condition(),
        tokens(1),
        tokens(1, seed=9),
        canvas_noise(3, 4, 8, 8),
    )
    field = PromptField(prompt, uncond=negative)
    canvas = CanvasDenoiser(from_diffusers(network), ONE, field, guidance_scale=2.0)

    def plain(x: Tensor, t: Any) -> Tensor:
        uncond, cond = network(
            torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, prompt])
        ).sample.chunk(2)
        return uncond + 2.0 * (cond - uncond)

    # Some noise samplers draw by the shape, so both have the same.
    ours = denoise(SCHEDULERS[name](), lambda x, t: canvas(x[0], t)[None], x[None])
    theirs = denoise(SCHEDULERS[name](), plain, x[None])
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_diffusers_pass_as_pointwise(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    before = dict(vars(scheduler))
    check_scheduler(scheduler)
    assert scheduler.timesteps is before["timesteps"]  # a copy was tried


def test_the_ten_lines_of_the_readme() -> None:
    unet, scheduler = unet_2d_condition(), diffusers.DDIMScheduler()
    windows = WindowPlan.regular(16, 24, WINDOW, 4)
    field = PromptField(tokens(1), uncond=tokens(1, seed=9))
    canvas = CanvasDenoiser(from_diffusers(unet), windows, field, guidance_scale=1.75)
    scheduler.set_timesteps(2)
    x = canvas_noise(0, 4, 16, 24)
    for t in scheduler.timesteps:
        x = scheduler.step(canvas(x, t), t, x).prev_sample
    assert x.shape == (4, 16, 24)


def test_our_own_loop_is_ddim_of_diffusers() -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False,
        timestep_spacing="trailing", set_alpha_to_one=True,
    )  # fmt: skip
    denoiser = from_diffusers(unet_2d_condition(), scheduler=scheduler)
    assert denoiser.prediction == "eps"
    canvas = CanvasDenoiser(denoiser, ONE, PromptField(tokens(1)))
    x = canvas_noise(3, 4, 8, 8)
    ours = sample(canvas, x, schedule=Schedule(), solver="ddim", steps=4)
    torch.testing.assert_close(ours, denoise(scheduler, canvas, x), rtol=1e-4, atol=1e-4)


def test_regions_with_pooled_embeddings_run_on_a_transformer() -> None:
    masks = torch.zeros(2, 8, 16)
    masks[0, :, :9], masks[1, :, 7:] = 1.0, 1.0
    field = RegionField(Conditioning(tokens(2), pooled(2)), masks)
    plan = WindowPlan.regular(8, 16, WINDOW, 4)
    denoiser = from_diffusers(sd3())
    output = CanvasDenoiser(denoiser, plan, field)(canvas_noise(0, 4, 8, 16), 500.0)
    left = PromptField(Conditioning(tokens(2)[:1], pooled(2)[:1]))
    alone = CanvasDenoiser(denoiser, plan, left)(canvas_noise(0, 4, 8, 16), 500.0)
    torch.testing.assert_close(output[:, :, :4], alone[:, :, :4])
    assert bool((output[:, :, 12:] - alone[:, :, 12:]).abs().max() > 1e-3)


def test_a_batch_of_canvases_with_classes_of_their_own_is_each_by_itself() -> None:
    denoiser, x = from_diffusers(unet_2d()), canvas_noise(0, 8, 8, 16).view(2, 4, 8, 16)
    fields = [PromptField(Conditioning(labels=torch.tensor([label]))) for label in (2, 5)]
    plan = WindowPlan.regular(8, 16, WINDOW, 4)
    both = CanvasDenoiser(denoiser, plan, fields)(x, 300)
    for number, field in enumerate(fields):
        alone = CanvasDenoiser(denoiser, plan, field)(x[number], 300)
        torch.testing.assert_close(both[number], alone, rtol=1e-4, atol=1e-5)


def test_windows_without_tissue_are_not_evaluated() -> None:
    tissue = torch.tensor([[True, False, False, False]])
    plan = WindowPlan.regular(8, 32, WINDOW, 4)
    canvas = CanvasDenoiser(
        from_diffusers(unet_2d_condition(), prediction="eps"),
        plan,
        PromptField(tokens(1)),
        mask=tissue,
        background=torch.zeros(4, 1, 1),
        schedule=Schedule(),
    )
    assert canvas.evaluations(0, 500.0) == (2, 5)
    assert canvas(canvas_noise(0, 4, 8, 32), 500).shape == (4, 8, 32)


def test_half_precision_networks_get_half_precision() -> None:
    network = unet_2d_condition().to(torch.bfloat16)
    canvas = CanvasDenoiser(from_diffusers(network), ONE, PromptField(tokens(1)))
    output = canvas(canvas_noise(0, 4, 8, 8), 10)
    assert output.dtype == torch.float32


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [
        (lambda: diffusers.DDIMScheduler(), "eps"),
        (lambda: diffusers.DDIMScheduler(prediction_type="v_prediction"), "v"),
        (lambda: diffusers.DDIMScheduler(prediction_type="sample"), "x0"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), "flow"),
    ],
)
def test_the_prediction_is_the_schedulers(scheduler: Callable[[], Any], prediction: str) -> None:
    pipeline = SimpleNamespace(unet=unet_2d_condition(), scheduler=scheduler())
    assert from_diffusers(pipeline).prediction == prediction
    bare = from_diffusers(pipeline.unet)
    with pytest.raises(ValueError, match="this model does not say what it predicts"):
        _ = bare.prediction
    assert from_diffusers(pipeline.unet, prediction=prediction).prediction == prediction


def test_window_and_channels_are_the_networks_own_unless_given() -> None:
    denoiser = from_diffusers(SimpleNamespace(transformer=sd3()))
    assert (denoiser.window, denoiser.channels, denoiser.prediction) == (WINDOW, 4, "flow")
    assert from_diffusers(unet_2d_condition(), window=(16, 8)).window == (16, 8)
    assert from_diffusers(unet_2d_condition(), window=16).window == (16, 16)


def test_a_compiled_network_is_known_by_what_it_was() -> None:
    network = unet_2d_condition()
    wrapped = torch.compile(network)  # nothing is compiled before a call
    assert from_diffusers(wrapped).window == WINDOW


def prepare(network: Any, cond: Any, uncond: Any = None) -> None:
    from_diffusers(network).prepare(cond, uncond)


class Packed(torch.nn.Module):
    config: ClassVar = {"sample_size": 8, "in_channels": 4}

    def forward(self, x: Tensor, timestep: Tensor, img_ids: Tensor, return_dict: bool) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: from_diffusers(torch.nn.Linear(1, 1)), TypeError, "model is a Linear"),
        (lambda: from_diffusers("runs/unet"), TypeError, "model is a str"),
        (lambda: from_diffusers(Packed()), TypeError, "needs img_ids"),
        (
            lambda: from_diffusers(unet_2d_condition(sample_size=None)),
            ValueError,
            "has no sample_size; pass window",
        ),
        (lambda: from_diffusers(unet_2d(), window=7), ValueError, "takes multiples of 2"),
        (lambda: from_diffusers(sd3(), window=32), ValueError, "has positions for 16 at most"),
        (lambda: from_diffusers(unet_2d(), window=(8, 8, 8)), ValueError, r"window is \(8, 8, 8\)"),
        (
            lambda: from_diffusers(unet_2d_condition(in_channels=9)),
            ValueError,
            "takes 9 channels and returns 4",
        ),
        (
            lambda: from_diffusers(unet_2d(), prediction="noise"),
            ValueError,
            "prediction is 'noise'",
        ),
        (
            lambda: from_diffusers(unet_2d(), prediction="v", scheduler=diffusers.DDIMScheduler()),
            ValueError,
            "prediction is 'v', but the scheduler says 'eps'",
        ),
        (
            lambda: from_diffusers(unet_2d(), scheduler=diffusers.DDIMScheduler(thresholding=True)),
            ValueError,
            "thresholding=True.*not pointwise",
        ),
        (
            lambda: prepare(unet_2d_condition(), Conditioning(labels=torch.tensor([1]))),
            ValueError,
            "needs encoder_hidden_states, but the field gives no tokens",
        ),
        (
            lambda: prepare(unet_2d_condition(), torch.zeros(1, 2, 7)),
            ValueError,
            "tokens are 7 wide, but UNet2DConditionModel takes 16",
        ),
        (
            lambda: prepare(sd3(), tokens(1)),
            ValueError,
            "needs pooled_projections, but the field gives no pooled",
        ),
        (
            lambda: prepare(sd3(), Conditioning(tokens(1), torch.zeros(1, 3))),
            ValueError,
            "pooled are 3 wide, but SD3Transformer2DModel takes 12",
        ),
        (
            lambda: prepare(unet_2d(), Conditioning(tokens(1), labels=torch.tensor([1]))),
            ValueError,
            "gives tokens, but UNet2DModel takes no encoder_hidden_states",
        ),
        (
            lambda: prepare(CASES["UNet2DConditionModel-SDXL"][0](), tokens(1)),
            ValueError,
            "needs text_embeds.*as pooled",
        ),
        (
            lambda: prepare(
                CASES["UNet2DConditionModel-SDXL"][0](), Conditioning(tokens(1), pooled(1))
            ),
            ValueError,
            r"needs time_ids.*as added\['time_ids'\]",
        ),
        (
            lambda: prepare(pixart(use_additional_conditions=True), tokens(1)),
            ValueError,
            "needs resolution",
        ),
        (
            lambda: prepare(unet_2d_condition(), tokens(1), canvas_noise(0, 1, 3, 16)),
            ValueError,
            "tokens has shapes.*pad the shorter",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_output_of_another_shape_is_named() -> None:
    network = unet_2d()
    network.register_forward_hook(lambda module, given, output: (output[0][:, :3],))
    denoiser = from_diffusers(network)
    state = denoiser.prepare(Conditioning(labels=torch.tensor([0])), None)
    with pytest.raises(RuntimeError, match=r"UNet2DModel returned \[1, 3, 8, 8\] for windows"):
        denoiser(torch.zeros(1, 4, 8, 8), 1.0, state, torch.tensor([0]))


class Blurring(diffusers.DDIMScheduler):  # type: ignore[misc]
    def step(self, output: Tensor, *others: Any, **more: Any) -> Any:
        return super().step(output - output.mean((2, 3), keepdim=True), *others, **more)


class Growing(diffusers.DDIMScheduler):  # type: ignore[misc]
    def step(self, *others: Any, **more: Any) -> Any:
        return (torch.cat(super().step(*others, **more)[:1] * 2),)


@pytest.mark.parametrize(
    ("scheduler", "error", "message"),
    [
        (
            lambda: Blurring(clip_sample=False),
            ValueError,
            "Blurring is not pointwise.*moved 35 others.*use DDIM",
        ),
        (Growing, ValueError, r"Growing steps a canvas \[1, 4, 6, 6\] to \[2, 4, 6, 6\]; use DDIM"),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(thresholding=True),
            ValueError,
            "thresholding=True",
        ),
        (lambda: diffusers.RePaintScheduler(), TypeError, "RePaintScheduler cannot step a canvas"),
        (lambda: "ddim", TypeError, "scheduler is a str"),
    ],
)
def test_schedulers_that_are_not_pointwise_are_named(
    scheduler: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_scheduler(scheduler())
