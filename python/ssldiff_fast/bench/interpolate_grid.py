# SPDX-License-Identifier: Apache-2.0
"""interpolate_grid beside `grid_sample` and the published slerp, which goes point by point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _C
from ..ops import interpolate_grid, interpolate_grid_reference
from .case import Case

CELLS, WIDTH = 32, 1024  # one token of a large encoder in each cell
# On the CPU the result stays below 32 MiB: beyond, malloc asks the system for fresh pages every
# time, and their faults cost ten times what the operator does.
POINTS = {"cpu": 7680, "cuda": 131_072}
SLERP_POINTS = {"cpu": 7680, "cuda": 1024}  # a second on a GPU, of the published way
SLERP_LIMIT = 0.9995
# For each element of the result: 4 products and 3 sums; for slerp a vector's 10 products with the
# others and itself besides, each with its sum.
OPERATIONS = {"bilinear": 7, "slerp": 27}
# grid_sample takes positions in float32; the baselines' sums run in float32 in any order.
TOLERANCE = {"grid_sample": 1e-3, "published slerp": 1e-4}


def candidates(grid: Tensor, points: Tensor, mode: str) -> dict[str, Callable[[], Tensor]]:
    """Ours by every backend that runs here, and the mode's baseline: [N, T, D] of each."""

    def ours() -> Tensor:
        return interpolate_grid(grid, points, mode=mode)

    def triton() -> Tensor:
        from ..kernels.interpolate_grid import interpolate_grid as kernel

        return kernel(grid, points, None, mode)

    def grid_sample() -> Tensor:
        rows, columns = grid.shape[:2]
        scale = torch.tensor([2 / (columns - 1), 2 / (rows - 1)], device=grid.device)
        where = (points.flip(1) * scale - 1).float()[None, None]
        image = grid.flatten(2).permute(2, 0, 1)[None]
        sampled = torch.nn.functional.grid_sample(
            image, where, padding_mode="border", align_corners=True
        )
        return sampled[0, :, 0].T.unflatten(1, grid.shape[2:])

    def slerp() -> Tensor:  # one point after the other, as the published notebook does
        return torch.stack([_slerp_point(grid, y, x) for y, x in points.tolist()])

    functions = {"interpolate_grid": ours}
    if grid.device.type == "cuda" and _C.CUDA_PROBLEM is None:
        functions["Triton"] = triton  # beside CUDA C++, which is what interpolate_grid runs
    if mode == "bilinear":
        return {**functions, "grid_sample": grid_sample}
    return {**functions, "published slerp": slerp}


def _slerp_point(grid: Tensor, y: float, x: float) -> Tensor:  # [T, D]
    top, left = int(y), int(x)
    bottom, right = min(top + 1, grid.shape[0] - 1), min(left + 1, grid.shape[1] - 1)
    upper = _slerp(grid[top, left], grid[top, right], x - left)
    lower = _slerp(grid[bottom, left], grid[bottom, right], x - left)
    return _slerp(upper, lower, y - top)


def _slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    cosine = float((a / a.norm() * (b / b.norm())).sum())
    if abs(cosine) > SLERP_LIMIT:
        return (1.0 - share) * a + share * b
    angle = torch.arccos(torch.tensor(cosine))
    from_a, from_b = torch.sin((1.0 - share) * angle), torch.sin(share * angle)
    return (float(from_a) * a + float(from_b) * b) / float(torch.sin(angle))


def case(device: str, mode: str, count: int | None = None) -> Case:
    """Points all over a grid of one token a cell."""
    grid = torch.randn(CELLS, CELLS, 1, WIDTH, device=device)
    usual = (POINTS if mode == "bilinear" else SLERP_POINTS)[device]
    points = torch.rand(count or usual, 2, dtype=torch.float64, device=device)
    points *= CELLS - 1
    functions = candidates(grid, points, mode)

    def check() -> None:
        few = points[:64]
        expected = interpolate_grid_reference(grid.double(), few, mode=mode).float()
        for name, function in candidates(grid, few, mode).items():
            atol = TOLERANCE.get(name, 1e-5)
            torch.testing.assert_close(function(), expected, rtol=1e-5, atol=atol)

    made = len(points) * WIDTH
    return Case(
        operator="interpolate_grid",
        label=mode,
        device=device,
        functions=functions,
        check=check,
        shape={"grid": list(grid.shape), "points": list(points.shape)},
        dtype=grid.dtype,
        moved=grid.nbytes + points.nbytes + made * grid.itemsize,
        operations=OPERATIONS[mode] * made,
        aims={"grid_sample": 1} if mode == "bilinear" else {"published slerp": 20},
    )


def cases(device: str) -> list[Case]:
    """The paper's mode, and the published notebook's."""
    return [case(device, "bilinear"), case(device, "slerp")]
