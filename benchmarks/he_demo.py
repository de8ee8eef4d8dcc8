# SPDX-License-Identifier: Apache-2.0
"""The bundled model on the images that were set aside before its training.

Each image is encoded to a grid, synthesized from it and encoded again. Ceiling: the real image
after the autoencoder alone. Floor: the cells' embeddings against other cells of the result.

    python benchmarks/he_demo.py --data FOLDER [--recipe he-demo] [--model he-demo]

FOLDER is what `ssldiff train --data` was given.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo import read_image, through_autoencoder
from report import aim, save
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.load import load
from ssldiff_fast.slides.encode import encode
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.synthesis import synthesize
from ssldiff_fast.training.data import PatchPool
from ssldiff_fast.training.recipe import DataRecipe, read_recipe


@dataclass(frozen=True)
class Trial:
    """One image that was set aside: unit embeddings [N, D], and the autoencoder's error."""

    name: str
    grid: Tensor
    result: Tensor
    decoded: Tensor
    mse: float


def cells(grid: Grid) -> Tensor:  # [N, D] of length 1
    return torch.nn.functional.normalize(grid.embeddings.flatten(0, 1).flatten(1), dim=1)


def trial(model: LatentDiffusion, name: str, pixels: np.ndarray, folder: Path) -> Trial:
    side, mpp = model.encoder.spec.patch_px, model.encoder.spec.mpp
    height, width = (length // side * side for length in pixels.shape[:2])
    image = np.ascontiguousarray(pixels[:height, :width])

    def grid_of(of: np.ndarray) -> Grid:
        return encode(of, model.encoder, source_mpp=mpp, mask=False, progress=False)

    grid = grid_of(image)
    out = folder / f"{Path(name).stem}.tif"
    made = synthesize(model, grid, out, codec="deflate", progress=False)
    decoded = through_autoencoder(model, image, "fast")
    mse = float(np.mean((decoded.astype(float) - image) ** 2))
    result = cells(grid_of(read_image(made.path)))
    return Trial(name, cells(grid), result, cells(grid_of(decoded)), mse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", default="he-demo")
    parser.add_argument("--model", default="he-demo")
    arguments = parser.parse_args()
    model = load(arguments.model)
    pool = PatchPool(read_recipe(arguments.recipe, DataRecipe), arguments.data, split="holdout")
    with tempfile.TemporaryDirectory() as folder:
        trials = [trial(model, im.name, im.pixels, Path(folder)) for im in pool.images]
    grid, result, decoded = (
        torch.cat([getattr(t, part) for t in trials]) for part in ("grid", "result", "decoded")
    )
    cosines = grid @ result.T
    similarity, ceiling = float(cosines.diag().mean()), float((grid * decoded).sum(1).mean())
    floor = float((cosines.sum() - cosines.diag().sum()) / (cosines.numel() - len(grid)))
    figures = {
        "model": arguments.model,
        "images": [t.name for t in trials],
        "cells": len(grid),
        "similarity": round(similarity, 4),
        "ceiling": round(ceiling, 4),
        "floor": round(floor, 4),
        "autoencoder_psnr": round(
            float(np.mean([10 * np.log10(255**2 / t.mse) for t in trials])), 2
        ),
    }
    share = (similarity - floor) / (ceiling - floor)
    aims = [aim("similarity of what was set aside, share of the way", share, 0.9, "at least")]
    save("he_demo", figures, aims)


if __name__ == "__main__":
    main()
