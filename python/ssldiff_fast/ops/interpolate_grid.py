# SPDX-License-Identifier: Apache-2.0
"""The grid of embeddings between its cells (section 3.2 of the paper)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C, _checks
from ._register import register

_CALL = "interpolate_grid"
_DTYPES = (torch.float32, torch.float64)
# Above this |cos| the sine in slerp's denominator is too small, and a straight line as good.
_SLERP_LIMIT = 0.9995


def interpolate_grid(
    grid: Tensor,  # [R, K, T, D] fp32 | fp64
    points: Tensor,  # [N, 2] fp64, (row, column) in cells
    *,
    mode: str = "bilinear",
    valid: Tensor | None = None,  # [R, K] bool
) -> Tensor:  # [N, T, D], dtype of grid
    r"""Embeddings at points between the cells; points beyond the outer cells replicate them.

    With y and x the point's shares of the lower row and the right column, and a, b, c, d the
    upper left, upper right, lower left and lower right of its four cells,

        bilinear  (1 - y) ((1 - x) a + x b) + y ((1 - x) c + x d)
        slerp     S(S(a, b, x), S(c, d, x), y), token by token, with A the angle between u and v,
                  S(u, v, s) = (sin((1 - s) A) u + sin(s A) v) / sin(A),
                  and a straight line where |cos(A)| > 0.9995 or a vector is zero
        nearest   the cell of the largest bilinear weight; of equal ones the first, row by row

    Cells that are not `valid` are left out, whatever they hold: bilinear weights are renormalised
    over the others, slerp takes the other cell of the pair in full, nearest looks among the
    others. Where no cell of weight above zero is left the result is zeros, the null embedding.

    A cell of weight zero takes no part, so a NaN reaches only points nearer than one cell. A NaN
    in `points` counts as 0. Gradients flow to `grid` only; each cell sums its own in a fixed
    order, without atomics.

    Args:
        grid: the cells.
        points: (row, column) in cells; the centre of the first cell is (0, 0).
        mode: "bilinear", "slerp" or "nearest".
        valid: which cells take part; without it all do.

    Returns:
        The embeddings [N, T, D], not normalised.

    Raises:
        TypeError: a tensor of another dtype, or no tensor.
        ValueError: shapes or devices that disagree, an empty grid, an unknown mode.
        RuntimeError: the compiled operators are missing.
    """
    _check(grid, points, mode, valid)
    _C.require(_CALL)
    return torch.ops.ssldiff.interpolate_grid(grid, points, valid, mode)


def interpolate_grid_reference(
    grid: Tensor,  # [R, K, T, D]
    points: Tensor,  # [N, 2]
    *,
    mode: str = "bilinear",
    valid: Tensor | None = None,  # [R, K]
) -> Tensor:  # [N, T, D]
    """The same in plain PyTorch."""
    _check(grid, points, mode, valid)
    cells, there, shares = _corners(grid, points, valid)
    corners = grid.flatten(0, 1)[cells]
    return MODES[mode](corners, there, shares)


def _corners(grid: Tensor, points: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The four cells of each point, upper left, upper right, lower left, lower right.

    Returns:
        Their indices [4, N] in the flattened grid; which take part, [4, N, 1, 1] bool; the shares
        of the lower row and of the right column, [2, N, 1, 1] in the dtype of the grid.
    """
    rows, columns = grid.shape[:2]
    limit = torch.tensor([rows - 1, columns - 1], dtype=torch.float64, device=points.device)
    points = torch.minimum(points.nan_to_num(0.0).clamp(min=0.0), limit)
    low = points.floor().long()
    high = torch.minimum(low + 1, limit.long())
    shares = (points - low).to(grid.dtype).T[:, :, None, None]
    upper, lower = low[:, 0] * columns, high[:, 0] * columns
    left, right = low[:, 1], high[:, 1]
    cells = torch.stack((upper + left, upper + right, lower + left, lower + right))
    there = torch.ones_like(cells, dtype=torch.bool) if valid is None else valid.flatten()[cells]
    return cells, there[:, :, None, None], shares


