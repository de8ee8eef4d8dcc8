# SPDX-License-Identifier: Apache-2.0
"""Claim: the latents of diffusers' StableDiffusionPanoramaPipeline, and sooner.

One process, the same random weights, noise, scheduler (DDIM), stride (8, the pipeline's own),
windows (64), prompt and guidance; theirs and ours in turns. The pipeline evaluates one window at a
time unless told otherwise, so it is timed with its default and with our batch size.

    python benchmarks/panorama.py [--device cuda] [--latents 256] [--steps 10]
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

import ssldiff_fast as sf
from report import aim, save
from ssldiff_fast.canvas import canvas_noise
from timing import alternate, ratios_to

WINDOW, STRIDE, SCALE, TOKENS, WIDTH = 64, 8, 7.5, 77, 64
BATCH = 16


def unet(device: str) -> UNet2DConditionModel:
    """Tiny, with random weights: where the network costs little, one sees what the rest costs."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=WINDOW,
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return network.eval().to(device)


def pipeline(network: UNet2DConditionModel) -> Any:
    """Their pipeline, with nothing but the network in earnest."""
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = diffusers.StableDiffusionPanoramaPipeline(
            vae, None, None, network, scheduler(), None, None, requires_safety_checker=False
        ).to(network.device)
    made.set_progress_bar_config(disable=True)
    return made


def scheduler() -> DDIMScheduler:
    """DDIM as Stable Diffusion is sampled with it."""
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def main() -> None:
    """Compare latents, then time, and save panorama.json."""
    # Not of `make gpu`: it needs libraries that a GPU machine may lack.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--latents", type=int, default=128, help="Width of the canvas.")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    device = chosen.device
    network = unet(device)
    theirs = pipeline(network)
    noise = canvas_noise(0, 4, WINDOW, chosen.latents, device=device)
    prompt, negative = (canvas_noise(s, 1, TOKENS, WIDTH, device=device) for s in (1, 2))

    def panorama(batch: int) -> torch.Tensor:
        return theirs(
            height=WINDOW * 8,
            width=chosen.latents * 8,
            num_inference_steps=chosen.steps,
            guidance_scale=SCALE,
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            latents=noise[None].clone(),
            view_batch_size=batch,
            output_type="latent",
        ).images[0]

    def ours() -> torch.Tensor:
        windows = sf.WindowPlan.regular(WINDOW, chosen.latents, (WINDOW, WINDOW), STRIDE)
        field = sf.PromptField(prompt, uncond=negative)
        canvas = sf.CanvasDenoiser(
            sf.adapters.from_diffusers(network),
            windows,
            field,
            guidance_scale=SCALE,
            batch_size=BATCH,
        )
        own, x = scheduler(), noise
        own.set_timesteps(chosen.steps)
        for t in own.timesteps:
            x = own.step(canvas(x, t), t, x).prev_sample
        return x

    reference = panorama(1)
    error = float((ours() - reference).norm() / reference.norm())
    if error > 1e-4:
        raise SystemExit(f"panorama: the latents differ by {error:.2g}; nothing was timed.")
    times = alternate(
        {
            "ours": ours,
            "diffusers": lambda: panorama(1),
            "diffusers, batched": lambda: panorama(16),
        },
        chosen.rounds,
        device,
    )
    ratio = ratios_to(times, "ours")
    figures = {
        "shape": f"canvas 4 x {WINDOW} x {chosen.latents}, stride {STRIDE}, {chosen.steps} steps",
        "dtype": "float32",
        "parameters": sum(p.numel() for p in network.parameters()),
        "ratio": ratio,
        "times": times,
        "relative_error": error,
        "diffusers_version": diffusers.__version__,
    }
    aims = [
        aim("relative error of the latents", error, 1e-4, "at most"),
        aim("times diffusers' panorama pipeline", ratio["diffusers"], 1.0, "at least"),
        aim("times the same, batched", ratio["diffusers, batched"], 1.0, "at least"),
    ]
    save("panorama", figures, aims, device)


if __name__ == "__main__":
    main()
