# SPDX-License-Identifier: Apache-2.0
"""Claim: what each option that changes the result gains, and how far it is from the exact path.

The exact path is a preset in float32. Each option is one run of the same region of the demo's slide
with the same noise, and is compared with it: relative error of the last latent, mean difference of
the pixels in grey levels, similarity to the grid (its floor: shuffled cells; its ceiling: the real
image after the autoencoder alone), seams, network evaluations. None is on in a preset.

    python benchmarks/options.py [--part paper|fast|times|network|int8 ...] [--cells 3] [--keep]

- paper, fast: errors, with these presets. "int8 weights" rounds the weights and computes in
  float32, so it shows the error alone.
- times: how many times faster than exact, with the windows of `paper` and fewer steps.
- network: what feature reuse can gain: the outermost level's share of an evaluation, and the bytes
  of the maps that are kept, for the bundled and the published network (random weights).
- int8: PyTorch's int8 operators at the networks' shapes beside ours.

With `--keep` parts may be measured one after another into the same result. On one core `paper`
takes eight minutes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import int8_on_cpu
from demo import reference_pixels, seam_figures, through_autoencoder
from report import RESULTS, aim, commit, save
from sampler import random_model
from ssldiff_fast.canvas import CanvasDenoiser, GridField, LDMDenoiser, Preset, get_preset, sample
from ssldiff_fast.canvas.decode import decode_image
from ssldiff_fast.canvas.noise import canvas_noise
from ssldiff_fast.demo import REGION, demo_slide
from ssldiff_fast.evaluation.similarity import grid_similarity
from ssldiff_fast.models import LatentDiffusion
from ssldiff_fast.models.load import load
from ssldiff_fast.slides.encode import encode
from ssldiff_fast.slides.grid import Grid
from timing import alternate

PARTS = ("paper", "fast", "times", "network", "int8")
WORST = 0.005  # of similarity that an option may lose
GAIN = 1.3  # that feature reuse has to bring
# Of 20 steps as many are guided, and as many evaluate the whole network, as of 50.
TIMED_STEPS, TIMED_CELLS, TIMED_ROUNDS = 20, 2, 5
NETWORK = {"demo": 16, "paper": 2}  # guided pairs of one batch


@dataclass(frozen=True)
class Option:
    """One way that is not exact.

    Attributes:
        interval: guidance within these times alone.
        reuse: steps for each evaluation of the whole network.
        dtype: of the network.
        int8: whether the network's weights are rounded to int8.
    """

    interval: tuple[float, float] | None = None
    reuse: int = 1
    dtype: str = "float32"
    int8: bool = False

    def network(self, model: LatentDiffusion) -> LatentDiffusion:
        """The model with such a network."""
        changed = copy.copy(model)
        changed._modules = {**model._modules, "unet": copy.deepcopy(model.unet)}
        if self.int8:
            int8_on_cpu.round_weights(changed.unet)
        changed.unet.to(getattr(torch, self.dtype))
        return changed


EXACT = "exact"
OPTIONS = {
    EXACT: Option(),
    "guidance from 100 to 900": Option(interval=(100, 900)),
    "guidance from 200 to 800": Option(interval=(200, 800)),
    "bfloat16": Option(dtype="bfloat16"),
    "reuse=2": Option(reuse=2),
    "reuse=3": Option(reuse=3),
    "int8 weights": Option(int8=True),
}


def options_for(preset: Preset) -> dict[str, Option]:
    """Those that the preset's windows allow: maps are reused where windows stay."""
    return {n: o for n, o in OPTIONS.items() if o.reuse == 1 or not preset.shifted}


@dataclass(frozen=True)
class Region:
    """What is synthesised."""

    model: LatentDiffusion
    grid: Grid

    @classmethod
    def of_demo(cls, cells: int) -> Region:
        """The first cells of the demo's region."""
        model = load("he-demo")
        side = model.encoder.spec.patch_px
        place = (*REGION[:2], cells * side, cells * side)
        grid = encode(demo_slide(), model.encoder, region=place, mask=False, progress=False)
        return cls(model, grid)

    def canvas(self, preset: Preset, option: Option) -> CanvasDenoiser:
        model, (rows, columns) = self.model, self.grid.shape
        size = (rows * model.window[0], columns * model.window[1])
        return CanvasDenoiser(
            LDMDenoiser(option.network(model)),
            preset.windows(*size, model.window, seed=0, steps=preset.steps),
            GridField(self.grid.embeddings, model.window, preset.interpolation),
            guidance_scale=preset.guidance_scale,
            guidance_interval=option.interval,
        )

    def sample(self, canvas: CanvasDenoiser, preset: Preset, option: Option) -> Tensor:
        """The last latent [C, H, W]."""
        return sample(
            canvas,
            canvas_noise(0, self.model.latent_channels, *canvas.size),
            schedule=self.model.schedule,
            solver=preset.solver,
            steps=preset.steps,
            spacing=preset.spacing,
            eta=preset.eta,
            reuse=option.reuse,
        )

    def evaluations(self, canvas: CanvasDenoiser, preset: Preset) -> int:
        times = self.model.schedule.timesteps(preset.steps, preset.spacing)
        return sum(canvas.evaluations(step, time)[0] for step, time in enumerate(times))

    def pixels(self, latent: Tensor, preset: Preset) -> np.ndarray:  # [H, W, 3] uint8
        stride, weights = preset.decode_stride(self.model.window), preset.decode_weights
        return decode_image(self.model, latent, stride=stride, weights=weights)

    def again(self, image: np.ndarray) -> Grid:
        """The image's own grid."""
        encoder = self.model.encoder
        return encode(image, encoder, source_mpp=self.grid.mpp, mask=False, progress=False)


