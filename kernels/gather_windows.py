# SPDX-License-Identifier: Apache-2.0
"""gather_windows in Triton; the equation stands in ops/gather_windows.py."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .window_lattice import on_device

BLOCK = 1024  # values of one window that one program copies


# Sizes of windows are constants, since a network has one or two: divisions by whole numbers of 64
# bits that are known later took five times as long as the memory (H200).
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
    BLOCK: tl.constexpr,
):
    """Neighbours of the result are written side by side, whatever its layout."""
    SIZE: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        c = i % CHANNELS
        v = i // CHANNELS % WIDTH
        u = i // CHANNELS // WIDTH
    else:
        v = i % WIDTH
        u = i // WIDTH % HEIGHT
        c = i // WIDTH // HEIGHT
    row = tl.load(origins_ptr + 2 * n) + u
    row = tl.where(row < period, row, row - period)
    column = tl.load(origins_ptr + 2 * n + 1) + v
    column = tl.where(column < width, column, column - width)
    at = c.to(tl.int64) * stride_c + row * stride_y + column * stride_x
    value = tl.load(canvas_ptr + at, mask=i < SIZE, other=0.0)
    tl.store(windows_ptr + n * SIZE + i, value.to(windows_ptr.dtype.element_ty), mask=i < SIZE)


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
    blocks = triton.cdiv(channels * h * w, BLOCK)
    gather_windows_kernel[(len(index) * blocks,)](
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
        BLOCK=BLOCK,
    )
    return windows
