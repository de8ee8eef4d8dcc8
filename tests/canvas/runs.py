# SPDX-License-Identifier: Apache-2.0
"""Runs on a small canvas for tests of orders, states and interruptions."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor
from toys import ConvDenoiser

from ssldiff_fast.canvas import (
    CanvasDenoiser,
    GridField,
    Rows,
    ShiftedWindows,
    WindowPlan,
    canvas_noise,
    sample,
    sample_rows,
)
from ssldiff_fast.diffusion import Schedule

WINDOW = (8, 8)
SIZE = (44, 20)


def field(seed: int = 11, rows: int = 6, columns: int = 3) -> GridField:
    cells = canvas_noise(seed, rows * columns, 1, 3).view(rows, columns, 1, 3)
    return GridField(cells, WINDOW)


def regular(stride: int = 3, weights: str = "hann") -> WindowPlan:
    return WindowPlan.regular(*SIZE, WINDOW, stride, weights)


def shifted(seed: int = 0) -> ShiftedWindows:
    return ShiftedWindows(*SIZE, WINDOW, seed=seed, overlap_from=3)


def denoiser(windows: Any = None, network: Any = None, **options: Any) -> CanvasDenoiser:
    options = {"guidance_scale": 1.75, "batch_size": 4, **options}
    conditioning = options.pop("field", None) or field()
    return CanvasDenoiser(network or ConvDenoiser(), windows or regular(), conditioning, **options)


def settings(**changes: Any) -> dict[str, Any]:
    return {"schedule": Schedule(), "solver": "ddim", "eta": 0.5, "steps": 5, "seed": 3, **changes}


def noise(seed: int = 0) -> Tensor:
    return canvas_noise(seed, 3, *SIZE)


def image(canvas: CanvasDenoiser | None = None, start: Any = None, **changes: Any) -> Tensor:
    start = noise() if start is None else start
    return sample(canvas or denoiser(), start, **settings(**changes))


def rows_of(canvas: CanvasDenoiser, start: Any, **changes: Any) -> list[Rows]:
    return list(sample_rows(canvas, start, **settings(**changes)))


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
