# SPDX-License-Identifier: Apache-2.0
"""gather_windows in Triton; the equation stands in ops/gather_windows.py."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .window_lattice import on_device

BLOCK = 512  # values of one window that one program copies


@triton.jit
def gather_windows_kernel(
    canvas_ptr,  # [C, rows, W]
    windows_ptr,  # [N, C, h, w], contiguous or channels-last
    origins_ptr,  # [N, 2]: first row in the canvas given, first column
    period,  # rows, and columns, after which a window goes on at the first
    width,
    channels,
    window_height,
    window_width,
    blocks,
    stride_c,
    stride_y,
    stride_x,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Neighbours of the result are written side by side, whatever its layout."""
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    size = tl.cast(window_height, tl.int64) * window_width * channels
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        c = i % channels
        v = i // channels % window_width
        u = i // channels // window_width
    else:
        v = i % window_width
        u = i // window_width % window_height
        c = i // window_width // window_height
    row = (tl.load(origins_ptr + 2 * n) + u) % period
    column = (tl.load(origins_ptr + 2 * n + 1) + v) % width
    at = c * stride_c + row * stride_y + column * stride_x
    value = tl.load(canvas_ptr + at, mask=i < size, other=0.0)
    tl.store(windows_ptr + n * size + i, value.to(windows_ptr.dtype.element_ty), mask=i < size)


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
        channels,
        h,
        w,
        blocks,
        *canvas.stride(),
        CHANNELS_LAST=channels_last,
        BLOCK=BLOCK,
    )
    return windows
