# SPDX-License-Identifier: Apache-2.0
"""Claim: a slide is encoded in memory that does not grow with it, but for the grid itself.

    python benchmarks/encode.py [--sides 16384 32768 40960] [--runs 2]

Square TIFFs of repeated tissue are written by our writer and encoded by a stub (the mean colour of
a cell), several times, each in a process of its own, whose peak resident memory is read at its end,
and that of the processes that read ahead for it. A cell has 128 pixels a side: 16,384, 65,536 and
102,400 of them. What counts is the largest peak of all beside the smallest of the first side.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ssldiff_fast as sf
from report import aim, save
from ssldiff_fast.encoders.spec import EncoderSpec
from ssldiff_fast.slides.writers import open_writer
from timing import peak_resident

CELL_PX, WIDTH, MPP = 128, 8, 0.5
GROWTH = 0.05


class Stub:
    """An encoder that costs nothing."""

    spec = EncoderSpec("stub", "none", WIDTH, patch_px=CELL_PX, mpp=MPP)

    def __call__(self, cells: Tensor) -> Tensor:
        means = cells[:, ::16, ::16].float().mean((1, 2))
        return means.repeat(1, WIDTH)[:, None, :WIDTH]


class Children:
    """Watches the processes that this one starts: megabytes of the largest's peak."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Children:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for listed in Path("/proc/self/task").glob("*/children"):
                # A process, or a thread of this one, may end at any moment.
                with contextlib.suppress(OSError, StopIteration):
                    for process in listed.read_text().split():
                        self.peak = max(self.peak, peak_resident(process))


def write(path: Path, side: int) -> None:
    """A square of stained-looking colours with noise, all of it tissue."""
    y, x = np.mgrid[0:512, 0:2048].astype(np.float32)
    waves = 20 * np.sin(x / 9) + 20 * np.cos(y / 7)
    noise = np.random.default_rng(0).normal(0, 4, (512, 2048, 3))
    patch = (np.array([200.0, 130.0, 180.0]) + waves[..., None] + noise).clip(0, 255)
    band = np.tile(patch.astype(np.uint8), (1, -(-side // 2048), 1))[:, :side]
    with open_writer(path, side, side, MPP) as writer:
        for top in range(0, side, len(band)):
            writer.write_rows(band[: side - top])


def one(path: Path, out: Path) -> dict[str, Any]:
    """Encodes a slide; this process's peak memory, and the largest of those that read ahead."""
    with Children() as children:
        start = time.perf_counter()
        grid = sf.encode(path, Stub(), out=out, progress=False)
        seconds = time.perf_counter() - start
    cells = int(grid.valid.sum())
    return {
        "cells": cells,
        "peak_megabytes": round(peak_resident(), 1),
        "peak_megabytes_ahead": round(children.peak, 1),
        "grid_megabytes": round(grid.embeddings.nbytes / 2**20, 1),
        "seconds": round(seconds, 2),
        "cells_per_second": round(cells / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[16384, 32768, 40960])
    parser.add_argument("--runs", type=int, default=2, help="of each side")
    parser.add_argument("--folder", type=Path, help="a disk with room for the largest")
    parser.add_argument("--one", type=Path, help="encode this slide in this process, and no more")
    chosen = parser.parse_args()
    figures: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        if chosen.one:
            print(json.dumps(one(chosen.one, Path(folder) / "grid.h5")))
            return
        for side in chosen.sides:
            slide = Path(folder) / "slide.tif"
            write(slide, side)
            command = [sys.executable, __file__, "--one", str(slide), "--folder", folder]
            for _ in range(chosen.runs):
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                made = json.loads(done.stdout.splitlines()[-1])
                made["slide_megabytes"] = round(slide.stat().st_size / 1e6, 1)
                figures.setdefault(str(side), []).append(made)
                print(side, made, flush=True)
            slide.unlink()
            Path(f"{slide}.json").unlink()
    peaks = [
        [max(run["peak_megabytes"], run["peak_megabytes_ahead"]) for run in runs]
        for runs in figures.values()
    ]
    growth = max(max(side) for side in peaks) / min(peaks[0]) - 1
    sides = list(figures)
    claim = f"growth of peak memory from {sides[0]} to {sides[-1]} pixels square"
    torch_only = {"slides": figures, "threads": torch.get_num_threads()}
    save("encode", torch_only, [aim(claim, growth, GROWTH, "at most")])


if __name__ == "__main__":
    main()
