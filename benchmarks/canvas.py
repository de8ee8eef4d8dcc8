# SPDX-License-Identifier: Apache-2.0
"""What the canvas sampler costs beside the network, and what its windows cost in quality.

    python benchmarks/canvas.py [--part overhead|state|memory|mask|presets ...] [--cells 4]

- overhead: share of the time that is not the network, with the bundled model: total less network.
- state: share of the time that writing states takes.
- memory: peak resident memory of the wavefront order for canvases of 1k to 64k rows, with a stub
  for a network, each in a process of its own.
- mask: evaluations of the network with and without the tissue mask of a round piece of tissue.
- presets: evaluations, similarity and seams of `fast`, and of `paper` with shifted windows,
  beside `paper`, on a region of the demo's slide.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo import read_image
from report import aim, save
from ssldiff_fast.canvas import (
    CanvasDenoiser,
    GridField,
    LDMDenoiser,
    Preset,
    StateFolder,
    TissueMask,
    canvas_noise,
    get_preset,
    sample,
    sample_rows,
)
from ssldiff_fast.demo import REGION, demo_slide, encode_again
from ssldiff_fast.diffusion import Schedule
from ssldiff_fast.evaluation.seam import measure_seam
from ssldiff_fast.evaluation.similarity import grid_similarity
from ssldiff_fast.models.load import load
from ssldiff_fast.ops import philox_normal
from ssldiff_fast.slides.encode import encode
from ssldiff_fast.synthesis import synthesize
from timing import peak_resident

PARTS = ("overhead", "state", "memory", "mask", "presets")
ROWS = (1_024, 4_096, 16_384, 65_536)
STUB_WINDOW = (32, 32)
STUB_WIDTH = 256


class Timed(LDMDenoiser):
    """The network, and the seconds spent in it."""

    seconds = 0.0

    def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
        start = time.perf_counter()
        output = super().__call__(x, t, state, index)
        self.seconds += time.perf_counter() - start
        return output


def bundled_run(preset: Preset, cells: int, **options: Any) -> tuple[float, float]:
    """Seconds of a run of the bundled model on random embeddings, in all and in the network."""
    model = load("he-demo")
    network = Timed(model)
    size = (cells * model.window[0], cells * model.window[1])
    embeddings = philox_normal(0, cells, (0, cells), model.encoder.spec.width)[:, :, None]
    canvas = CanvasDenoiser(
        network,
        preset.windows(*size, model.window, seed=0),
        GridField(embeddings, model.window, preset.interpolation),
        guidance_scale=preset.guidance_scale,
    )
    settings = {"schedule": model.schedule, "solver": preset.solver, "steps": preset.steps}
    noise = canvas_noise(0, model.latent_channels, *size)
    sample(canvas, noise, **{**settings, "steps": 1})  # chooses kernels
    network.seconds, start = 0.0, time.perf_counter()
    sample(canvas, noise, eta=preset.eta, **settings, **options)
    return time.perf_counter() - start, network.seconds


def overhead(cells: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    figures, aims = {}, []
    few = {"paper": 4, "fast": 20}
    for name, steps in few.items():
        preset = dataclasses.replace(get_preset(name), steps=steps)
        for order in ("plain", "wavefront"):
            total, network = bundled_run(preset, cells, order=order)
            share = 1 - network / total
            figures[f"{name} {order}"] = {
                "seconds": round(total, 2),
                "network_seconds": round(network, 2),
                "share_outside_the_network": round(share, 4),
            }
            aims.append(aim(f"share outside the network, {name}, {order}", share, 0.03, "at most"))
    return {"overhead": figures}, aims


class Clocked(StateFolder):
    """A state folder that says what its writes took."""

    @property
    def seconds(self) -> float:
        return self._spent


def state(cells: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder, Clocked(Path(folder) / "state") as kept:
        total, _ = bundled_run(get_preset("fast"), cells, state=kept)
        share = kept.seconds / total
        figures = {"seconds": round(total, 2), "of_states": round(kept.seconds, 4)}
    return {"state": figures}, [aim("share of time in states", share, 0.01, "at most")]


class Stub:
    """A network that costs nothing."""

    window, channels, prediction = STUB_WINDOW, 3, "v"

    def prepare(self, cond: Tensor, uncond: Tensor | None) -> bool:
        return uncond is not None

    def __call__(self, x: Tensor, t: float, state: bool, index: Tensor) -> Tensor:
        return (x * 0.5)[None].expand(1 + state, *x.shape)


def stub_rows(rows: int) -> None:
    """Prints the peak memory of a canvas of so many rows, in MB, and that before it."""
    preset = get_preset("fast")
    grid = torch.zeros(rows // STUB_WINDOW[0], STUB_WIDTH // STUB_WINDOW[1], 1, 4)
    canvas = CanvasDenoiser(
        Stub(),
        preset.windows(rows, STUB_WIDTH, STUB_WINDOW, seed=0),
        GridField(grid, STUB_WINDOW),
        guidance_scale=preset.guidance_scale,
    )
    before = peak_resident()
    made, start = 0, time.perf_counter()
    for band in sample_rows(
        canvas,
        lambda begin, end: philox_normal(0, 3, (begin, end), STUB_WIDTH),
        schedule=Schedule(),
        solver=preset.solver,
        steps=preset.steps,
    ):
        made += band.canvas.shape[1]
    if made != rows:
        raise RuntimeError(f"{made} of {rows} rows were made")
    peak = peak_resident()
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_mb": peak, "before_mb": before, "seconds": seconds}))


def memory() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    figures = {}
    for rows in ROWS:
        command = [sys.executable, __file__, "--rows", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        figures[str(rows)] = {name: round(value, 1) for name, value in found.items()}
        print(rows, figures[str(rows)], flush=True)
    peaks = [figures[str(rows)]["peak_mb"] for rows in ROWS]
    growth = peaks[-1] / peaks[0] - 1
    return {"memory": figures, "width": STUB_WIDTH}, [
        aim("growth of peak memory from 1k to 64k rows", growth, 0.05, "at most")
    ]


def mask(cells: int = 32) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A disc that covers a third of a grid; counted, not run."""
    y, x = torch.meshgrid(*[torch.arange(cells) + 0.5 - cells / 2] * 2, indexing="ij")
    tissue = (x**2 + y**2) < cells**2 / (3 * np.pi)
    figures: dict[str, Any] = {"cells": cells, "tissue": round(float(tissue.float().mean()), 3)}
    for name in ("paper", "fast"):
        preset, size = get_preset(name), cells * STUB_WINDOW[0]
        canvas = CanvasDenoiser(
            Stub(),
            preset.windows(size, size, STUB_WINDOW, seed=0),
            GridField(torch.zeros(cells, cells, 1, 4), STUB_WINDOW),
            guidance_scale=preset.guidance_scale,
            mask=TissueMask(tissue),
            background=torch.zeros(3, 1, 1),
        )
        counts = [canvas.evaluations(step, 500.0) for step in range(preset.steps)]
        done, saved = (sum(count[part] for count in counts) for part in (0, 1))
        figures[name] = {
            "with": done,
            "without": done + saved,
            "share": round(saved / (done + saved), 4),
        }
    return {"mask": figures}, []


