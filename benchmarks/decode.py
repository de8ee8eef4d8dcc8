# SPDX-License-Identifier: Apache-2.0
"""Claim: decoding costs a tenth of the published notebook's decode, and shows no seam.

A part of the demo's slide goes to latents by overlapping tiles (one encoding of the whole gives
latents that the model never made: colours of another hue) and back by every decoder, with the
bundled model, in one process. The published decode is a plain loop over tiles at a quarter window,
in plain PyTorch; diffusers' is the tiled decode of an AutoencoderKL that holds the same weights.
Differences are in grey levels, to the published decode. Seams are measured where tiles begin and
end, against places of the same phase nearby, beside the source's own figure there.

The published size, with random weights, is timed by the latent in the middle of a large canvas:
a tile of each decoder over the latents that it adds.

    python benchmarks/decode.py [--cells 6] [--image FILE] [--images FOLDER]

Where the demo's slide can't be had and no image is given, latents are codes at random, which the
result states.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ssldiff_fast as sf
from published_decode import published_decode
from report import aim, save
from ssldiff_fast.bench.timing import stopwatch
from ssldiff_fast.canvas import DecodeSettings, get_preset, open_decoder
from ssldiff_fast.canvas.feature_map import FeatureMap
from ssldiff_fast.canvas.layerwise import Layerwise
from ssldiff_fast.canvas.tile_decoder import to_bytes
from ssldiff_fast.demo import REGION, demo_slide
from ssldiff_fast.evaluation.seam import measure_seam
from ssldiff_fast.models import LatentDiffusion, VQModel
from ssldiff_fast.models.local_autoencoder import measure_statistics
from ssldiff_fast.models.region_decoder import region_decoder
from ssldiff_fast.ops import WindowPlan
from ssldiff_fast.ops.window_plan import gaussian
from ssldiff_fast.slides.reader import open_slide
from ssldiff_fast.synthesis_plan import CPU_TILES
from tiled_decode import HAS_DIFFUSERS, step, tiled_decoder
from timing import peak_megabytes

# Of one decoder; the last round is the one that passes the time, but for the baseline, which varies
# as much as the others.
ROUNDS, SECONDS = 3, 8.0
PUBLISHED, TILED = "published", "diffusers, tiled"
OWN, FIXED = "local, own statistics", "local, fixed statistics"
NARROW = f"{OWN}, bfloat16"
# The paper's autoencoder.
VQ_F4 = {"ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "z_channels": 3}


@dataclass
class Way:
    """A decode: bands of pixels [n, W, 3], and the latents where its tiles begin."""

    bands: Callable[[Tensor], Iterator[np.ndarray]]
    begins: tuple[int, ...]
    side: int = 0  # of a tile, where the next begins before its end
    across: tuple[int, ...] | None = None  # where they begin along x, if elsewhere than along y


@torch.no_grad()
def published(vae: Any, canvas: Tensor, scale: float, plan: WindowPlan) -> Iterator[np.ndarray]:
    """The notebook's decode: tile after tile, weighted by a Gaussian, summed and divided."""
    (h, w), f = plan.window, vae.downsample_factor
    weight = gaussian(h * f)[:, None] * gaussian(w * f)
    total = torch.zeros(3, plan.height * f, plan.width * f)
    weights = torch.zeros_like(total[0])
    for y in plan.origins_y:
        for x in plan.origins_x:
            tile = published_decode(vae, canvas[None, :, y : y + h, x : x + w] / scale)[0]
            here = slice(y * f, (y + h) * f), slice(x * f, (x + w) * f)
            total[:, here[0], here[1]] += tile * weight
            weights[here] += weight
    yield to_bytes(total / weights)


def settings(decoder: str = "reference", **options: Any) -> DecodeSettings:
    """With as many tiles at once as a synthesis takes on a CPU."""
    return DecodeSettings(decoder, batch_size=CPU_TILES, **options)


