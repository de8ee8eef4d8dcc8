# SPDX-License-Identifier: Apache-2.0
"""gather_windows in Triton; the equation stands in ops/gather_windows.py."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .window_lattice import on_device

BLOCK = 1024  # values of some rows of one window that one program copies


# Sizes of windows are constants, since a network has one or two: divisions by whole numbers that
# are known later took five times as long as the memory (H200).
@triton.jit
def gather_windows_kernel(
    canvas_ptr,  # [C, rows, W]
    windows_ptr,  # [N, C, h, w], contiguous or channels-last
    origins_ptr,  # [N, 2]: first row in the canvas given, first column
    period,  # rows, and columns, after which a window goes on at the first
    width,
    stride_c,
    stride_y,
    stride_x,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,  # of a window
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Neighbours of the result are written side by side, whatever its layout."""
    PLANES: tl.constexpr = 1 if CHANNELS_LAST else CHANNELS
    LINE: tl.constexpr = WIDTH * CHANNELS // PLANES  # values of a row that lie side by side
    BLOCKS: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    program = tl.program_id(0)
    u = program % BLOCKS * ROWS + tl.arange(0, ROWS)
    plane = program // BLOCKS % PLANES
    n = (program // BLOCKS // PLANES).to(tl.int64)
    j = tl.arange(0, BLOCK_J)
    if CHANNELS_LAST:
        c, v = j % CHANNELS, j // CHANNELS
    else:
        c, v = plane, j
    row = tl.load(origins_ptr + 2 * n) + u
    row = tl.where(row < period, row, row - period)
    column = tl.load(origins_ptr + 2 * n + 1) + v
    column = tl.where(column < width, column, column - width)
    at = (row * stride_y)[:, None] + (column * stride_x + c.to(tl.int64) * stride_c)[None, :]
    there = (u < HEIGHT)[:, None] & (j < LINE)[None, :]
    value = tl.load(canvas_ptr + at, mask=there, other=0.0)
    to = windows_ptr + (n * PLANES + plane) * (HEIGHT * LINE) + u[:, None] * LINE + j[None, :]
    tl.store(to, value.to(windows_ptr.dtype.element_ty), mask=there)


def gather_windows(
    canvas: Tensor,  # [C, rows, W] fp32 | bf16 | fp16 | fp64
    index: Tensor,  # [N] int64, on the CPU
    origins_y: list[int],
    origins_x: list[int],
    geometry: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:  # [N, C, h, w]
    """Launch the kernel; arguments have been checked by ops/gather_windows.py."""
    height, width, wrap_y, _, h, w, first_row = geometry
    channels = canvas.shape[0]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    windows = torch.empty(
        (len(index), channels, h, w), dtype=dtype, device=canvas.device, memory_format=layout
    )
    if windows.numel() == 0:
        return windows
    numbers = index.numpy()
    rows = np.asarray(origins_y, dtype=np.int64)[numbers // len(origins_x)] - first_row
    if wrap_y:
        rows %= height
    origins = np.stack((rows, np.asarray(origins_x, dtype=np.int64)[numbers % len(origins_x)]), 1)
    planes = 1 if channels_last else channels
    block_j = triton.next_power_of_2(w * channels // planes)
    rows_at_once = min(max(BLOCK // block_j, 1), triton.next_power_of_2(h))
    blocks = triton.cdiv(h, rows_at_once)
    gather_windows_kernel[(len(index) * planes * blocks,)](
        canvas,
        windows,
        on_device(origins, canvas.device),
        height,
        width,
        *canvas.stride(),
        CHANNELS=channels,
        HEIGHT=h,
        WIDTH=w,
        CHANNELS_LAST=channels_last,
        ROWS=rows_at_once,
        BLOCK_J=block_j,
    )
    return windows
