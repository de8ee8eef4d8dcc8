# SPDX-License-Identifier: Apache-2.0
"""vq_nearest beside `cdist().argmin()` and the expanded square, which both fill a matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import vq_nearest
from .case import Case

WIDTH = 3
# The expanded square cancels: its rounding may prefer another code, nearer or not.
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

    return {"vq_nearest": ours, "cdist().argmin()": cdist, "expanded square": expanded}


def case(device: str, vectors: int = 65_536, codes: int = 8_192) -> Case:
    """Vectors and codes from one normal distribution."""
    z = torch.randn(vectors, WIDTH, device=device)
    book = torch.randn(codes, WIDTH, device=device)
    functions = candidates(z, book)

    def distances(indices: Tensor) -> Tensor:
        return (z.double() - book[indices].double()).square().sum(1)

    def check() -> None:
        found = distances(functions["vq_nearest"]())
        for name, function in functions.items():
            nearer = int((found > distances(function()) + NEARLY).sum())
            if nearer:
                raise AssertionError(f"{name} found a nearer code for {nearer} vectors")

    return Case(
        operator="vq_nearest",
        label="",
        device=device,
        functions=functions,
        check=check,
        shape={"z": list(z.shape), "codes": list(book.shape)},
        dtype=z.dtype,
        moved=2 * z.nbytes + book.nbytes + 8 * vectors,
        operations=3 * vectors * codes * WIDTH,  # a component: difference, product, sum
        aims={"cdist().argmin()": 15},
        # The results, and no more for more codes: all distances would be 2.1 GB.
        megabytes_aim=2 * (z.nbytes + 8 * vectors) / 1e6,
        cuda_sources=False,
    )


def cases(device: str) -> list[Case]:
    """The published codebook, and the latents of 16 windows."""
    return [case(device)]
