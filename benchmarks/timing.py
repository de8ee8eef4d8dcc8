# SPDX-License-Identifier: Apache-2.0
"""Timing that all benchmarks of operators share, on the CPU and on a GPU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Written before every call on a GPU: more than any cache holds, so that the call starts from
# memory; and longer than a launch takes, so that the launch is not what is timed.
_FLUSH_BYTES = 2**29
# A slow baseline is run less often than that.
_SECONDS = 8.0


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark that has a GPU side takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser


def stopwatch(device: str) -> Callable[[Callable[[], Any]], float]:
    """A function that runs another one once and returns its milliseconds on the device."""
    if device == "cpu":

        def on_cpu(function: Callable[[], Any]) -> float:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3

        return on_cpu
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def on_gpu(function: Callable[[], Any]) -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return on_gpu


def alternate(
    functions: dict[str, Callable[[], Any]], rounds: int = 30, device: str = "cpu"
) -> dict[str, Any]:
    """Run the functions in turn, so that all meet the same machine; median and 20/80 quantiles.

    A function that has used its share of seconds is left out of the later rounds.
    """
    measure = stopwatch(device)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            if sum(samples[name]) < _SECONDS * 1e3:
                samples[name].append(measure(function))
    return {name: _summary(torch.tensor(values)) for name, values in samples.items()}


def ratios_to(times: dict[str, Any], name: str) -> dict[str, float]:
    """How many times longer than `name` each of the others takes, by medians."""
    own = times[name]["median_ms"]
    return {other: round(t["median_ms"] / own, 2) for other, t in times.items() if other != name}


def copy_bandwidth(like: Tensor, rounds: int = 30) -> float:
    """Gigabytes per second, read and written, of PyTorch's own copy of a tensor this large."""
    target = torch.empty_like(like)
    times = alternate({"copy": lambda: target.copy_(like)}, rounds, like.device.type)
    return float(2 * like.nbytes / times["copy"]["median_ms"] / 1e6)


def peak_megabytes(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """GPU memory that each function takes beside its inputs, its result included."""
    peaks = {}
    for name, function in functions.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        peaks[name] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    return peaks


def _summary(values: Tensor) -> dict[str, float]:
    low, median, high = values.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {
        "median_ms": round(median, 4),
        "quantile_20_ms": round(low, 4),
        "quantile_80_ms": round(high, 4),
        "rounds": len(values),
    }
