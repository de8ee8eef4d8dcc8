# SPDX-License-Identifier: Apache-2.0
"""Evaluations a second of the bundled U-Net while another process is busy, by number of threads.

Given: PyTorch's number, to whose barriers every thread comes late that shares its core. Chosen:
what a run makes of it (`models.threads`), its trials included.

Predicted before measuring, of two threads on two cores: quiet, the choice costs the time of two
evaluations at half speed, a tenth of 6 seconds at most; with one core busy, one thread is at least
three times as fast as two, and the choice within 10 % of one thread but for three slow evaluations.

    python benchmarks/threads.py
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ssldiff_fast as sf
from report import aim, save
from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.models.threads import measured_threads

WINDOWS = 16
# The three alternate, so many seconds each, and the median of the rounds counts.
SECONDS, ROUNDS = 6.0, 3


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes compute beside this one."""
    others = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def rate(evaluate: Callable[[], Tensor]) -> float:
    """Evaluations a second of guided pairs."""
    evaluate()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        evaluate()
        calls += 1
    return 2 * WINDOWS * calls / (time.perf_counter() - begin)


def main() -> None:
    model, given = sf.load("he-demo"), torch.get_num_threads()
    denoiser = LDMDenoiser(model)
    cells = torch.ones(WINDOWS, 1, denoiser.conditioner.width)
    state = denoiser.prepare(cells, torch.zeros_like(cells[:1]))
    x = torch.zeros(WINDOWS, denoiser.channels, *denoiser.window)
    index = torch.arange(WINDOWS)

    @torch.no_grad()
    def evaluate() -> Tensor:
        return denoiser(x, 500.0, state, index)

    def chosen() -> float:
        with measured_threads(model):
            return rate(evaluate)

    def on(threads: int) -> float:
        torch.set_num_threads(threads)
        try:
            return rate(evaluate)
        finally:
            torch.set_num_threads(given)

    ways = {"given": lambda: on(given), "one": lambda: on(1), "chosen": chosen}
    figures: dict[str, dict[str, float]] = {}
    for name, others in (("quiet", 0), ("one core busy", 1)):
        with busy(others):
            rounds = [{way: run() for way, run in ways.items()} for _ in range(ROUNDS)]
        medians = {way: statistics.median(rates[way] for rates in rounds) for way in ways}
        figures[name] = {way: float(f"{value:.4g}") for way, value in medians.items()}
        print(name, figures[name], rounds, flush=True)
    quiet, loaded = figures["quiet"], figures["one core busy"]
    aims = [
        aim("times given, quiet", quiet["chosen"] / quiet["given"], 0.9, "at least"),
        aim("times given, one core busy", loaded["chosen"] / loaded["given"], 2.0, "at least"),
        aim("times one thread, one core busy", loaded["chosen"] / loaded["one"], 0.7, "at least"),
    ]
    save("threads", {"threads given": given, "evaluations a second": figures}, aims)


if __name__ == "__main__":
    main()
