# SPDX-License-Identifier: Apache-2.0
"""Claim: a slide of any size is denoised, decoded and written in memory that hardly grows.

    python benchmarks/gigapixel.py [--sizes 4096 16384] [--decoder stub|local]

The wavefront sampler (a stub network, so that the rest is what is measured), a decoder and the TIFF
writer run as `ssldiff synthesize` runs them; each square in a process of its own, whose peak
resident memory is read at its end. The stub decoder repeats latents; the real one is the bundled
model's (`local`), which takes about a minute for 16 megapixels on two cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from report import aim, save
from ssldiff_fast.canvas import (
    CanvasDenoiser,
    DecodeSettings,
    GridField,
    open_decoder,
)
from ssldiff_fast.canvas.wavefront import sample_rows
from ssldiff_fast.canvas.wide import Spill
from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.models.load import load
from ssldiff_fast.ops import WindowPlan, philox_normal
from ssldiff_fast.pipeline import Background, needed
from ssldiff_fast.slides.writers import open_writer

WINDOW, FACTOR, CHANNELS, STEPS = 32, 4, 3, 4
GROWTH = 0.05


class Stub:
    """A network that costs nothing."""

    window, channels, prediction = (WINDOW, WINDOW), CHANNELS, "v"

    def prepare(self, cond: Tensor, uncond: Tensor | None) -> None:
        return None

    def __call__(self, x: Tensor, t: float, state: None, index: Tensor) -> Tensor:
        return 0.1 * x[None]


def enlarge(latents: Tensor) -> Tensor:
    """A decoder that costs nothing."""
    return torch.nn.functional.interpolate(latents, scale_factor=float(FACTOR))


def run(size_px: int, decoder: str, out: Path) -> dict[str, Any]:
    """One square slide; its seconds and this process's peak memory."""
    side = size_px // FACTOR
    cells = side // WINDOW
    plan = WindowPlan.regular(side, side, (WINDOW, WINDOW), 3 * WINDOW // 4, "hann")
    field = GridField(torch.zeros(cells, cells, 1, 1), (WINDOW, WINDOW))
    denoiser = CanvasDenoiser(Stub(), plan, field, batch_size=64)
    model: Any = enlarge if decoder == "stub" else load("he-demo")
    kind = "reference" if decoder == "stub" else decoder
    settings = DecodeSettings(kind, stride=WINDOW, weights="uniform", batch_size=8)
    scratch = Spill(out.parent)
    window = (WINDOW, WINDOW)
    pixels = open_decoder(model, (side, side), settings, window=window, scratch=scratch)
    start = time.perf_counter()
    rows = sample_rows(
        denoiser,
        lambda begin, end: philox_normal(0, CHANNELS, (begin, end), side),
        schedule=Schedule(zero_terminal_snr=True),
        steps=STEPS,
        scratch=scratch,
    )
    with open_writer(out, size_px, size_px, 0.5) as writer:

        def take(bands: Any) -> None:
            for band in pixels.decode(bands):
                writer.write_rows(band)

        with Background(take) as background:
            for band in needed(rows, 0):
                background.put(band)
    seconds = time.perf_counter() - start
    return {
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seconds": round(seconds, 2),
        "megapixels_per_second": round(size_px**2 / 1e6 / seconds, 2),
        "file_megabytes": round(out.stat().st_size / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--decoder", default="stub", choices=["stub", "local"])
    parser.add_argument("--one", type=int, help="run one size in this process, and no more")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if chosen.one:
            print(json.dumps(run(chosen.one, chosen.decoder, Path(folder) / "out.tif")))
            return
    figures = {}
    for size in chosen.sizes:
        command = [sys.executable, __file__, "--one", str(size), "--decoder", chosen.decoder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[str(size)] = json.loads(done.stdout.splitlines()[-1])
        print(size, figures[str(size)], flush=True)
    peaks = [figure["peak_megabytes"] for figure in figures.values()]
    growth = max(peaks) / peaks[0] - 1
    name = f"growth of peak memory from {chosen.sizes[0]} to {chosen.sizes[-1]} pixels square"
    save(
        "gigapixel" if chosen.decoder == "stub" else f"gigapixel_{chosen.decoder}",
        {"decoder": chosen.decoder, "steps": STEPS, "squares": figures},
        [aim(name, growth, GROWTH, "at most")],
    )


if __name__ == "__main__":
    main()
