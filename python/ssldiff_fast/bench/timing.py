# SPDX-License-Identifier: Apache-2.0
"""Timing that all benchmarks share, on the CPU and on a GPU, and the limits of the machine."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Written before every call on a GPU: more than any cache holds, so that the call starts from
# memory; and longer than a launch takes, so that the launch is not what is timed.
_FLUSH_BYTES = 2**29
# A slow baseline is run less often than that.
_SECONDS = {"cpu": 8.0, "cuda": 3.0}
# Sides of the square matrices whose product shows the matrix rate.
_MATRIX = {"cpu": 2048, "cuda": 8192}


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
            if sum(samples[name]) < 1e3 * _SECONDS[device]:
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


def matrix_rate(device: str, rounds: int = 15) -> float:
    """Billions of operations a second of PyTorch's float32 product of two square matrices.

    As a limit it is taken where the machine was at its best.
    """
    size = _MATRIX[device]
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    times = alternate({"product": lambda: a @ b}, rounds, device)
    return float(2 * size**3 / times["product"]["quantile_20_ms"] / 1e6)


def peak_megabytes(
    functions: dict[str, Callable[[], Any]], device: str = "cuda"
) -> dict[str, float]:
    """Memory that each function takes beside its inputs, its result included.

    Of a GPU as PyTorch counts it; of the CPU by the growth of the process, which only Linux with
    glibc tells: elsewhere the figures are left out.
    """
    measure = _gpu_peak if device == "cuda" else _process_peak
    peaks = {name: measure(function) for name, function in functions.items()}
    return {name: round(peak / 1e6, 1) for name, peak in peaks.items() if peak is not None}


def _gpu_peak(function: Callable[[], Any]) -> float | None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def _process_peak(function: Callable[[], Any]) -> float | None:
    try:
        # What earlier calls freed would be taken again without growth. (glibc alone has this.)
        ctypes.CDLL(None).malloc_trim(0)
        # Linux: the peak of the resident memory (VmHWM) starts again from what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    function()
    return float(max(_status("VmHWM") - before, 0))


def peak_resident(process: str = "self") -> float:
    """Megabytes (2^20 bytes) of a process's resident memory at its peak, on Linux.

    Not `getrusage`, which counts what the process that started this one had, too.
    """
    return _status("VmHWM", process) / 2**20


def _status(name: str, process: str = "self") -> int:
    """Bytes of one line of /proc/PROCESS/status."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _summary(values: Tensor) -> dict[str, float]:
    low, median, high = values.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {
        "median_ms": round(median, 4),
        "quantile_20_ms": round(low, 4),
        "quantile_80_ms": round(high, 4),
        "rounds": len(values),
    }
