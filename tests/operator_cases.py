# SPDX-License-Identifier: Apache-2.0
"""What the tests of all operators share: awkward lattices and grids, published words and one
table of tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# torch.testing.assert_close's own, by output dtype. Inputs are rounded to their dtype first and the
# reference runs in float64 on the rounded values, so what is compared is the operator's own error.
RTOL_ATOL = {torch.float32: (1.3e-6, 1e-5), torch.float64: (1e-7, 1e-7)}


# Random123's published vectors for philox4x32 with 10 rounds: counter, key as one seed, words.
KNOWN_WORDS = [
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    rtol, atol = RTOL_ATOL[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


@dataclass(frozen=True)
class Lattice:
    """Arguments of one scatter_mean call besides the windows."""

    window: tuple[int, int]
    size: tuple[int, int]
    origins_y: tuple[int, ...]
    origins_x: tuple[int, ...]
    channels: int = 3
    hann: bool = False

    def windows(self, dtype: torch.dtype = torch.float32) -> Tensor:
        count = len(self.origins_y) * len(self.origins_x)
        return torch.randn(count, self.channels, *self.window, dtype=torch.float64).to(dtype)

    def weights(self) -> tuple[list[float], list[float]]:
        if not self.hann:
            return [1.0] * self.window[0], [1.0] * self.window[1]
        shapes = [torch.hann_window(n + 2, periodic=False)[1:-1] for n in self.window]
        return shapes[0].tolist(), shapes[1].tolist()

    def plan(self) -> dict[str, Any]:
        weight_y, weight_x = self.weights()
        return {
            "origins_y": self.origins_y,
            "origins_x": self.origins_x,
            "weight_y": weight_y,
            "weight_x": weight_x,
            "height": self.size[0],
            "width": self.size[1],
        }


LATTICES = {
    "one-window": Lattice((8, 8), (8, 8), (0,), (0,)),
    "one-pixel": Lattice((1, 1), (1, 1), (0,), (0,), channels=1),
    "width-one": Lattice((5, 1), (9, 3), (0, 3, 4), (0, 1, 2)),
    "disjoint": Lattice((4, 8), (12, 16), (0, 4, 8), (0, 8), channels=2),
    "odd-overlap": Lattice((7, 5), (19, 23), (0, 3, 7, 12), (0, 4, 8, 13, 18), hann=True),
    "flush-border": Lattice((8, 8), (21, 19), (0, 4, 8, 12, 13), (0, 4, 8, 11), hann=True),
    "full-overlap": Lattice((16, 16), (19, 19), (0, 1, 2, 3), (0, 1, 2, 3), channels=4),
    "no-channels": Lattice((4, 4), (6, 6), (0, 2), (0, 2), channels=0),
    "rows-past-a-tile": Lattice((16, 8), (33, 17), (0, 8, 16, 17), (0, 4, 8, 9), channels=1),
    "wider-than-a-tile": Lattice((4, 600), (6, 1100), (0, 2), (0, 300, 500), hann=True),
}


GRIDS = {  # R, K, T, D
    "one-cell": (1, 1, 1, 1),
    "one-row": (1, 6, 1, 19),
    "one-column": (5, 1, 2, 8),
    "odd": (5, 7, 3, 37),
    "wide": (2, 3, 1, 1025),
}


def grid_points(shape: tuple[int, ...]) -> Tensor:  # [70, 2] fp64
    """Points on, between and beyond the cells of a grid; the first lie on halves of cells."""
    size = torch.tensor(shape[:2], dtype=torch.float64)
    points = torch.rand(70, 2, dtype=torch.float64) * (size + 1) - 1
    points[:30] = (points[:30] * 2).round() / 2
    return points