def ways(model: LatentDiffusion, size: tuple[int, int]) -> dict[str, Way]:
    """All decodes by name."""
    window = model.window
    quarter = window[0] // 4
    tiled = tiled_decoder(model)

    def plan(stride: int, of: tuple[int, int] = size) -> WindowPlan:
        return WindowPlan.regular(*of, window, stride)

    def ours(
        chosen: DecodeSettings, model: LatentDiffusion = model
    ) -> Callable[[Tensor], Iterator[np.ndarray]]:
        return lambda canvas: open_decoder(model, _size(canvas), chosen).decode([canvas])

    @torch.no_grad()
    def by_diffusers(canvas: Tensor) -> Iterator[np.ndarray]:
        yield to_bytes(tiled(canvas[None] / model.scale_factor)[0])

    def by_notebook(canvas: Tensor) -> Iterator[np.ndarray]:
        return published(model.vae, canvas, model.scale_factor, plan(quarter, _size(canvas)))

    made = {
        PUBLISHED: Way(by_notebook, plan(quarter).origins_y),
        "reference": Way(ours(settings()), plan(quarter).origins_y),
    }
    local = settings("local", fixed=False)
    begins = plan(window[0] // 2).origins_y, window[0], plan(quarter).origins_x
    made[OWN] = Way(ours(local), *begins)
    narrow = copy.deepcopy(model)
    narrow.vae.decoder.bfloat16()
    made[NARROW] = Way(ours(local, narrow), *begins)
    stride = get_preset("fast").decode_stride(window)[0]
    fast = settings(stride=stride, weights="hann")
    made["preset fast"] = Way(ours(fast), plan(stride).origins_y, window[0])
    tiles = tuple(range(0, size[0], 2 * window[0]))
    made[FIXED] = Way(ours(settings("local", fixed=True)), tiles)
    made["global"] = Way(ours(settings("global")), tuple(range(0, size[0], window[0])))
    tiles = tuple(range(0, size[0], step(window[0])))
    made[TILED] = Way(by_diffusers, tiles, window[0])
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
    rows, columns = (
        sorted({*begins, *(begin + way.side for begin in begins)})
        for begins in (way.begins, way.begins if way.across is None else way.across)
    )
    at, across = (
        [line * factor for line in lines if 0 < line * factor < len(image)]
        for lines in (rows, columns)
    )
    return measure_seam(image, rows=at, columns=across, period=8, near=16)


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
            if sum(seconds[name]) >= SECONDS and name != PUBLISHED:
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
    features = FeatureMap.of(latent, folder, next(model.vae.parameters()))
    bands = torch.cat(list(Layerwise(model.vae, folder).decode(features)), dim=2)
    return float((bands - published_decode(model.vae, latent[None])).abs().max())


@torch.no_grad()
def published_size(window: int = 64) -> dict[str, Any]:
    """Milliseconds for each latent in the middle of a large canvas, and how many times faster."""
    torch.manual_seed(0)
    vae = VQModel(ddconfig=VQ_F4, n_embed=8192, embed_dim=3).eval()
    narrow = copy.deepcopy(vae)
    narrow.decoder.bfloat16()
    codes = vae.quantize.embedding.weight
    z = codes[torch.randint(len(codes), (4 * window, 4 * window))].permute(2, 0, 1)[None]
    tile = z[:, :, :window, :window]
    regions = region_decoder(vae, measure_statistics(vae, vae.decode, tile), (window, window), 3)
    middle = 100 * window, 102 * window
    rows, columns = (regions.reach(middle, 1000 * window, axis=axis) for axis in range(2))
    height, width = (reach.read[1] - reach.read[0] for reach in (rows, columns))
    region = z[:, :, :height, :width]
    found: dict[str, tuple[Callable[[], Any], int]] = {
        PUBLISHED: (lambda: published_decode(vae, tile), (window // 4) ** 2),
        "reference": (lambda: vae.decode(tile), (window // 4) ** 2),
        OWN: (lambda: vae.decode(tile), (window // 2) ** 2),
        NARROW: (lambda: narrow.decode(tile), (window // 2) ** 2),
        FIXED: (lambda: regions.decode(region, rows=rows, columns=columns), 4 * window**2),
    }
    watch = stopwatch("cpu")
    spent = {  # the first call packs weights, so the better of two
        name: min(watch(function) for _ in range(2)) / latents
        for name, (function, latents) in found.items()
    }
    return {
        name: {"times": round(spent[PUBLISHED] / own, 2), "milliseconds_a_latent": round(own, 4)}
        for name, own in spent.items()
    }


def figures_of(
    name: str, way: Way, images: dict[str, np.ndarray], image: np.ndarray | None, factor: int
) -> dict[str, Any]:
    """Of one decoder's pixels beside the published ones and, where there is one, the source."""
    made = images[name]
    difference = np.abs(made.astype(int) - images[PUBLISHED])
    own = seam(made, way, factor)
    figures = {
        "equal_bytes": round(float((difference == 0).mean()), 5),
        "mean_difference": round(float(difference.mean()), 3),
        "largest_difference": int(difference.max()),
        "seam": round(own.figure, 4),
        "seam_deviations": round(own.deviations, 2),
    }
    if image is None:
        return figures
    mse = np.mean((made.astype(float) - image) ** 2)
    return {
        **figures,
        "seam_of_the_source": round(seam(image, way, factor).figure, 4),
        "psnr": round(float(10 * np.log10(255**2 / mse)), 2),
    }


def aims_of(figures: dict[str, Any], error: float, local_name: str) -> list[dict[str, Any]]:
    """The aims of the issue; of the local decoders for the one that the model chooses."""
    exact = figures["reference"]
    locals_ = [name for name in figures if name.startswith(local_name)]
    return [
        aim("reference: times the published decode", exact["times"], 1.5, "at least"),
        aim("reference: share of equal bytes", exact["equal_bytes"], 0.999, "at least"),
        aim("global: difference to the undivided decode", error, 1e-4, "at most"),
        *(found for name in locals_ for found in _local_aims(name, figures[name])),
    ]


def published_size_aims(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Of windows of 64 latents at every 16, as published; its weights are not at hand."""
    return [
        aim(
            f"{name}: times the published decode, published size",
            figures[name]["times"],
            10,
            "at least",
        )
        for name in (OWN, NARROW)
    ]


def _local_aims(name: str, figures: dict[str, Any]) -> list[dict[str, Any]]:
    chance = f"{name}: seam, how many times what is chance"
    return [
        aim(f"{name}: times the published decode", figures["times"], 10, "at least"),
        aim(f"{name}: mean difference, grey levels", figures["mean_difference"], 1, "at most"),
        aim(chance, figures["seam_deviations"], 3, "at most"),
    ]


def latents_of(
    model: LatentDiffusion, chosen: argparse.Namespace
) -> tuple[str, np.ndarray | None, Tensor]:
    """What was encoded, its pixels, and the canvas."""
    side = model.window[0] * model.downsample_factor
    name, image = "the demo's slide", None
    if chosen.image:
        name = chosen.image.name
        whole = np.asarray(Image.open(chosen.image).convert("RGB"))
        rows, columns = (length // side * side for length in whole.shape[:2])
        edge = min(rows, columns, chosen.cells * side)
        image = np.ascontiguousarray(whole[:edge, :edge])
    else:
        try:
            image = source(chosen.cells, side)
        except (OSError, RuntimeError) as problem:
            print(f"no slide, so codes at random: {problem}")
    if image is not None:
        return name, image, sf.encode_image(model, image)
    codes = model.vae.quantize.embedding.weight
    size = [chosen.cells * side for side in model.window]
    index = torch.randint(len(codes), size, generator=torch.Generator().manual_seed(0))
    return "codes at random", None, codes[index].permute(2, 0, 1) * model.scale_factor


@torch.no_grad()
def main() -> None:
    # Not of `make gpu`: it needs a slide that a GPU machine may lack.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cells", type=int, default=6, choices=range(5, 9), help="of 128 pixels, along each side"
    )
    parser.add_argument("--image", type=Path, help="what is encoded, instead of the demo's slide")
    parser.add_argument("--images", type=Path, help="folder for the images, to be looked at")
    chosen = parser.parse_args()
    model = sf.load("he-demo")
    factor = model.downsample_factor
    name, image, canvas = latents_of(model, chosen)
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
    for way, own in figures.items():
        print(way, own)
    if chosen.images:
        pictures = images if image is None else {"source": image, **images}
        for way, pixels in pictures.items():
            Image.fromarray(pixels).save(chosen.images / f"{way}.png")
    chosen_local = FIXED if model.statistics else OWN
    published_sized = published_size()
    result = {
        "source": name,
        "local": chosen_local,
        "canvas": list(canvas.shape),
        "tiles_of_diffusers": HAS_DIFFUSERS,
        "decoders": figures,
        "published_size": published_sized,
    }
    aims = [*aims_of(figures, error, chosen_local), *published_size_aims(published_sized)]
    save("decode", result, aims)


if __name__ == "__main__":
    main()
