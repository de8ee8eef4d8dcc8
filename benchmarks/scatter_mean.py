# SPDX-License-Identifier: Apache-2.0
"""Claim: scatter_mean runs at the memory's speed, far above the published loop and `fold`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from report import aim, aims_of, save
from ssldiff_fast.bench import measure, require_device
from ssldiff_fast.bench.scatter_mean import (
    ATOL,
    CHANNELS,
    DTYPES,
    RTOL,
    SIZES,
    STRIDE,
    WINDOW,
    case,
)
from ssldiff_fast.bench.timing import alternate, matrix_rate, ratios_to
from ssldiff_fast.diffusion.guidance import guide
from ssldiff_fast.ops import CanvasStep, WindowPlan, philox_normal, scatter_mean
from timing import arguments


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
    device, size = chosen.device, chosen.size or SIZES[chosen.device]
    require_device(device)
    matrix = matrix_rate(device)
    every = [case(device, dtype, size) for dtype in DTYPES[device]]
    figures: dict[str, Any] = {"backend": every[0].backend}
    aims = []
    for one in every:
        figures[one.label] = measure(one, matrix)
        aims += aims_of(one, figures[one.label])
    figures["guided step"] = measure_step(device, size)
    fused = figures["guided step"]["ratio"]["one after another"]
    aims.append(aim("fused guidance and step, times one after another", fused, 1.5, "at least"))
    save("scatter_mean", figures, aims, device)


if __name__ == "__main__":
    main()
