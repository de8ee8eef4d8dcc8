# SPDX-License-Identifier: Apache-2.0
"""Claim: a slide of any size is denoised, decoded and written in memory that hardly grows.

    python benchmarks/gigapixel.py [--sizes 4096 16384 65536] [--decoder stub|local] [--add]

The wavefront sampler (a stub network, so that the rest is what is measured), a decoder and the TIFF
writer run as `ssldiff synthesize` runs them, with their states; each square in a process of its
own, whose peak resident memory is read at its end. With the stub decoder, which repeats latents,
squares up to 16,384 are run three times and the median counts, since the allocator's share of a run
varies by some megabytes. The real one is the bundled model's (`local`), which takes about a minute
for 16 megapixels on two cores.
`--add` keeps the squares of the last result that are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from report import RESULTS, aim, save
from ssldiff_fast.canvas import (
    CanvasDenoiser,
    DecodeSettings,
    GridField,
    StateFolder,
    open_decoder,
)
from ssldiff_fast.canvas.wavefront import sample_rows
from ssldiff_fast.canvas.wide import Spill
from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.models.load import load
from ssldiff_fast.ops import WindowPlan, philox_normal
from ssldiff_fast.pipeline import Background, needed
from ssldiff_fast.slides.writers import open_writer
from timing import peak_resident

WINDOW, FACTOR, CHANNELS, STEPS = 32, 4, 3, 4
GROWTH = 0.05
# Of squares up to this side, runs whose median counts.
SHORT, ROUNDS = 16384, 3
# Seconds between two states of the writer.
STATE_SECONDS = 5.0


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


class Sink:
    """Decodes and writes, and saves the writer's state now and then."""

    def __init__(self, decoder: Any, writer: Any) -> None:
        self._decoder, self._writer = decoder, writer
        self.durable = 0  # rows of latents

    def take(self, bands: Iterable[Tensor]) -> None:
        last = time.perf_counter()
        for band in self._decoder.decode(bands):
            self._writer.write_rows(band)
            if time.perf_counter() - last > STATE_SECONDS:
                self._writer.checkpoint()
                rows = self._writer.rows_written // FACTOR
                self.durable = self._decoder.first_latent(rows)
                last = time.perf_counter()


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
    scratch, window, state = Spill(out.parent), (WINDOW, WINDOW), out.parent / "state"
    pixels = open_decoder(model, (side, side), settings, window=window, scratch=scratch)
    start = time.perf_counter()
    with (
        StateFolder(state) as kept,
        open_writer(out, size_px, size_px, 0.5, state=state / "writer") as writer,
    ):
        sink = Sink(pixels, writer)
        rows = sample_rows(
            denoiser,
            lambda begin, end: philox_normal(0, CHANNELS, (begin, end), side),
            schedule=Schedule(zero_terminal_snr=True),
            steps=STEPS,
            state=kept,
            durable=lambda: sink.durable,
            scratch=scratch,
        )
        with contextlib.closing(rows), Background(sink.take) as background:
            for band in needed(rows, 0):
                background.put(band)
    seconds = time.perf_counter() - start
    return {
        "peak_megabytes": round(peak_resident(), 1),
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
    parser.add_argument("--add", action="store_true", help="to the squares of the last result")
    parser.add_argument("--folder", type=Path, help="a disk with room for the largest")
    parser.add_argument("--one", type=int, help="run one size in this process, and no more")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        if chosen.one:
            print(json.dumps(run(chosen.one, chosen.decoder, Path(folder) / "out.tif")))
            return
    name = "gigapixel" if chosen.decoder == "stub" else f"gigapixel_{chosen.decoder}"
    figures: dict[str, Any] = {}
    if chosen.add:
        figures = json.loads((RESULTS / f"{name}.json").read_text())["squares"]
    for size in chosen.sizes:
        command = [sys.executable, __file__, "--one", str(size), "--decoder", chosen.decoder]
        if chosen.folder:
            command += ["--folder", str(chosen.folder)]
        found = []
        for _ in range(ROUNDS if size <= SHORT and chosen.decoder == "stub" else 1):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
        found.sort(key=lambda run: run["peak_megabytes"])
        figures[str(size)] = found[len(found) // 2]
        print(size, figures[str(size)], flush=True)
    figures = dict(sorted(figures.items(), key=lambda square: int(square[0])))
    sizes = list(figures)
    peaks = [figure["peak_megabytes"] for figure in figures.values()]
    growth = max(peaks) / peaks[0] - 1
    claim = f"growth of peak memory from {sizes[0]} to {sizes[-1]} pixels square"
    shown = {"decoder": chosen.decoder, "steps": STEPS, "squares": figures}
    save(name, shown, [aim(claim, growth, GROWTH, "at most")])


if __name__ == "__main__":
    main()
