# SPDX-License-Identifier: Apache-2.0
"""Claim: vq_nearest is far faster than `cdist().argmin()`, in memory that does not grow with K."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from report import aim, save
from ssldiff_fast import _C
from ssldiff_fast.ops import vq_nearest
from timing import alternate, arguments, peak_megabytes, ratios_to

WIDTH = 3
# cdist computes large distances by a matrix product, and its rounding may prefer another code.
NEARLY = 1e-6


def candidates(z: Tensor, codes: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ours and the baselines: the index of the code that each finds."""

    def ours() -> Tensor:
        return vq_nearest(z, codes)[1]

    def cdist() -> Tensor:
        return torch.cdist(z, codes).argmin(1)

    def expanded() -> Tensor:  # as the published quantiser computes it
        squares = z.square().sum(1, keepdim=True) + codes.square().sum(1)
        return (squares - 2 * z @ codes.t()).argmin(1)

    return {"vq_nearest": ours, "cdist": cdist, "expanded square": expanded}


def check(z: Tensor, codes: Tensor, functions: dict[str, Callable[[], Tensor]]) -> None:
    """No other finds a nearer code than ours, beyond rounding."""

    def distances(indices: Tensor) -> Tensor:
        return (z.double() - codes[indices].double()).square().sum(1)

    found = distances(functions["vq_nearest"]())
    for name, function in functions.items():
        nearer = int((found > distances(function()) + NEARLY).sum())
        if nearer:
            raise AssertionError(f"{name} found a nearer code for {nearer} vectors")


def main() -> None:
    """Time the three on 65,536 vectors and 8,192 codes and save vq_nearest.json."""
    parser = arguments(__doc__)
    parser.add_argument("--vectors", type=int, default=65_536)
    parser.add_argument("--codes", type=int, default=8_192)
    chosen = parser.parse_args()
    z = torch.randn(chosen.vectors, WIDTH, device=chosen.device)
    codes = torch.randn(chosen.codes, WIDTH, device=chosen.device)
    functions = candidates(z, codes)
    check(z, codes, functions)
    times = alternate(functions, 7 if chosen.device == "cpu" else 30, chosen.device)
    ratios = ratios_to(times, "vq_nearest")
    # 3 operations a component: difference, product, sum.
    operations = 3 * chosen.vectors * chosen.codes * WIDTH
    figures = {
        "ratio": ratios,
        "times": times,
        "shape": {"z": list(z.shape), "codes": list(codes.shape)},
        "dtype": "float32",
        "gigaflops": round(operations / times["vq_nearest"]["median_ms"] / 1e6, 1),
        "backend": "Triton" if chosen.device == "cuda" else f"C++, {_C.build_info()['cpu_path']}",
    }
    if chosen.device == "cuda":
        figures["peak_megabytes"] = peak_megabytes(functions)
    aims = [aim("times cdist().argmin()", ratios["cdist"], 15, "at least")]
    save("vq_nearest", figures, aims, chosen.device)


if __name__ == "__main__":
    main()
