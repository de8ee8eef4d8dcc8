# SPDX-License-Identifier: Apache-2.0
"""A sampler of k-diffusion on a canvas that the bundled model denoises.

    python examples/k_diffusion_sampler.py image.png

Any sampler of its signature (model, x, sigmas) will do; without k-diffusion a short one stands in.
"""

import sys
from itertools import pairwise

import torch
from PIL import Image

import ssldiff_fast as sf
from ssldiff_fast.canvas import LDMDenoiser, canvas_noise, decode_image

try:
    from k_diffusion.sampling import sample_euler
except ImportError:

    def sample_euler(model, x, sigmas):
        """Euler steps in sigma (Karras et al. 2022, algorithm 2 without churn and correction)."""
        for sigma, following in pairwise(sigmas):
            denoised = model(x, sigma * x.new_ones(x.shape[0]))
            x = x + (x - denoised) / sigma * (following - sigma)
        return x


model = sf.load("he-demo")
h, w = model.window
# Two embeddings side by side, interpolated in between; sf.encode makes them of a slide.
torch.manual_seed(0)
grid = torch.randn(1, 2, model.conditioner.tokens, model.conditioner.width)
windows = sf.WindowPlan.regular(h, 2 * w, (h, w), w // 2)
canvas = sf.CanvasDenoiser(
    LDMDenoiser(model), windows, sf.GridField(grid, (h, w)), guidance_scale=1.75
)

denoised = sf.adapters.DenoisedPrediction(canvas, model.schedule)
noise = canvas_noise(0, canvas.channels, h, 2 * w) * denoised.sigma_max
x = sample_euler(denoised, noise, denoised.get_sigmas(4))  # 20 or more for a good image

name = sys.argv[1] if len(sys.argv) > 1 else "image.png"
Image.fromarray(decode_image(model, x, stride=w // 2, weights="hann")).save(name)
print(f"{name}: Euler from sigma = {denoised.sigma_max:.1f}")
