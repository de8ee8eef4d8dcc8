# SPDX-License-Identifier: Apache-2.0
"""What the tests of all operators share: awkward lattices and grids, published words and one
table of tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast.ops import WindowPlan

# torch.testing.assert_close's own, by output dtype. Inputs are rounded to their dtype first and the
# reference runs in float64 on the rounded values, so what is compared is the operator's own error.
RTOL_ATOL = {
    torch.float32: (1.3e-6, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.float64: (1e-7, 1e-7),
}


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


def window_plan(
    window: tuple[int, int],
    size: tuple[int, int],
    origins_y: tuple[int, ...],
    origins_x: tuple[int, ...],
    *,
    hann: bool = False,
    wrap: tuple[bool, bool] = (False, False),
) -> WindowPlan:
    """A plan on an awkward lattice."""
    shapes = [torch.hann_window(n + 2, periodic=False)[1:-1] for n in window]
    weights = [tuple(shape.tolist()) if hann else (1.0,) * len(shape) for shape in shapes]
    return WindowPlan(*size, window, origins_y, origins_x, *weights, wrap)


@dataclass(frozen=True)
class Case:
    """A plan and how many channels its windows have."""

    plan: WindowPlan
    channels: int = 3

    def windows(self, dtype: torch.dtype = torch.float32) -> Tensor:
        count = len(self.plan)
        return torch.randn(count, self.channels, *self.plan.window, dtype=torch.float64).to(dtype)


def raw_plan(
    plan: WindowPlan, rows: tuple[int, int] | None = None
) -> list[list[int] | list[float]]:
    """What the registered operators take of a plan, and the canvas rows to make."""
    axes = [plan.origins_y, plan.origins_x, plan.weight_y, plan.weight_x]
    wrap_y, wrap_x = map(int, plan.wrap)
    geometry = [plan.height, plan.width, wrap_y, wrap_x, *(rows or (0, plan.height))]
    return [*(list(values) for values in axes), geometry]


PLANS = {
    "one-window": Case(window_plan((8, 8), (8, 8), (0,), (0,))),
    "one-pixel": Case(window_plan((1, 1), (1, 1), (0,), (0,)), channels=1),
    "width-one": Case(window_plan((5, 1), (9, 3), (0, 3, 4), (0, 1, 2))),
    "disjoint": Case(window_plan((4, 8), (12, 16), (0, 4, 8), (0, 8)), channels=2),
    "odd-overlap": Case(window_plan((7, 5), (19, 23), (0, 3, 7, 12), (0, 4, 8, 13, 18), hann=True)),
    "flush-border": Case(
        window_plan((8, 8), (21, 19), (0, 4, 8, 12, 13), (0, 4, 8, 11), hann=True)
    ),
    "full-overlap": Case(window_plan((16, 16), (19, 19), (0, 1, 2, 3), (0, 1, 2, 3)), channels=4),
    "wrapped": Case(
        window_plan((7, 5), (19, 13), (0, 5, 11, 16), (2, 6, 11), hann=True, wrap=(True, True))
    ),
    "wrapped-in-y": Case(
        window_plan((8, 6), (8, 13), (1, 5), (0, 4, 7), hann=True, wrap=(True, False))
    ),
    "wrapped-in-x": Case(
        window_plan((4, 16), (9, 17), (0, 4, 5), (0, 1, 9, 16), wrap=(False, True)), channels=1
    ),
    "no-channels": Case(window_plan((4, 4), (6, 6), (0, 2), (0, 2)), channels=0),
    "rows-past-a-tile": Case(
        window_plan((16, 8), (33, 17), (0, 8, 16, 17), (0, 4, 8, 9)), channels=1
    ),
    "wider-than-a-tile": Case(window_plan((4, 600), (6, 1100), (0, 2), (0, 300, 500), hann=True)),
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


TOKENS = {  # N, L, C, heads, T
    "one-number": (1, 1, 1, 1, 1),
    "one-token": (3, 7, 37, 1, 1),
    "whole-lanes": (2, 5, 64, 1, 1),
    "two-tokens": (2, 19, 96, 1, 2),
    "heads": (2, 5, 36, 3, 4),
    "eight-tokens": (1, 33, 65, 2, 8),
    "wide": (2, 3, 1030, 5, 3),
    "no-windows": (0, 4, 8, 1, 2),
    "no-positions": (2, 0, 8, 1, 1),
}


def token_case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of one token_attention call; logits are of order one."""
    n, length, c, heads, tokens = shape
    made = {"x": torch.randn(n, length, c) + 1, "norm_weight": torch.randn(c)}
    made |= {"norm_bias": torch.randn(c), "values": torch.randn(n, c)}
    if tokens > 1:
        vectors = (n, heads * tokens)
        made |= {"values": torch.randn(*vectors, c), "keys": torch.randn(*vectors, c) / c**0.5}
        made["offsets"] = torch.randn(vectors)
    return {**{name: tensor.to(dtype) for name, tensor in made.items()}, "heads": heads}


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, tensors in float64."""
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}


MAPS = {  # N, C, ...; groups
    "one": ((1, 1, 1, 1), 1),
    "odd": ((3, 37, 5, 7), 1),
    "group-of-one-channel": ((2, 7, 9, 5), 7),
    "blocks-of-eight-and-past": ((1, 64, 33, 17), 32),
    "wide": ((2, 960, 3, 3), 32),
    "one-position": ((5, 12, 1, 1), 3),
    "no-positions-axis": ((4, 12), 3),
    "sequence": ((2, 64, 101), 32),
    "volume": ((2, 6, 3, 4, 5), 2),
    "no-samples": ((0, 8, 4, 4), 2),
    "no-positions": ((2, 8, 0, 4), 2),
}


def map_parameters(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Every parameter of group_norm_silu."""
    n, c = shape[:2]
    by_channel = {name: torch.randn(c) for name in ("weight", "bias")}
    return {**by_channel, **{name: torch.randn(n, c) for name in ("add", "scale", "shift")}}