def _weights(there: Tensor, shares: Tensor) -> Tensor:  # [4, N, 1, 1]
    y, x = shares
    return torch.stack(((1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x)) * there


def _bilinear_weights(there: Tensor, shares: Tensor) -> Tensor:  # [4, N, 1, 1]
    weights = _weights(there, shares)
    total = weights.sum(0)
    # Divided only where a cell is missing, so that whole grids keep their exact weights.
    return weights / torch.where(there.all(0) | (total == 0), torch.ones_like(total), total)


def _nearest_weights(there: Tensor, shares: Tensor) -> Tensor:  # [4, N, 1, 1]
    weights = _weights(there, shares)
    first = torch.zeros_like(weights).scatter_(0, weights.argmax(0, keepdim=True), 1.0)
    return first * (weights > 0)


def _weighted(corners: Tensor, weights: Tensor) -> Tensor:
    return (weights * torch.where(weights > 0, corners, 0.0)).sum(0)


def _bilinear(corners: Tensor, there: Tensor, shares: Tensor) -> Tensor:
    return _weighted(corners, _bilinear_weights(there, shares))


def _nearest(corners: Tensor, there: Tensor, shares: Tensor) -> Tensor:
    return _weighted(corners, _nearest_weights(there, shares))


def _angle(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # each [N, T, 1]
    """The cosine of two vectors, whether slerp takes a straight line, and the angle elsewhere."""
    # A zero embedding has no direction: its cosine counts as 1, hence a straight line.
    norms = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    # (Never divided by zero, whose gradient would be NaN.)
    products = (a * b).sum(-1, keepdim=True)
    cosine = torch.where(norms > 0, products / torch.where(norms > 0, norms, 1.0), 1.0)
    straight = cosine.abs() > _SLERP_LIMIT
    return cosine, straight, torch.arccos(torch.where(straight, 0.0, cosine))


def _slerp_pair(
    a: Tensor,  # [N, T, D]
    b: Tensor,  # [N, T, D]
    share: Tensor,  # [N, 1, 1]
) -> Tensor:
    _, straight, angle = _angle(a, b)
    arc = (torch.sin((1.0 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return torch.where(straight, (1.0 - share) * a + share * b, arc)


def _pair(
    a: Tensor, b: Tensor, has_a: Tensor, has_b: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    # A cell of weight 0 does not count as there: it must not stand in for a missing one.
    has_a, has_b = has_a & (share < 1.0), has_b & (share > 0.0)
    single = torch.where(has_a, a, torch.where(has_b, b, torch.zeros_like(b)))
    return torch.where(has_a & has_b, _slerp_pair(a, b, share), single), has_a | has_b


def _slerp(corners: Tensor, there: Tensor, shares: Tensor) -> Tensor:
    top = _pair(corners[0], corners[1], there[0], there[1], shares[1])
    bottom = _pair(corners[2], corners[3], there[2], there[3], shares[1])
    return _pair(top[0], bottom[0], top[1], bottom[1], shares[0])[0]


# [4, N, T, D] corners, [4, N, 1, 1] which of them are there, [2, N, 1, 1] shares -> [N, T, D]
MODES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bilinear": _bilinear,
    "slerp": _slerp,
    "nearest": _nearest,
}


def _check(grid: Tensor, points: Tensor, mode: str, valid: Tensor | None) -> None:
    sizes = _checks.check_shape("grid", grid, "R K T D", call=_CALL)
    _checks.check_dtype("grid", grid, _DTYPES, call=_CALL)
    _checks.check_shape("points", points, "N 2", call=_CALL)
    _checks.check_dtype("points", points, (torch.float64,), call=_CALL)
    _checks.check_same_device(_CALL, grid=grid, points=points)
    _checks.check_choice("mode", mode, MODES, call=_CALL)
    if min(sizes.values()) < 1:
        raise ValueError(f"{_CALL}: grid has shape {list(grid.shape)}, but no size may be 0.")
    if valid is not None:
        _checks.check_shape("valid", valid, "R K", sizes, call=_CALL)
        _checks.check_dtype("valid", valid, (torch.bool,), call=_CALL)
        _checks.check_same_device(_CALL, grid=grid, valid=valid)


def _fake(grid: Tensor, points: Tensor, valid: Tensor | None, mode: str) -> Tensor:
    return grid.new_empty((points.shape[0], *grid.shape[2:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grid, points, valid, ctx.mode = inputs
    ctx.save_for_backward(grid, points, valid)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # grad: [N, T, D]
    grid, points, valid = ctx.saved_tensors
    cells, there, shares = _corners(grid, points, valid)
    if ctx.mode == "slerp":
        grad_corners = _slerp_gradient(grid.flatten(0, 1)[cells], there, shares, grad)
    else:
        weights = _nearest_weights if ctx.mode == "nearest" else _bilinear_weights
        grad_corners = weights(there, shares) * grad
    # points, valid, mode
    return _sum_by_cell(grad_corners, cells, grid), None, None, None


def _sum_by_cell(values: Tensor, cells: Tensor, grid: Tensor) -> Tensor:
    """Each cell's sum of the values [4, N, T, D] that belong to it, in the order in which they
    stand: sorted by cell, so that none is added by two threads."""
    if values.shape[1] == 0:
        return torch.zeros_like(grid)
    ascending, order = cells.flatten().sort(stable=True)
    bounds = torch.arange(grid.shape[0] * grid.shape[1] + 1, device=cells.device)
    lengths = torch.searchsorted(ascending, bounds).diff()
    summed = torch.segment_reduce(
        values.flatten(0, 1).flatten(1)[order], "sum", lengths=lengths, axis=0, initial=0.0
    )
    return summed.view(grid.shape)


def _slerp_gradient(corners: Tensor, there: Tensor, shares: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `_slerp` with respect to the corners: [4, N, T, D]."""
    y, x = shares
    top, has_top = _pair(corners[0], corners[1], there[0], there[1], x)
    bottom, has_bottom = _pair(corners[2], corners[3], there[2], there[3], x)
    grad_top, grad_bottom = _pair_gradient(top, bottom, has_top, has_bottom, y, grad)
    upper = _pair_gradient(corners[0], corners[1], there[0], there[1], x, grad_top)
    lower = _pair_gradient(corners[2], corners[3], there[2], there[3], x, grad_bottom)
    return torch.stack((*upper, *lower))


def _pair_gradient(
    a: Tensor, b: Tensor, has_a: Tensor, has_b: Tensor, share: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    has_a, has_b = has_a & (share < 1.0), has_b & (share > 0.0)
    grad_a, grad_b = _slerp_pair_gradient(a, b, share, grad)
    zero = torch.zeros_like(grad)
    both = has_a & has_b
    return (
        torch.where(both, grad_a, torch.where(has_a, grad, zero)),
        torch.where(both, grad_b, torch.where(has_b & ~has_a, grad, zero)),
    )


def _slerp_pair_gradient(
    a: Tensor, b: Tensor, share: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """S = p a + q b with p and q functions of the angle, and that of the cosine."""
    cosine, straight, angle = _angle(a, b)
    sine = torch.sin(angle)
    p = torch.where(straight, 1.0 - share, torch.sin((1.0 - share) * angle) / sine)
    q = torch.where(straight, share, torch.sin(share * angle) / sine)
    slope_p = ((1.0 - share) * torch.cos((1.0 - share) * angle) - p * cosine) / sine
    slope_q = (share * torch.cos(share * angle) - q * cosine) / sine
    through_angle = slope_p * (grad * a).sum(-1, keepdim=True)
    through_angle = through_angle + slope_q * (grad * b).sum(-1, keepdim=True)
    grad_cosine = torch.where(straight, 0.0, -through_angle / sine)
    # Where a vector is zero the line is straight, and its direction does not matter.
    tiny = torch.finfo(a.dtype).tiny
    unit_a = a / a.norm(dim=-1, keepdim=True).clamp(min=tiny)
    unit_b = b / b.norm(dim=-1, keepdim=True).clamp(min=tiny)
    scale_a = grad_cosine / a.norm(dim=-1, keepdim=True).clamp(min=tiny)
    scale_b = grad_cosine / b.norm(dim=-1, keepdim=True).clamp(min=tiny)
    return (
        p * grad + scale_a * (unit_b - cosine * unit_a),
        q * grad + scale_b * (unit_a - cosine * unit_b),
    )


def _triton(*arguments: Any) -> Tensor:
    from ..kernels.interpolate_grid import interpolate_grid as kernel

    return kernel(*arguments)


register(_CALL, fake=_fake, triton=_triton, setup_context=_setup_context, backward=_backward)
