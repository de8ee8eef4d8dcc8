# SPDX-License-Identifier: Apache-2.0
"""Claim: vq_nearest is far faster than `cdist().argmin()`, in memory that does not grow with K."""

from __future__ import annotations

import torch
from torch import Tensor

from report import aim, save
from ssldiff_fast import _C
from ssldiff_fast.ops import vq_nearest
from timing import alternate, ratios_to

VECTORS, CODES, WIDTH = 65_536, 8_192, 3


def main() -> None:
    """Time the three on 65,536 vectors and 8,192 codes and save results/vq_nearest.json."""
    z, codes = torch.randn(VECTORS, WIDTH), torch.randn(CODES, WIDTH)

    def ours() -> Tensor:
        return vq_nearest(z, codes)[1]

    def cdist() -> Tensor:
        return torch.cdist(z, codes).argmin(1)

    def expanded() -> Tensor:  # as the published quantiser computes it
        squares = z.square().sum(1, keepdim=True) + codes.square().sum(1)
        return (squares - 2 * z @ codes.t()).argmin(1)

    found = (z.double() - codes[ours()].double()).square().sum(1)
    for function in (cdist, expanded):
        # Rounding may prefer another of two codes that are nearly as near; ours is never farther.
        other = (z.double() - codes[function()].double()).square().sum(1)
        assert bool((found <= other + 1e-6).all()), f"{function.__name__} found a nearer code"
    times = alternate({"vq_nearest": ours, "cdist": cdist, "expanded square": expanded}, rounds=7)
    ratios = ratios_to(times, "vq_nearest")
    figures = {
        "ratio": ratios,
        "times": times,
        "shape": {"z": [VECTORS, WIDTH], "codes": [CODES, WIDTH]},
        "dtype": "float32",
        "cpu_path": _C.build_info()["cpu_path"],
    }
    save("vq_nearest", figures, [aim("times cdist().argmin()", ratios["cdist"], 15, "at least")])


if __name__ == "__main__":
    main()
