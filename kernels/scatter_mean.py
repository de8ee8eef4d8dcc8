# SPDX-License-Identifier: Apache-2.0
"""scatter_mean and scatter_mean_step in Triton; the equations stand in ops/scatter_mean.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox_normal import cos_turn, minus_log
from .window_lattice import Whole, axis_windows, on_device, window_slots

# Pixels of one row of the canvas that one program gathers. A block meets more windows than any of
# its pixels; on an H200, windows of 64 at every 16: 0.85 ms, 1.15 by 256, 1.30 by 64.
BLOCK = 128
NO_GUIDANCE, OF_ALL, OF_WINDOW, OF_PIXEL = 0, 1, 2, 3


@triton.jit
def _block_of(number, dtype: tl.constexpr, BLOCK: tl.constexpr):
    return (tl.zeros((BLOCK,), dtype=tl.float64) + number).to(dtype)


# Sizes that change from band to band, or step to step, must not compile the kernel again.
@triton.jit(do_not_specialize=["height", "count_y", "count_x", "first_row", "seed", "step"])
def scatter_mean_kernel(
    windows_ptr,  # [M, C, h, w]
    uncond_ptr,  # likewise, with the same strides
    scale_ptr,  # [M] or [rows, W]
    background_ptr,  # [C, rows, W]
    canvas_ptr,  # [C, rows, W]
    previous_ptr,  # [C, rows, W]
    out_ptr,  # [C, rows, W], contiguous as all the others of the canvas
    denoised_ptr,  # [C, rows, W]
    lattice_ptr,  # see _lattice
    weight_ptr,  # [h + w]
    height,
    width,
    window_height,
    window_width,
    count_y,
    count_x,
    blocks_x,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    first_row,
    seed,
    step,
    guidance_scale: tl.float64,
    of_canvas: tl.float64,
    of_output: tl.float64,
    of_noise: tl.float64,
    of_history: tl.float64,
    denoised_of_canvas: tl.float64,
    denoised_of_output: tl.float64,
    GUIDANCE: tl.constexpr,
    HAS_BACKGROUND: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_STEP: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    HAS_DENOISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each pixel sums the windows that cover it in row-major order of origins (Eq. 6)."""
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks_x
    y = program // blocks_x % height
    c = program // blocks_x // height
    x = block * BLOCK + tl.arange(0, BLOCK)
    on_canvas = x < width
    dtype = out_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), dtype=dtype)
    norm = tl.zeros((BLOCK,), dtype=dtype)
    left_out = tl.zeros((BLOCK,), dtype=dtype)
    pixel = (c * height + y) * width + x
    origins_x_ptr = lattice_ptr + count_y
    slots_ptr = origins_x_ptr + count_x
    ranges_y_ptr = slots_ptr + count_y * count_x
    ranges_x_ptr = ranges_y_ptr + 2 * height
    first_q = tl.load(ranges_x_ptr + block)
    last_q = tl.load(ranges_x_ptr + blocks_x + block)
    of_all = _block_of(guidance_scale, dtype, BLOCK)
    if GUIDANCE == 3:
        of_pixel = tl.load(scale_ptr + y * width + x, mask=on_canvas, other=0.0)
    for p in range(tl.load(ranges_y_ptr + y), tl.load(ranges_y_ptr + height + y)):
        u = y - tl.load(lattice_ptr + p)
        weight_u = tl.load(weight_ptr + u)
        for q in range(first_q, last_q):
            v = x - tl.load(origins_x_ptr + q)
            inside = (v >= 0) & (v < window_width) & on_canvas
            weight = weight_u * tl.load(weight_ptr + window_height + v, mask=inside, other=0.0)
            slot = tl.load(slots_ptr + p * count_x + q) + tl.zeros((BLOCK,), dtype=tl.int64)
            given = inside & (slot >= 0)
            at = slot * stride_n + c * stride_c + u * stride_y + v * stride_x
            value = tl.load(windows_ptr + at, mask=given, other=0.0).to(dtype)
            if GUIDANCE != 0:
                base = tl.load(uncond_ptr + at, mask=given, other=0.0).to(dtype)
                if GUIDANCE == 1:
                    value = base + of_all * (value - base)
                elif GUIDANCE == 2:
                    of_window = tl.load(scale_ptr + slot, mask=given, other=0.0)
                    value = base + of_window * (value - base)
                else:
                    value = base + of_pixel * (value - base)
            total += weight * value
            norm += tl.where(given, weight, 0.0)
            if HAS_BACKGROUND:
                left_out += tl.where(slot >= 0, 0.0, weight)
    if HAS_BACKGROUND:
        there = on_canvas & (left_out > 0.0)
        total += left_out * tl.load(background_ptr + pixel, mask=there, other=0.0)
        norm += left_out
    if NORMALISE:
        total = total / tl.where(on_canvas, norm, 1.0)
    if HAS_STEP:
        canvas = tl.load(canvas_ptr + pixel, mask=on_canvas, other=0.0)
        if HAS_DENOISED:
            denoised = (
                _block_of(denoised_of_canvas, dtype, BLOCK) * canvas
                + _block_of(denoised_of_output, dtype, BLOCK) * total
            )
            tl.store(denoised_ptr + pixel, denoised, mask=on_canvas)
        total = (
            _block_of(of_canvas, dtype, BLOCK) * canvas + _block_of(of_output, dtype, BLOCK) * total
        )
        if HAS_HISTORY:
            previous = tl.load(previous_ptr + pixel, mask=on_canvas, other=0.0)
            total += _block_of(of_history, dtype, BLOCK) * previous
        if HAS_NOISE:
            counter = tl.zeros((BLOCK,), dtype=tl.uint32)
            word0, word1, _, _ = tl.philox(
                seed,
                counter + c.to(tl.uint32),
                counter + (y + first_row).to(tl.uint32),
                x.to(tl.uint32),
                counter + tl.cast(step, tl.uint32),
            )
            normal = tl.sqrt_rn(2.0 * minus_log((word0 >> 8) + 1)) * cos_turn(word1 >> 8)
            total += _block_of(of_noise, dtype, BLOCK) * normal.to(dtype)
    tl.store(out_ptr + pixel, total, mask=on_canvas)