def errors(region: Region, preset: Preset) -> dict[str, Any]:
    """Every option beside the exact path."""
    grid = region.grid
    real = through_autoencoder(region.model, reference_pixels(demo_slide(), grid), preset.name)
    found: dict[str, Any] = {
        "steps": preset.steps,
        "cells": list(grid.shape),
        "ceiling": round(grid_similarity(grid, region.again(real)).mean, 4),
    }
    exact: Tensor | None = None
    for name, option in options_for(preset).items():
        canvas = region.canvas(preset, option)
        latent = region.sample(canvas, preset, option)
        image = region.pixels(latent, preset)
        again = region.again(image)
        if exact is None:
            exact, exact_image = latent, image.astype(float)
            found["floor"] = round(grid_similarity(grid.shuffled(), again).mean, 4)
        found[name] = {
            "relative_error": float(f"{float((latent - exact).norm() / exact.norm()):.3g}"),
            "grey_levels": round(float(np.abs(image - exact_image).mean()), 3),
            "similarity": round(grid_similarity(grid, again).mean, 4),
            "seam": seam_figures(image, region.model.encoder.spec.patch_px),
            "evaluations": region.evaluations(canvas, preset),
        }
        print(preset.name, name, found[name], flush=True)
    return found


def errors_of(name: str, cells: int, steps: int | None) -> tuple[Any, list[dict[str, Any]]]:
    preset = get_preset(name)
    preset = dataclasses.replace(preset, steps=steps or preset.steps)
    found = errors(Region.of_demo(cells), preset)
    lost = {
        option: found[EXACT]["similarity"] - found[option]["similarity"]
        for option in options_for(preset)
        if option not in (EXACT, "int8 weights")
    }
    return found, [
        aim(f"similarity lost by {option}, {name}", value, WORST, "at most")
        for option, value in lost.items()
    ]


def times_of() -> tuple[Any, list[dict[str, Any]]]:
    """Seconds of denoising by each option, in turn, and the ratios of their medians."""
    region = Region.of_demo(TIMED_CELLS)
    preset = dataclasses.replace(get_preset("paper"), steps=TIMED_STEPS)
    functions: dict[str, Callable[[], Any]] = {}
    for name, option in OPTIONS.items():
        if not option.int8:
            canvas = region.canvas(preset, option)
            functions[name] = partial(region.sample, canvas, preset, option)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(TIMED_ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    found: dict[str, Any] = {"steps": TIMED_STEPS, "cells": [TIMED_CELLS] * 2}
    found["seconds"] = {
        name: [round(v, 2) for v in sorted(values)] for name, values in seconds.items()
    }
    found["times_faster"] = {name: round(median[EXACT] / v, 3) for name, v in median.items()}
    gain = found["times_faster"]["reuse=2"]
    return found, [aim("times faster by reuse=2, windows of paper", gain, GAIN, "at least")]


@torch.no_grad()
def network_of() -> tuple[Any, list[dict[str, Any]]]:
    """The outermost level's share of an evaluation, what follows for the gain, and the maps."""
    found: dict[str, Any] = {}
    for size, windows in NETWORK.items():
        torch.manual_seed(0)
        unet = random_model(size, "cpu", torch.float32).unet
        side = (32, 32) if size == "demo" else (64, 64)
        x = torch.randn(windows, unet.in_channels, *side)
        context = unet.prepare(torch.randn(2 * windows, 1, unet.context_dim))
        t = unet.prepare_time(torch.tensor(500.0))
        _, deep = unet.with_deep(x, t, context)
        functions = {
            "whole": partial(unet, x, t, context),
            "outermost level": partial(unet.with_deep, x, t, context, deep),
        }
        times = alternate(functions, 5 if size == "paper" else 15)
        share = times["outermost level"]["median_ms"] / times["whole"]["median_ms"]
        found[size] = {
            "ms": {name: one["median_ms"] for name, one in times.items()},
            "share": round(share, 3),
            "times_faster_at_most": {
                f"reuse={n}": round(n / (1 + (n - 1) * share), 3) for n in (2, 3)
            },
            "megabytes_of_a_window": round(deep.nbytes / windows / 1e6, 3),
        }
        print(size, found[size], flush=True)
    return found, []


def kept() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and aims of the last result."""
    path = RESULTS / "options.json"
    last = json.loads(path.read_text()) if path.exists() else {"aims": []}
    return {part: last[part] for part in PARTS if part in last}, last["aims"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--cells", type=int, default=3, help="along each side")
    parser.add_argument("--steps", type=int, help="in place of the preset's own")
    parser.add_argument("--keep", action="store_true", help="what the last result has of the rest")
    chosen = parser.parse_args()
    makers: dict[str, Callable[[], tuple[Any, list[dict[str, Any]]]]] = {
        "paper": lambda: errors_of("paper", chosen.cells, chosen.steps),
        "fast": lambda: errors_of("fast", chosen.cells, chosen.steps),
        "times": times_of,
        "network": network_of,
        "int8": int8_on_cpu.measure,
    }
    figures, aims = kept() if chosen.keep else ({}, [])
    for part in chosen.part or PARTS:
        found, wanted = makers[part]()
        figures[part] = {"commit": commit(), "threads": torch.get_num_threads(), **found}
        names = {one["name"] for one in wanted}
        aims = [one for one in aims if one["name"] not in names] + wanted
        save("options", figures, aims)  # a run that is ended keeps what it has


if __name__ == "__main__":
    main()
