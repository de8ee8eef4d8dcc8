# SPDX-License-Identifier: Apache-2.0
"""Claim: scatter_mean runs at the memory's speed, far above the published loop and `fold`."""

from __future__ import annotations

import torch
from torch import Tensor

from report import aim, save
from ssldiff_fast import _C
from ssldiff_fast.ops import scatter_mean, scatter_mean_reference
from timing import alternate, copy_bandwidth, ratios_to

CHANNELS, WINDOW, STRIDE, SIZE = 3, 64, 16, 512


def main() -> None:
    """Time the three on a canvas of 512 x 512 with stride 16 and save results/scatter_mean.json."""
    origins = list(range(0, SIZE - WINDOW + 1, STRIDE))
    windows = torch.randn(len(origins) ** 2, CHANNELS, WINDOW, WINDOW)
    ones = [1.0] * WINDOW

    def ours() -> Tensor:
        return scatter_mean(windows, origins, origins, ones, ones, height=SIZE, width=SIZE)

    def loop() -> Tensor:  # as the published notebook accumulates
        total = torch.zeros(CHANNELS, SIZE, SIZE)
        count = torch.zeros(CHANNELS, SIZE, SIZE)
        places = [(y, x) for y in origins for x in origins]
        for window, (y, x) in zip(windows, places):
            total[:, y : y + WINDOW, x : x + WINDOW] += window
            count[:, y : y + WINDOW, x : x + WINDOW] += 1
        return total / count

    def fold() -> Tensor:
        columns = windows.flatten(1).t()[None]
        total = torch.nn.functional.fold(columns, SIZE, WINDOW, stride=STRIDE)
        shares = torch.nn.functional.fold(torch.ones_like(columns), SIZE, WINDOW, stride=STRIDE)
        return (total / shares)[0]

    expected = scatter_mean_reference(
        windows.double(), origins, origins, ones, ones, height=SIZE, width=SIZE
    ).float()
    for function in (ours, loop, fold):
        torch.testing.assert_close(function(), expected)
    times = alternate({"scatter_mean": ours, "published loop": loop, "fold": fold})
    ratios = ratios_to(times, "scatter_mean")
    moved = windows.nbytes + expected.nbytes
    reached = moved / times["scatter_mean"]["median_ms"] / 1e6
    available = copy_bandwidth(windows)
    aims = [
        aim("times the published loop", ratios["published loop"], 8, "at least"),
        aim("times fold", ratios["fold"], 20, "at least"),
        aim("share of the copy bandwidth", reached / available, 0.8, "at least"),
    ]
    figures = {
        "ratio": ratios,
        "times": times,
        "shape": {"windows": list(windows.shape), "canvas": list(expected.shape)},
        "dtype": "float32",
        "gigabytes_per_second": {"scatter_mean": round(reached, 1), "copy": round(available, 1)},
        "cpu_path": _C.build_info()["cpu_path"],
    }
    save("scatter_mean", figures, aims)


if __name__ == "__main__":
    main()
