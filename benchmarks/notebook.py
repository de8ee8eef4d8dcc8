# SPDX-License-Identifier: Apache-2.0
"""Claim: the published notebook's image takes less than half the time here, by the same formulas.

One image of 1024 x 1024 pixels (--cells 4: a grid of 4 x 4 windows of 64 latents, stride 16), the
published loop and decode on one side, `sample` and `decode_rows` with the preset `authors` on the
other, in one run, with random weights of the published size. Every step costs the same, so a few
steps are timed and counted up to the preset's; tiles of the decode likewise. The published form
takes each step's windows in batches of --batch-size guided pairs.

    python benchmarks/notebook.py [--device cuda] [--size paper | demo] [--cells 2] [--steps 1]

The defaults on a CPU are a quarter of the image (2 x 2 cells), which the result states.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from published_decode import published_decode
from published_unet import published_unet
from report import aim, save
from sampler import EMBEDDING_WIDTH, random_model
from ssldiff_fast.canvas import CanvasDenoiser, GridField, LDMDenoiser, get_preset, sample
from ssldiff_fast.canvas.noise import canvas_noise
from ssldiff_fast.models import LatentDiffusion, VQModel
from ssldiff_fast.models.fused_unet import exact_convolutions
from ssldiff_fast.ops import WindowPlan
from timing import arguments

CELLS = {"cpu": 2, "cuda": 4}
TILES = 4  # of the decode that are timed


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def published_step(
    model: LatentDiffusion, plan: WindowPlan, canvas: Tensor, cond: Tensor, batch: int
) -> Tensor:
    """The mean of the guided windows of one step, as the published loop makes it."""
    h, w = plan.window
    total, count = torch.zeros_like(canvas), torch.zeros_like(canvas)
    origins = [(y, x) for y in plan.origins_y for x in plan.origins_x]
    null = torch.zeros_like(cond[:1])
    for first in range(0, len(origins), batch):
        some = origins[first : first + batch]
        windows = torch.stack([canvas[:, y : y + h, x : x + w] for y, x in some])
        tokens = torch.cat((cond[first : first + batch], null.expand(len(some), -1, -1)))
        t = torch.full((2 * len(some),), 500.0, device=canvas.device)
        out = published_unet(model.unet, windows.repeat(2, 1, 1, 1), t, tokens)
        cond_out, uncond_out = out.chunk(2)
        guided = 4.0 * cond_out - 3.0 * uncond_out
        for (y, x), window in zip(some, guided, strict=True):
            total[:, y : y + h, x : x + w] += window
            count[:, y : y + h, x : x + w] += 1
    return total / count


def decode_seconds(model: LatentDiffusion, tiles: int, device: str) -> float:
    """Of so many overlapped tiles in the published way, one after another; some are timed."""
    vae = model.vae
    assert isinstance(vae, VQModel)
    codes = vae.quantize.embedding.weight
    z = codes[torch.randint(len(codes), model.window, device=device)].permute(2, 0, 1)[None]
    weight = torch.rand(model.window[0] * 4, model.window[1] * 4, device=device)
    with exact_convolutions():
        difference = (published_decode(vae, z) - vae.decode(z)).norm() / vae.decode(z).norm()
    if not difference < 1e-3:  # random weights make more of rounding than trained ones
        raise RuntimeError(f"the two decoders differ by {difference:.1e}")
    timed = min(TILES, tiles)
    start = now(device)
    for _ in range(timed):
        (published_decode(vae, z) * weight).sum()
    return (now(device) - start) / timed * tiles


def ours(
    model: LatentDiffusion, preset_name: str, cells: int, steps: int, batch: int, device: str
) -> dict[str, float]:
    """Seconds of our denoising and decoding, counted up to the preset's steps."""
    from sampler import decode_seconds as our_decode

    preset = get_preset(preset_name)
    size = (cells * model.window[0], cells * model.window[1])
    grid = torch.randn(cells, cells, 1, EMBEDDING_WIDTH)
    denoiser = CanvasDenoiser(
        LDMDenoiser(model),
        preset.windows(*size, model.window, seed=0, steps=preset.steps),
        GridField(grid, model.window, preset.interpolation),
        guidance_scale=preset.guidance_scale,
        batch_size=batch,
    )
    noise = canvas_noise(0, model.latent_channels, *size).to(device)
    options: dict[str, Any] = {"schedule": model.schedule, "solver": preset.solver}
    options.update(spacing=preset.spacing, eta=preset.eta)
    sample(denoiser, noise, steps=1, **options)  # what a run does once
    start = now(device)
    canvas = sample(denoiser, noise, steps=steps, **options)
    denoise = (now(device) - start) / steps * preset.steps
    return {"denoise": denoise, "decode": our_decode(model, preset, canvas, batch)}


def best(function: Callable[[], Any], device: str, rounds: int = 2) -> float:
    seconds = []
    for _ in range(rounds):
        start = now(device)
        function()
        seconds.append(now(device) - start)
    return min(seconds)


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", default="paper", choices=["paper", "demo"])
    parser.add_argument("--cells", type=int, help="of the grid, along each side; 4 is published")
    parser.add_argument("--steps", type=int, default=1, help="of our sampler that are timed")
    parser.add_argument("--batch-size", type=int, help="8; on a GPU 64")
    parser.add_argument("--dtype", help="of our U-Net: float32; on a GPU bfloat16")
    chosen = parser.parse_args()
    device = chosen.device
    batch = chosen.batch_size or {"cpu": 8, "cuda": 64}[device]
    dtype = chosen.dtype or {"cpu": "float32", "cuda": "bfloat16"}[device]
    cells = chosen.cells or CELLS[device]
    torch.manual_seed(0)
    model = random_model(chosen.size, device, getattr(torch, dtype))
    published = random_model(chosen.size, device, torch.float32)
    published.unet.to(memory_format=torch.contiguous_format)
    preset = get_preset("authors")
    side = cells * model.window[0]
    plan = preset.windows(side, side, model.window, seed=0, steps=preset.steps)
    assert isinstance(plan, WindowPlan)
    cond = F.normalize(torch.randn(len(plan), 1, EMBEDDING_WIDTH), dim=-1).to(device)
    assert published.conditioner is not None
    tokens = published.conditioner(cond)
    canvas = torch.randn(model.latent_channels, side, side, device=device)
    step = best(lambda: published_step(published, plan, canvas, tokens, batch), device)
    theirs = {
        "denoise": step * preset.steps,
        "decode": decode_seconds(published, len(plan), device),
    }
    figures: dict[str, Any] = {
        "pixels": [side * 4, side * 4],
        "share_of_the_published_image": (cells / 4) ** 2,
        "windows": len(plan),
        "dtype": dtype,
        "batch_size": batch,
        "published": {name: round(seconds, 2) for name, seconds in theirs.items()},
    }
    whole = sum(theirs.values())
    aims = []
    for name in ("authors", "fast"):
        found = ours(model, name, cells, chosen.steps, batch, device)
        ratio = whole / sum(found.values())
        figures[name] = {k: round(seconds, 2) for k, seconds in found.items()}
        figures[name]["times_faster"] = round(ratio, 3)
        if name == "authors":
            aims.append(aim("times the published image, same formulas", ratio, 2.0, "at least"))
        print(name, figures[name], flush=True)
    save("notebook", figures, aims, device)


if __name__ == "__main__":
    main()
