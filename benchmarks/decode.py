# SPDX-License-Identifier: Apache-2.0
"""Claim: decoding costs a tenth of the published notebook's decode, and shows no seam.

A part of the demo's slide goes to latents by overlapping tiles (one encoding of the whole gives
latents that the model never made: colours of another hue) and back by every decoder, with the
bundled model, in one process. The published decode is a plain loop over tiles at a quarter window,
with GroupNorm and SiLU apart; diffusers' is the tiled decode of an AutoencoderKL that holds our
decoder's weights. Differences are in grey levels, to the published decode. Seams are measured where
tiles begin and end, against places of the same phase nearby, beside the source's own figure there.

    python benchmarks/decode.py [--cells 6] [--images FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

import ssldiff_fast as sf
from report import aim, save
from ssldiff_fast.adapters.first_stage import _renamed
from ssldiff_fast.bench.timing import stopwatch
from ssldiff_fast.canvas import DecodeSettings, get_preset, open_decoder
from ssldiff_fast.canvas.feature_map import FeatureMap
from ssldiff_fast.canvas.layerwise import Layerwise
from ssldiff_fast.canvas.tile_decoder import to_bytes
from ssldiff_fast.demo import REGION, demo_slide
from ssldiff_fast.evaluation.seam import measure_seam
from ssldiff_fast.models import LatentDiffusion
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.ops import WindowPlan
from ssldiff_fast.ops.window_plan import gaussian
from ssldiff_fast.slides.reader import open_slide
from timing import peak_megabytes

ROUNDS, SECONDS = 3, 8.0  # of one decoder; the last round is the one that passes the time
PUBLISHED = "published"


@dataclass
class Way:
    """A decode: bands of pixels [n, W, 3], and the latents (y = x) where its tiles begin."""

    bands: Callable[[Tensor], Iterator[np.ndarray]]
    begins: tuple[int, ...]
    side: int = 0  # of a tile, where the next begins before its end


def unfused(vae: Any) -> Any:
    """The same autoencoder with PyTorch's GroupNorm and SiLU one after the other."""
    made = copy.deepcopy(vae)

    def replace(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, GroupNormSiLU):
                norm = nn.GroupNorm(child.num_groups, child.num_channels, eps=child.eps)
                norm.load_state_dict(child.state_dict())
                plain = nn.Sequential(norm, nn.SiLU()) if child.silu else norm
                setattr(module, name, plain)
            else:
                replace(child)

    replace(made)
    return made


@torch.no_grad()
def published(vae: Any, canvas: Tensor, scale: float, plan: WindowPlan) -> Iterator[np.ndarray]:
    """The notebook's decode: tile after tile, weighted by a Gaussian, summed and divided."""
    (h, w), f = plan.window, vae.downsample_factor
    weight = gaussian(h * f)[:, None] * gaussian(w * f)
    total = torch.zeros(3, plan.height * f, plan.width * f)
    weights = torch.zeros_like(total[0])
    for y in plan.origins_y:
        for x in plan.origins_x:
            tile = vae.decode(canvas[None, :, y : y + h, x : x + w] / scale)[0]
            here = slice(y * f, (y + h) * f), slice(x * f, (x + w) * f)
            total[:, here[0], here[1]] += tile * weight
            weights[here] += weight
    yield to_bytes(total / weights)


def of_diffusers(model: LatentDiffusion) -> Any:
    """diffusers' AutoencoderKL with our decoder's weights, tiled; codes are looked up before it."""
    config = model.vae.ddconfig
    widths = tuple(config["ch"] * mult for mult in config["ch_mult"])
    window = model.window[0]
    theirs = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=config["num_res_blocks"],
        latent_channels=config["z_channels"],
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        sample_size=window * model.downsample_factor,
    )
    ours = model.vae.state_dict()
    state = theirs.state_dict()
    for name, value in state.items():
        if name.startswith(("decoder.", "post_quant_conv.")):
            state[name] = ours[_renamed(name, len(widths))].reshape(value.shape)
    theirs.load_state_dict(state)
    theirs.enable_tiling()
    return theirs.eval()


@torch.no_grad()
def by_diffusers(theirs: Any, model: LatentDiffusion, canvas: Tensor) -> Iterator[np.ndarray]:
    codes, _ = model.vae.quantize(canvas[None] / model.scale_factor)
    yield to_bytes(theirs.decode(codes).sample[0])


