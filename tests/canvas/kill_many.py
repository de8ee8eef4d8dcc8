# SPDX-License-Identifier: Apache-2.0
"""Kills runs with SIGKILL at random moments and lets them go on: `python kill_many.py FOLDER N`.

Prints one JSON object: kills, how many runs had gone on from a state, and the digests of each
order with and without kills. PyTorch is imported once, and each run is a fork: one thread, so that
forks are safe.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import denoiser, digest, image, shifted
from torch import Tensor
from toys import ConvDenoiser

from ssldiff_fast.canvas import StateFolder

SOLVERS = {"plain": {"solver": "ddim"}, "wavefront": {"solver": "dpmpp_2m", "eta": 0.0}}


class Slow(ConvDenoiser):
    def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
        time.sleep(0.001)
        return super().__call__(x, t, state, index)


def run(order: str, folder: Path | None) -> str:
    windows = shifted() if order == "wavefront" else None
    options = dict(SOLVERS[order], order=order)
    if folder is None:
        return digest(image(denoiser(windows, Slow()), **options))
    with StateFolder(folder / "state", share=float("inf")) as state:
        if state.files():
            (folder / "resumed").open("a").write(".")
        return digest(image(denoiser(windows, Slow()), state=state, **options))


def forked(work: Callable[[], str], result: Path, seconds: float | None) -> bool:
    """Whether the fork finished before it was killed after `seconds`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            part = result.with_suffix(".part")
            part.write_text(work())
            part.rename(result)
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if status:
        raise RuntimeError("a run failed")
    return True


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    random.seed(0)
    report: dict[str, Any] = {"kills": 0, "digests": {}}
    for order in SOLVERS:
        start = time.perf_counter()
        forked(lambda order=order: run(order, None), folder / f"{order}.whole", None)
        whole = time.perf_counter() - start
        report["digests"][order] = [(folder / f"{order}.whole").read_text()]
        killed = 0
        while killed < kills // 2:
            result = folder / f"{order}.{killed}"
            in_this_run = 0
            while True:
                seconds = random.uniform(0.02, whole) if in_this_run < 4 else None
                if forked(lambda order=order: run(order, folder), result, seconds):
                    break
                killed += 1
                in_this_run += 1
            report["digests"][order].append(result.read_text())
            for file in (folder / "state").glob("state-*"):
                file.unlink()
        report["kills"] += killed
    report["resumed"] = len((folder / "resumed").read_text())
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
