# SPDX-License-Identifier: Apache-2.0
"""The demo, measured: seconds of each stage, similarity between two anchors, and seams.

The similarity is the cosine between each cell of the grid and the same cell of the result encoded
again. Its ceiling is the real image after the autoencoder alone, its floor a shuffled grid.

    python benchmarks/demo.py [--preset fast] [--slide MY.svs --region x,y,w,h]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from report import aim, save
from ssldiff_fast.canvas.decode import decode_image
from ssldiff_fast.canvas.presets import get_preset
from ssldiff_fast.demo import Demo, demo_slide, run_demo
from ssldiff_fast.evaluation.seam import measure_seam
from ssldiff_fast.evaluation.similarity import Similarity, grid_similarity
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.load import load
from ssldiff_fast.slides.encode import encode
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.slides.reader import open_slide


@torch.no_grad()
def through_autoencoder(
    model: LatentDiffusion,
    image: np.ndarray,  # [H, W, 3] uint8
    preset: str,
) -> np.ndarray:  # [H, W, 3] uint8
    """The image after the autoencoder alone, encoded by patches and decoded as a result is."""
    side = model.encoder.spec.patch_px
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    rows = [
        torch.cat([model.to_latent(patch[None])[0] for patch in row.split(side, 2)], 2)
        for row in pixels.split(side, 1)
    ]
    settings = get_preset(preset)
    stride, weights = settings.decode_stride(model.window), settings.decode_weights
    return decode_image(model, torch.cat(rows, 1), stride=stride, weights=weights)


def read_image(path: Path) -> np.ndarray:  # [H, W, 3] uint8
    with open_slide(path) as slide:
        return slide.read_region_at(0, 0, *slide.size_px, out_size=slide.size_px)


def reference_pixels(slide: Path, grid: Grid) -> np.ndarray:  # [H, W, 3] uint8
    """The region that the grid was made from, at the grid's resolution."""
    rows, columns = grid.shape
    with open_slide(slide) as source:
        size = (columns * grid.cell_px, rows * grid.cell_px)
        return source.read_region_at(*grid.region_px, out_size=size)


def seam_figures(
    image: np.ndarray,  # [H, W, 3] uint8
    cell_px: int,
) -> dict[str, float]:
    """The seam figure at the borders of cells, with how far from 1 it may lie by chance.

    `near` compares only with places of the same phase (of 8 pixels: the decoder's texture, and the
    JPEG blocks of a real slide) at most 16 pixels away, and is three times less noisy.
    """
    plain, near = measure_seam(image, cell_px), measure_seam(image, cell_px, period=8, near=16)
    figures = {
        "figure": plain.figure,
        "chance": plain.noise,
        "near": near.figure,
        "near_chance": near.noise,
    }
    return {name: round(value, 4) for name, value in figures.items()}


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    slide = arguments.slide or demo_slide()
    with tempfile.TemporaryDirectory() as folder:
        made = run_demo(
            folder,
            slide=arguments.slide,
            region=arguments.region,
            preset=arguments.preset,
            model=arguments.model,
            seed=arguments.seed,
            codec="deflate",  # JPEG's blocks of 8 would count as seams
        )
        grid, result = Grid.open(made.grid), read_image(made.image)
    model = load(arguments.model)
    real = reference_pixels(slide, grid)
    decoded = through_autoencoder(model, real, arguments.preset)
    ceiling = grid_similarity(
        grid, encode(decoded, model.encoder, source_mpp=grid.mpp, mask=False, progress=False)
    )
    seams = {
        name: seam_figures(image, grid.cell_px)
        for name, image in {"result": result, "real": real, "autoencoder": decoded}.items()
    }
    mse = np.mean((decoded.astype(float) - real) ** 2)
    figures = {
        "preset": arguments.preset,
        "model": arguments.model,
        "seed": arguments.seed,
        "size_px": list(made.size_px),
        "seconds": {stage: round(value, 2) for stage, value in made.seconds.items()},
        "seconds_in_all": round(sum(made.seconds.values()), 2),
        "similarity": made.similarity.summary(),
        "ceiling": ceiling.summary(),
        "floor": made.floor.summary(),
        "seam": seams,
        "autoencoder_psnr": round(float(10 * np.log10(255**2 / mse)), 2),
    }
    return figures, aims_of(made, ceiling, seams["result"])


def aims_of(made: Demo, ceiling: Similarity, seam: dict[str, float]) -> list[dict[str, Any]]:
    floor = made.floor.mean
    share = (made.similarity.mean - floor) / (ceiling.mean - floor)
    return [
        aim("similarity, share of the way from floor to ceiling", share, 0.9, "at least"),
        aim("seam, distance from 1", abs(seam["figure"] - 1), 0.02, "at most"),
        aim("seam against what is near, distance from 1", abs(seam["near"] - 1), 0.02, "at most"),
        aim("seconds of the demo", sum(made.seconds.values()), 120, "at most"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--model", default="he-demo")
    parser.add_argument("--slide", type=Path)
    parser.add_argument("--region", type=lambda text: tuple(int(v) for v in text.split(",")))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures, aims = measure(arguments)
    name = "demo" if arguments.preset == "fast" else f"demo_{arguments.preset}"
    save(name, figures, aims)


if __name__ == "__main__":
    main()