def ways(model: LatentDiffusion, size: tuple[int, int]) -> dict[str, Way]:
    """All decodes by name."""
    window = model.window
    quarter = window[0] // 4
    plain, theirs = unfused(model.vae), of_diffusers(model)

    def plan(stride: int) -> WindowPlan:
        return WindowPlan.regular(*size, window, stride)

    def ours(settings: DecodeSettings) -> Callable[[Tensor], Iterator[np.ndarray]]:
        return lambda canvas: open_decoder(model, _size(canvas), settings).decode([canvas])

    made = {
        PUBLISHED: Way(
            lambda canvas: published(
                plain,
                canvas,
                model.scale_factor,
                WindowPlan.regular(*_size(canvas), window, quarter),
            ),
            plan(quarter).origins_y,
        ),
        "reference": Way(ours(DecodeSettings()), plan(quarter).origins_y),
    }
    fast = get_preset("fast")
    strides = {"half a window": window[0] // 2, "preset fast": fast.decode_stride(window)[0]}
    for name, stride in strides.items():
        settings = DecodeSettings(stride=stride, weights="hann")
        made[f"reference, Hann, {name}"] = Way(ours(settings), plan(stride).origins_y, window[0])
    tile = 2 * window[0]
    made["local"] = Way(ours(DecodeSettings("local")), tuple(range(0, size[0], tile)))
    made["global"] = Way(ours(DecodeSettings("global")), tuple(range(0, size[0], window[0])))
    made["diffusers, tiled"] = Way(
        lambda canvas: by_diffusers(theirs, model, canvas),
        tuple(range(0, size[0], int(window[0] * (1 - theirs.tile_overlap_factor)))),
        window[0],
    )
    return made


def _size(canvas: Tensor) -> tuple[int, int]:
    return int(canvas.shape[1]), int(canvas.shape[2])


def source(cells: int, side: int) -> np.ndarray:  # [H, W, 3] uint8
    """A square of the demo's region, from its upper right corner: tissue and glass."""
    x, y, width, _ = REGION
    pixels = cells * side
    with open_slide(demo_slide()) as slide:
        return slide.read_region_at(
            x + width - pixels, y, pixels, pixels, out_size=(pixels, pixels)
        )


def seam(image: np.ndarray, way: Way, factor: int) -> Any:
    """The seam figure where tiles begin and where those that overlap end."""
    ends = {begin + way.side for begin in way.begins} if way.side else set()
    lines = sorted({*way.begins, *ends})
    at = [line * factor for line in lines if 0 < line * factor < len(image)]
    return measure_seam(image, rows=at, columns=at, period=8, near=16)


def timed(
    found: dict[str, Way], canvas: Tensor
) -> tuple[dict[str, list[float]], dict[str, np.ndarray], dict[str, float]]:
    """Seconds of each round, images, and megabytes, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    images: dict[str, np.ndarray] = {}
    memory: dict[str, float] = {}
    watch = stopwatch("cpu")
    for way in found.values():
        list(way.bands(canvas[:, : canvas.shape[1] // 3, : canvas.shape[2] // 3]))
    for round_ in range(ROUNDS):
        for name, way in found.items():
            if sum(seconds[name]) >= SECONDS:
                continue

            def once(name: str = name, way: Way = way) -> None:
                made: list[np.ndarray] = []
                seconds[name].append(watch(lambda: made.extend(way.bands(canvas))) / 1e3)
                images[name] = np.concatenate(made)

            if round_ == 0:
                memory.update(peak_megabytes({name: once}, "cpu"))
            else:
                once()
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    return seconds, images, memory


@torch.no_grad()
def global_error(model: LatentDiffusion, canvas: Tensor, folder: Path) -> float:
    """Largest difference of the global decoder to the undivided network, image in [-1, 1]."""
    latent = canvas[:, :64, :64] / model.scale_factor
    source = FeatureMap.of(latent, folder, next(model.vae.parameters()))
    bands = torch.cat(list(Layerwise(model.vae, folder).decode(source)), dim=2)
    return float((bands - model.vae.decode(latent[None])).abs().max())


def figures_of(
    name: str, way: Way, images: dict[str, np.ndarray], image: np.ndarray, factor: int
) -> dict[str, Any]:
    made = images[name]
    difference = np.abs(made.astype(int) - images[PUBLISHED])
    own, real = seam(made, way, factor), seam(image, way, factor)
    mse = np.mean((made.astype(float) - image) ** 2)
    return {
        "equal_bytes": round(float((difference == 0).mean()), 5),
        "mean_difference": round(float(difference.mean()), 3),
        "largest_difference": int(difference.max()),
        "seam": round(own.figure, 4),
        "seam_deviations": round(own.deviations, 2),
        "seam_of_the_source": round(real.figure, 4),
        "psnr": round(float(10 * np.log10(255**2 / mse)), 2),
    }


def aims_of(figures: dict[str, Any], error: float) -> list[dict[str, Any]]:
    exact = figures["reference"]
    made = [
        aim("reference: times the published decode", exact["times"], 1.5, "at least"),
        aim("reference: share of equal bytes", exact["equal_bytes"], 0.999, "at least"),
        aim("global: difference to the undivided decode", error, 1e-4, "at most"),
    ]
    for name in ("local", "reference, Hann, preset fast"):
        own = figures[name]
        made += [
            aim(f"{name}: times the published decode", own["times"], 10, "at least"),
            aim(f"{name}: mean difference, grey levels", own["mean_difference"], 1, "at most"),
            aim(
                f"{name}: seam, how many times what is chance", own["seam_deviations"], 3, "at most"
            ),
        ]
    return made


def main() -> None:
    # Not of `make gpu`: it needs a slide and a library that a GPU machine may lack.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cells", type=int, default=6, choices=range(5, 9), help="of 128 pixels, along each side"
    )
    parser.add_argument("--images", type=Path, help="folder for the images, to be looked at")
    chosen = parser.parse_args()
    model = sf.load("he-demo")
    factor = model.downsample_factor
    image = source(chosen.cells, model.window[0] * factor)
    start = time.perf_counter()
    canvas = sf.encode_image(model, image)
    encoded = time.perf_counter() - start
    found = ways(model, _size(canvas))
    seconds, images, memory = timed(found, canvas)
    base = median(seconds[PUBLISHED])
    figures = {
        name: {
            "times": round(base / median(seconds[name]), 2),
            "seconds": [round(value, 3) for value in seconds[name]],
            "peak_megabytes": memory.get(name),
            **figures_of(name, way, images, image, factor),
        }
        for name, way in found.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        error = global_error(model, canvas, Path(folder))
    for name, own in figures.items():
        print(name, own)
    if chosen.images:
        from PIL import Image

        for name, pixels in {"source": image, **images}.items():
            Image.fromarray(pixels).save(chosen.images / f"{name}.png")
    shape = {"canvas": list(canvas.shape), "encode_seconds": round(encoded, 2)}
    save("decode", {**shape, "decoders": figures}, aims_of(figures, error))


if __name__ == "__main__":
    main()
