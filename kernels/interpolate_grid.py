# SPDX-License-Identifier: Apache-2.0
"""interpolate_grid in Triton; the equations stand in ops/interpolate_grid.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 256  # components of a token that one program holds at a time
MODES = {"bilinear": 0, "slerp": 1, "nearest": 2}
BILINEAR = tl.constexpr(0)
SLERP = tl.constexpr(1)


@triton.jit
def arccos(cosine):  # fp64, |cosine| <= 0.9995
    # A cubic good to 7e-5 (Abramowitz and Stegun 4.4.45), then Newton's steps.
    c = tl.abs(cosine)
    angle = tl.sqrt(1.0 - c) * (1.5707288 + c * (-0.2121144 + c * (0.0742610 - c * 0.0187293)))
    angle = tl.where(cosine < 0.0, 3.141592653589793 - angle, angle)
    for _ in tl.static_range(3):
        angle += (tl.cos(angle) - cosine) / tl.sin(angle)
    return angle


@triton.jit
def slerp_factors(uu, uv, vv, has_u, has_v, share):
    """p and q of S(u, v, share) = p u + q v, from the products of the vectors."""
    has_u = has_u & (share < 1.0)
    has_v = has_v & (share > 0.0)
    norms = tl.sqrt(tl.where(uu > 0.0, uu, 0.0)) * tl.sqrt(tl.where(vv > 0.0, vv, 0.0))
    # A zero embedding has no direction: its cosine counts as 1, hence a straight line.
    cosine = tl.where(norms > 0.0, uv / tl.where(norms > 0.0, norms, 1.0), 1.0)
    straight = tl.abs(cosine) > 0.9995
    angle = arccos(tl.where(straight, 0.0, cosine))
    p = tl.where(straight, 1.0 - share, tl.sin((1.0 - share) * angle) / tl.sin(angle))
    q = tl.where(straight, share, tl.sin(share * angle) / tl.sin(angle))
    p = tl.where(has_u, tl.where(has_v, p, 1.0), 0.0)
    q = tl.where(has_v, tl.where(has_u, q, 1.0), 0.0)
    return p, q


@triton.jit
def product(factor, value):
    # A cell that takes no part may hold NaN.
    return tl.where(factor != 0.0, factor * value, 0.0)


@triton.jit
def load_cell(ptr, d, width, weight):
    taken = (d < width) & ((tl.zeros_like(d) + weight) != 0)
    return tl.load(ptr + d, mask=taken, other=0.0)


@triton.jit
def interpolate_grid_kernel(
    grid_ptr,  # [R, K, T, D], contiguous
    points_ptr,  # [N, 2], contiguous
    valid_ptr,  # [R, K], contiguous; anything without HAS_VALID
    out_ptr,  # [N, T, D], contiguous
    rows,
    columns,
    tokens,
    width,
    HAS_VALID: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program interpolates one token of one point."""
    program = tl.program_id(0).to(tl.int64)
    n = program // tokens
    t = program % tokens
    y = tl.load(points_ptr + 2 * n)
    x = tl.load(points_ptr + 2 * n + 1)
    y = tl.where(y > 0.0, tl.minimum(y, tl.cast(rows - 1, tl.float64)), 0.0)
    x = tl.where(x > 0.0, tl.minimum(x, tl.cast(columns - 1, tl.float64)), 0.0)
    top = y.to(tl.int64)
    left = x.to(tl.int64)
    low = tl.minimum(top + 1, rows - 1)
    right = tl.minimum(left + 1, columns - 1)
    dtype = out_ptr.dtype.element_ty
    y = (y - top.to(tl.float64)).to(dtype)
    x = (x - left.to(tl.float64)).to(dtype)
    a = top * columns + left
    b = top * columns + right
    c = low * columns + left
    d = low * columns + right
    if HAS_VALID:
        has_a = tl.load(valid_ptr + a) != 0
        has_b = tl.load(valid_ptr + b) != 0
        has_c = tl.load(valid_ptr + c) != 0
        has_d = tl.load(valid_ptr + d) != 0
    else:
        has_a = top >= 0
        has_b = has_a
        has_c = has_a
        has_d = has_a
    a_ptr = grid_ptr + (a * tokens + t) * width
    b_ptr = grid_ptr + (b * tokens + t) * width
    c_ptr = grid_ptr + (c * tokens + t) * width
    d_ptr = grid_ptr + (d * tokens + t) * width
    if MODE == SLERP:
        aa = tl.zeros((BLOCK_D,), dtype=tl.float64)
        ab = tl.zeros((BLOCK_D,), dtype=tl.float64)
        ac = tl.zeros((BLOCK_D,), dtype=tl.float64)
        ad = tl.zeros((BLOCK_D,), dtype=tl.float64)
        bb = tl.zeros((BLOCK_D,), dtype=tl.float64)
        bc = tl.zeros((BLOCK_D,), dtype=tl.float64)
        bd = tl.zeros((BLOCK_D,), dtype=tl.float64)
        cc = tl.zeros((BLOCK_D,), dtype=tl.float64)
        cd = tl.zeros((BLOCK_D,), dtype=tl.float64)
        dd = tl.zeros((BLOCK_D,), dtype=tl.float64)
        for start in range(0, width, BLOCK_D):
            i = start + tl.arange(0, BLOCK_D)
            va = tl.load(a_ptr + i, mask=i < width, other=0.0).to(tl.float64)
            vb = tl.load(b_ptr + i, mask=i < width, other=0.0).to(tl.float64)
            vc = tl.load(c_ptr + i, mask=i < width, other=0.0).to(tl.float64)
            vd = tl.load(d_ptr + i, mask=i < width, other=0.0).to(tl.float64)
            aa += va * va
            ab += va * vb
            ac += va * vc
            ad += va * vd
            bb += vb * vb
            bc += vb * vc
            bd += vb * vd
            cc += vc * vc
            cd += vc * vd
            dd += vd * vd
        aa, bb, ab = tl.sum(aa), tl.sum(bb), tl.sum(ab)
        cc, dd, cd = tl.sum(cc), tl.sum(dd), tl.sum(cd)
        pa, pb = slerp_factors(aa, ab, bb, has_a, has_b, x.to(tl.float64))
        pc, pd = slerp_factors(cc, cd, dd, has_c, has_d, x.to(tl.float64))
        # Slerp of slerps is a weighted sum of the four cells too.
        uu = product(pa * pa, aa) + product(2.0 * pa * pb, ab) + product(pb * pb, bb)
        vv = product(pc * pc, cc) + product(2.0 * pc * pd, cd) + product(pd * pd, dd)
        uv = product(pa * pc, tl.sum(ac)) + product(pa * pd, tl.sum(ad))
        uv += product(pb * pc, tl.sum(bc)) + product(pb * pd, tl.sum(bd))
        has_top = (pa != 0.0) | (pb != 0.0)
        has_low = (pc != 0.0) | (pd != 0.0)
        p, q = slerp_factors(uu, uv, vv, has_top, has_low, y.to(tl.float64))
        wa = (p * pa).to(dtype)
        wb = (p * pb).to(dtype)
        wc = (q * pc).to(dtype)
        wd = (q * pd).to(dtype)
    else:
        wa = tl.where(has_a, (1.0 - y) * (1.0 - x), 0.0)
        wb = tl.where(has_b, (1.0 - y) * x, 0.0)
        wc = tl.where(has_c, y * (1.0 - x), 0.0)
        wd = tl.where(has_d, y * x, 0.0)
        if MODE == BILINEAR:
            total = ((wa + wb) + wc) + wd
            # Divided only where a cell is missing, so that whole grids keep their exact weights.
            whole = (has_a & has_b & has_c & has_d) | (total == 0.0)
            total = tl.where(whole, 1.0, total)
            wa = wa / total
            wb = wb / total
            wc = wc / total
            wd = wd / total
        else:
            largest = tl.maximum(tl.maximum(wa, wb), tl.maximum(wc, wd))
            is_a = (wa == largest) & (largest > 0.0)
            is_b = (wb == largest) & (wa < largest)
            is_c = (wc == largest) & (wa < largest) & (wb < largest)
            is_d = (wd == largest) & (wa < largest) & (wb < largest) & (wc < largest)
            wa = is_a.to(dtype)
            wb = is_b.to(dtype)
            wc = is_c.to(dtype)
            wd = is_d.to(dtype)
    for start in range(0, width, BLOCK_D):
        i = start + tl.arange(0, BLOCK_D)
        value = wa * load_cell(a_ptr, i, width, wa)
        value += wb * load_cell(b_ptr, i, width, wb)
        value += wc * load_cell(c_ptr, i, width, wc)
        value += wd * load_cell(d_ptr, i, width, wd)
        tl.store(out_ptr + program * width + i, value, mask=i < width)


def interpolate_grid(
    grid: Tensor,  # [R, K, T, D] fp32 | fp64
    points: Tensor,  # [N, 2] fp64
    valid: Tensor | None,  # [R, K] bool
    mode: str,
) -> Tensor:  # [N, T, D], dtype of grid
    """Launch the kernel; arguments have been checked by ops/interpolate_grid.py."""
    grid, points = grid.contiguous(), points.contiguous()
    out = grid.new_empty((points.shape[0], *grid.shape[2:]))
    if out.numel() > 0:
        interpolate_grid_kernel[(points.shape[0] * grid.shape[2],)](
            grid,
            points,
            points if valid is None else valid.contiguous().view(torch.uint8),
            out,
            *grid.shape,
            HAS_VALID=valid is not None,
            MODE=MODES[mode],
            BLOCK_D=BLOCK_D,
        )
    return out