def presets(cells: int, seeds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    model = load("he-demo")
    paper = get_preset("paper")
    shifted = dataclasses.replace(
        paper, name="shifted", shifted=True, overlap=1, weights="hann", overlapped_steps=2
    )
    side = model.encoder.spec.patch_px
    x, y = REGION[:2]
    region = (x, y, cells * side, cells * side)
    grid = encode(demo_slide(), model.encoder, region=region, mask=False, progress=False)
    figures: dict[str, Any] = {"cells": cells, "seeds": seeds}
    with tempfile.TemporaryDirectory() as folder:
        for preset in (paper, shifted, get_preset("fast")):
            found = [
                trial(model, grid, preset, seed, Path(folder) / f"{preset.name}.tif")
                for seed in range(seeds)
            ]
            figures[preset.name] = {
                name: round(statistics.mean(one[name] for one in found), 4) for name in found[0]
            }
            print(preset.name, figures[preset.name], flush=True)
    slow, fast = figures["paper"], figures["fast"]
    return {"presets": figures}, [
        aim(
            "evaluations of paper over those of fast",
            slow["evaluations"] / fast["evaluations"],
            8,
            "at least",
        ),
        aim(
            "similarity of paper less that of fast",
            slow["similarity"] - fast["similarity"],
            0.01,
            "at most",
        ),
        aim(
            "seam of fast, distance from 1",
            abs(fast["seam"] - 1),
            3 * fast["seam_chance"],
            "at most",
        ),
    ]


def trial(model: Any, grid: Any, preset: Preset, seed: int, out: Path) -> dict[str, float]:
    """One image: what it cost and how good it is."""
    options: dict[str, Any] = {"codec": "deflate", "overwrite": True, "progress": False}
    made = synthesize(model, grid, out, preset=preset, seed=seed, **options)
    again = grid_similarity(grid, encode_again(out, model.encoder))
    seam = measure_seam(read_image(out), model.encoder.spec.patch_px, period=8, near=16)
    return {
        "evaluations": made.evaluations,
        "seconds": made.seconds["denoise"],
        "similarity": again.mean,
        "seam": seam.figure,
        "seam_chance": seam.noise,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--cells", type=int, default=4, help="along each side")
    parser.add_argument("--seeds", type=int, default=2, help="images of each preset")
    parser.add_argument("--rows", type=int, help="measure the memory of one canvas, and no more")
    chosen = parser.parse_args()
    if chosen.rows:
        return stub_rows(chosen.rows)
    makers = {
        "overhead": lambda: overhead(chosen.cells),
        "state": lambda: state(chosen.cells),
        "memory": memory,
        "mask": mask,
        "presets": lambda: presets(chosen.cells, chosen.seeds),
    }
    figures: dict[str, Any] = {}
    aims: list[dict[str, Any]] = []
    for part in chosen.part or PARTS:
        found, wanted = makers[part]()
        print(found, flush=True)
        figures.update(found)
        aims.extend(wanted)
    save("canvas" if not chosen.part else "canvas_" + "_".join(chosen.part), figures, aims)
    return None


if __name__ == "__main__":
    main()
