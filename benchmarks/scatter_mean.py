# SPDX-License-Identifier: Apache-2.0
"""Claim: scatter_mean runs at the memory's speed, far above the published loop and `fold`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from report import aim, save
from ssldiff_fast import _C
from ssldiff_fast.diffusion.guidance import guide
from ssldiff_fast.ops import (
    CanvasStep,
    WindowPlan,
    philox_normal,
    scatter_mean,
    scatter_mean_reference,
)
from timing import alternate, arguments, copy_bandwidth, peak_megabytes, ratios_to

CHANNELS, WINDOW, STRIDE = 3, 64, 16
# A GPU's canvas is larger, so that the windows do not fit into its caches.
SIZES = {"cpu": 512, "cuda": 2048}
# assert_close's own for float32 results; inputs are rounded to their dtype first.
RTOL, ATOL = 1.3e-6, 1e-5


def candidates(windows: Tensor, size: int) -> dict[str, Callable[[], Tensor]]:
    """Ours by every backend that runs on this device, and the baselines."""
    plan = WindowPlan.regular(size, size, (WINDOW, WINDOW), STRIDE)

    def ours() -> Tensor:
        return scatter_mean(windows, plan)

    def triton() -> Tensor:
        from ssldiff_fast.kernels.scatter_mean import scatter_mean as kernel

        origins, ones = list(plan.origins_y), [1.0] * WINDOW
        geometry = [size, size, 0, 0, 0, size]
        return kernel(windows, *[None] * 4, origins, origins, ones, ones, geometry, 1.0, True)

    def loop() -> Tensor:  # as the published notebook accumulates
        total = torch.zeros(CHANNELS, size, size, device=windows.device)
        count = torch.zeros(CHANNELS, size, size, device=windows.device)
        places = plan.origins.tolist()
        for window, (y, x) in zip(windows, places):
            total[:, y : y + WINDOW, x : x + WINDOW] += window
            count[:, y : y + WINDOW, x : x + WINDOW] += 1
        return total / count

    def fold() -> Tensor:
        columns = windows.float().flatten(1).t()[None]
        total = torch.nn.functional.fold(columns, size, WINDOW, stride=STRIDE)
        shares = torch.nn.functional.fold(torch.ones_like(columns), size, WINDOW, stride=STRIDE)
        return (total / shares)[0]

    functions = {"scatter_mean": ours, "published loop": loop, "fold": fold}
    if windows.device.type == "cuda" and backend("cuda") != "Triton":
        functions["Triton"] = triton  # beside CUDA C++, which is what scatter_mean runs
    return functions


def backend(device: str) -> str:
    """What runs scatter_mean on a device."""
    if device == "cpu":
        return f"C++, {_C.build_info()['cpu_path']}"
    return "CUDA C++" if _C.CUDA_PROBLEM is None else "Triton"


def measure(device: str, size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Figures of one dtype; what is wrong is not timed."""
    plan = WindowPlan.regular(size, size, (WINDOW, WINDOW), STRIDE)
    windows = torch.randn(len(plan), CHANNELS, WINDOW, WINDOW, device=device).to(dtype)
    functions = candidates(windows, size)
    expected = scatter_mean_reference(windows.double(), plan).float()
    for function in functions.values():
        torch.testing.assert_close(function(), expected, rtol=RTOL, atol=ATOL)
    times = alternate(functions, device=device)
    moved = windows.nbytes + expected.nbytes
    names = [name for name in times if name in ("scatter_mean", "Triton")]
    bandwidth = {name: round(moved / times[name]["median_ms"] / 1e6, 1) for name in names}
    figures = {
        "ratio": ratios_to(times, "scatter_mean"),
        "times": times,
        "shape": {"windows": list(windows.shape), "canvas": list(expected.shape)},
        "gigabytes_per_second": {**bandwidth, "copy": round(copy_bandwidth(windows), 1)},
    }
    if device == "cuda":
        figures["peak_megabytes"] = peak_megabytes(functions)
    return figures


def measure_step(device: str, size: int) -> dict[str, Any]:
    """Guidance and a solver step with noise: fused, in bands, and one operator after another."""
    plan = WindowPlan.regular(size, size, (WINDOW, WINDOW), STRIDE)
    windows, uncond = (
        torch.randn(len(plan), CHANNELS, WINDOW, WINDOW, device=device) for _ in range(2)
    )
    canvas = torch.randn(CHANNELS, size, size, device=device)
    columns = len(plan.origins_x)

    def fused(begin: int = 0, end: int = size) -> Tensor:
        step = CanvasStep(canvas[:, begin:end], x=0.9, output=-0.4, noise=0.1, seed=3, step=1)
        rows = plan.window_rows(begin, end)
        first, last = rows[0] * columns, (rows[-1] + 1) * columns
        made: Tensor = scatter_mean(
            windows[first:last],
            plan,
            torch.arange(first, last),
            rows=(begin, end),
            uncond=uncond[first:last],
            guidance_scale=1.75,
            step=step,
        )
        return made

    def bands() -> Tensor:
        return torch.cat([fused(y, y + STRIDE) for y in range(0, size, STRIDE)], dim=1)

    def apart() -> Tensor:
        mean = scatter_mean(guide(windows, uncond, 1.75), plan)
        noise = philox_normal(3, CHANNELS, (0, size), size, step=1, device=device)
        return 0.9 * canvas + -0.4 * mean + 0.1 * noise

    functions = {"fused": fused, "fused, in bands": bands, "one after another": apart}
    for function in functions.values():
        torch.testing.assert_close(function(), apart(), rtol=RTOL, atol=ATOL)
    times = alternate(functions, device=device)
    return {"ratio": ratios_to(times, "fused"), "times": times}


def main() -> None:
    """Time all on a canvas with stride 16 and save scatter_mean.json."""
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, help="side of the canvas; 512, on a GPU 2048")
    chosen = parser.parse_args()
    size = chosen.size or SIZES[chosen.device]
    dtypes = [torch.float32] if chosen.device == "cpu" else [torch.float32, torch.bfloat16]
    figures = {
        str(dtype).removeprefix("torch."): measure(chosen.device, size, dtype) for dtype in dtypes
    }
    main_figures = figures["float32"]
    ratios, bandwidth = main_figures["ratio"], main_figures["gigabytes_per_second"]
    aims = [
        aim("times the published loop", ratios["published loop"], 8, "at least"),
        aim("times fold", ratios["fold"], 20, "at least"),
    ]
    figures["guided step"] = measure_step(chosen.device, size)
    fused = figures["guided step"]["ratio"]["one after another"]
    aims.append(aim("fused guidance and step, times one after another", fused, 1.5, "at least"))
    for name in [name for name in bandwidth if name != "copy"]:
        share = bandwidth[name] / bandwidth["copy"]
        label = "" if name == "scatter_mean" else f" ({name})"
        aims.append(aim(f"share of the copy bandwidth{label}", share, 0.8, "at least"))
    save("scatter_mean", {"backend": backend(chosen.device), **figures}, aims, chosen.device)


if __name__ == "__main__":
    main()
