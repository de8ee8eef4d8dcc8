# SPDX-License-Identifier: Apache-2.0
"""Against the pipeline of diffusers for large images, StableDiffusionPanoramaPipeline."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from networks import tokens, unet_2d_condition
from torch import Tensor

from ssldiff_fast.adapters import from_diffusers
from ssldiff_fast.canvas import CanvasDenoiser, PromptField, WindowPlan, canvas_noise

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

HEIGHT, WIDTH, STEPS, SCALE = 16, 24, 5, 7.5
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "DPMSolverMultistep": lambda: diffusers.DPMSolverMultistepScheduler(),
}


def panorama(network: Any, scheduler: Any, noise: Tensor, prompt: Tensor, negative: Tensor) -> Any:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.StableDiffusionPanoramaPipeline(
            vae, None, None, network, scheduler, None, None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    # The pipeline's own window is 64 with a stride of 8; these networks have 8.
    pipeline.get_views = functools.partial(pipeline.get_views, window_size=8, stride=4)
    return pipeline(
        height=HEIGHT * 8, width=WIDTH * 8, num_inference_steps=STEPS, guidance_scale=SCALE,
        prompt_embeds=prompt, negative_prompt_embeds=negative, latents=noise[None].clone(),
        output_type="latent",
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_are_those_of_diffusers_panorama_pipeline(name: str) -> None:
    network, prompt, negative = unet_2d_condition(), tokens(1), tokens(1, seed=9)
    noise = canvas_noise(0, 4, HEIGHT, WIDTH)
    theirs = panorama(network, SCHEDULERS[name](), noise, prompt, negative)

    scheduler = SCHEDULERS[name]()
    windows = WindowPlan.regular(HEIGHT, WIDTH, (8, 8), 4)
    field = PromptField(prompt, uncond=negative)
    canvas = CanvasDenoiser(from_diffusers(network), windows, field, guidance_scale=SCALE)
    scheduler.set_timesteps(STEPS)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(canvas(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    assert float((x - theirs).norm() / theirs.norm()) < 1e-4
