# SPDX-License-Identifier: Apache-2.0
"""Claim: glass that a mask leaves out is even, of the colour beside tissue, and costs no decoding.

Beside tissue its steps are no larger than the real slide's.

Rows of the demo's slide become a grid with its mask, and one canvas is denoised from it (preset
`fast`). Every decoder makes pixels of that canvas twice in turns: of all tiles, as without a mask,
and with plain glass and the tiles' whites balanced. The real slide's own figures stand beside them.

    python benchmarks/glass.py [--first 5] [--rows 6]
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor

from report import aim, save
from ssldiff_fast.bench.timing import stopwatch
from ssldiff_fast.canvas.decode import DecodeSettings, open_decoder
from ssldiff_fast.demo import demo_slide
from ssldiff_fast.evaluation import measure_glass
from ssldiff_fast.models.load import load
from ssldiff_fast.slides.encode import encode
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.slides.reader import open_slide
from ssldiff_fast.synthesis_plan import Geometry, Plan, settle

ROUNDS = 3
SIDE = 128  # pixels of a cell of the result
STAINED = 200  # grey level under which a pixel's darkest channel is


def part(grid: Grid, rows: slice) -> Grid:
    """Some rows of cells."""
    return dataclasses.replace(grid, embeddings=grid.embeddings[rows], valid=grid.valid[rows])


def real(grid: Grid, rows: slice) -> np.ndarray:
    """The pixels of the slide that the rows are of, at the model's scale."""
    x, y, width, _ = grid.region_px
    count = rows.stop - rows.start
    size = grid.shape[1] * SIDE, count * SIDE
    with open_slide(demo_slide()) as slide:
        top = y + rows.start * grid.cell_px
        return slide.read_region_at(x, top, width, count * grid.cell_px, out_size=size)


def compared(plan: Plan, settings: DecodeSettings, canvas: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds and figures of one decoder, with all tiles and with plain glass, in turns."""
    tissue = plan.grid.valid.numpy()
    ways = {"all tiles": None, "plain glass": plan.decoder().glass}  # type: ignore[attr-defined]
    images: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {kind: [] for kind in ways}
    watch = stopwatch("cpu")
    size = plan.canvas_denoiser.size

    def once(kind: str) -> None:
        bands = open_decoder(plan.model, size, settings, glass=ways[kind]).decode([canvas])
        images[kind] = np.concatenate([np.asarray(band) for band in bands])

    for _ in range(rounds):
        for kind in ways:
            seconds[kind].append(watch(partial(once, kind)) / 1e3)
    times = {kind: median(values) for kind, values in seconds.items()}
    inside = tissue.repeat(SIDE, 0).repeat(SIDE, 1)
    before, after = (image.astype(int) for image in images.values())
    stained = inside & (before.min(2) < STAINED)
    return {
        "times faster": times["all tiles"] / times["plain glass"],
        "seconds": times,
        **{kind: vars(measure_glass(image, tissue)) for kind, image in images.items()},
        "tissue's change in grey levels": float(np.abs(after - before)[stained].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=5, help="first row of cells")
    parser.add_argument("--rows", type=int, default=6, help="rows of cells")
    given = parser.parse_args()
    rows = slice(given.first, given.first + given.rows)
    model = load("he-demo")
    slide = encode(demo_slide(), model.encoder, progress=False)
    plan = Plan.make(model, part(slide, rows), settle("fast"), 0, Geometry(mask=True), 16)
    canvas = plan.denoise(0, state=None, resume=None, callback=None, progress=True)
    tissue = plan.grid.valid.numpy()
    figures: dict[str, Any] = {
        "compared": "decoding all tiles / with plain glass",
        "cells": list(tissue.shape),
        "with tissue": float(tissue.mean()),
        "real slide": vars(measure_glass(real(slide, rows), tissue)),
    }
    aims, bound = [], figures["real slide"]["step"]
    ways = {
        "fast": (plan.decode_settings, ROUNDS),
        "local": (DecodeSettings("local", batch_size=4), ROUNDS),
        "reference": (DecodeSettings(batch_size=4), 1),
    }
    for name, (settings, rounds) in ways.items():
        found = figures[name] = compared(plan, settings, canvas, rounds)
        print(name, found, flush=True)
        plain = found["plain glass"]
        aims += [
            aim(f"{name}: largest step in glass that is left out", plain["beyond"], 0, "at most"),
            aim(f"{name}: its colour, to that beside tissue", plain["colour"], 1, "at most"),
            aim(f"{name}: step that 1 % exceed", plain["step"], bound, "at most"),
        ]
    save("glass", figures, aims)


if __name__ == "__main__":
    main()