@dataclass(frozen=True)
class Step:
    """Arguments of scatter_mean_step that scatter_mean does not have."""

    canvas: Tensor  # [C, rows, W]
    previous: Tensor | None  # [C, rows, W]
    coefficients: list[float]
    seed: int
    step: int


def scatter_mean(*arguments: Any) -> Tensor:
    """Launch the kernel with the operator's arguments, checked by ops/scatter_mean.py."""
    *shared, normalise = arguments
    return _launch(shared, normalise, None)[0]


def scatter_mean_step(
    windows: Tensor,  # [M, C, h, w]
    canvas: Tensor,  # [C, rows, W]
    previous: Tensor | None,  # [C, rows, W]
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel with the operator's arguments, checked by ops/scatter_mean.py."""
    *shared, coefficients, seed, number = arguments
    previous = None if previous is None else previous.contiguous()
    step = Step(canvas.contiguous(), previous, coefficients, seed, number)
    return _launch([windows, *shared], True, step)


def _launch(arguments: list[Any], normalise: bool, step: Step | None) -> tuple[Tensor, Tensor]:
    windows, index, uncond, scale, background, *axes, geometry, guidance_scale = arguments
    _, width, _, _, begin, end = geometry
    dtype = torch.float64 if windows.dtype == torch.float64 else torch.float32
    out = windows.new_empty((windows.shape[1], end - begin, width), dtype=dtype)
    coefficients = step.coefficients if step is not None else [0.0] * 6
    has_denoised = coefficients[4] != 0.0 or coefficients[5] != 0.0
    denoised = torch.empty_like(out) if has_denoised else out.new_empty((0, *out.shape[1:]))
    if out.numel() == 0:
        return out, denoised
    if uncond is not None and uncond.stride() != windows.stride():
        windows, uncond = windows.contiguous(), uncond.contiguous()
    guidance = NO_GUIDANCE
    if uncond is not None:
        guidance = OF_ALL if scale is None else (OF_WINDOW if scale.dim() == 1 else OF_PIXEL)
    lattice, count_y, count_x, blocks_x = _lattice(axes, geometry, windows.shape, index)
    kind = np.float64 if dtype == torch.float64 else np.float32
    weight = np.asarray([*axes[2], *axes[3]], dtype=kind)
    scatter_mean_kernel[(out.shape[0] * out.shape[1] * blocks_x,)](
        windows,
        uncond,
        None if scale is None else scale.contiguous(),
        None if background is None else background.contiguous(),
        None if step is None else step.canvas,
        None if step is None else step.previous,
        out,
        denoised,
        on_device(lattice, windows.device),
        on_device(weight, windows.device),
        end - begin,
        width,
        *windows.shape[2:],
        count_y,
        count_x,
        blocks_x,
        *windows.stride(),
        begin,
        0 if step is None else step.seed,
        0 if step is None else step.step,
        float(guidance_scale),
        *coefficients,
        GUIDANCE=guidance,
        HAS_BACKGROUND=background is not None,
        NORMALISE=normalise,
        HAS_STEP=step is not None,
        HAS_NOISE=coefficients[2] != 0.0,
        HAS_HISTORY=coefficients[3] != 0.0,
        HAS_DENOISED=has_denoised,
        BLOCK=BLOCK,
        # a * b + c rounds twice, as on the CPU; the noise is then philox_normal's to the bit.
        enable_fp_fusion=False,
    )
    return out, denoised


def _lattice(
    axes: list[Any], geometry: list[int], shape: torch.Size, index: Tensor | None
) -> tuple[Whole, int, int, int]:
    """Origins y and x, slots, and the window ranges of each row and block, in one array."""
    height, width, wrap_y, wrap_x, begin, end = geometry
    rows = axis_windows(axes[0], shape[2], height, bool(wrap_y), begin, end)
    columns = axis_windows(axes[1], shape[3], width, bool(wrap_x), 0, width)
    slots = window_slots(rows, columns, len(axes[1]), index)
    blocks_x = triton.cdiv(width, BLOCK)
    of_row = np.arange(end - begin)
    of_block = np.arange(blocks_x) * BLOCK
    last = np.minimum(of_block + BLOCK, width) - 1
    ranges = (*rows.covering(of_row, of_row), *columns.covering(of_block, last))
    parts = (rows.origins, columns.origins, slots.ravel(), *ranges)
    packed = np.concatenate(parts).astype(np.int64, copy=False)
    return packed, len(rows.origins), len(columns.origins), blocks_x
