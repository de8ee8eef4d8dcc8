# SPDX-License-Identifier: Apache-2.0
"""Timing that all benchmarks of operators share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def alternate(functions: dict[str, Callable[[], Any]], rounds: int = 30) -> dict[str, Any]:
    """Run the functions in turn, so that all meet the same machine; median and 20/80 quantiles."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: _summary(torch.tensor(values)) for name, values in samples.items()}


def ratios_to(times: dict[str, Any], name: str) -> dict[str, float]:
    """How many times longer than `name` each of the others takes, by medians."""
    own = times[name]["median_ms"]
    return {other: round(t["median_ms"] / own, 2) for other, t in times.items() if other != name}


def copy_bandwidth(like: Tensor, rounds: int = 30) -> float:
    """Gigabytes per second, read and written, of PyTorch's own copy of a tensor this large."""
    target = torch.empty_like(like)
    times = alternate({"copy": lambda: target.copy_(like)}, rounds)
    return float(2 * like.nbytes / times["copy"]["median_ms"] / 1e6)


def _summary(values: Tensor) -> dict[str, float]:
    low, median, high = values.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {
        "median_ms": round(median, 3),
        "quantile_20_ms": round(low, 3),
        "quantile_80_ms": round(high, 3),
    }
