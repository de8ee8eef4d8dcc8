# SPDX-License-Identifier: Apache-2.0
"""scatter_mean in Triton; the equation stands in ops/scatter_mean.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # pixels of one row of the canvas that one program gathers


# Sizes that change from band to band must not compile the kernel again.
@triton.jit(do_not_specialize=["height", "count_x", "blocks_x"])
def scatter_mean_kernel(
    windows_ptr,  # [P * Q, C, h, w]
    canvas_ptr,  # [C, H, W], contiguous
    origins_x_ptr,  # [Q]
    first_y_ptr,  # [H], first window row that covers y
    last_y_ptr,  # [H], one past the last
    origins_y_ptr,  # [P]
    weight_y_ptr,  # [h]
    weight_x_ptr,  # [w]
    height,
    width,
    window_width,
    count_x,
    blocks_x,
    first_q_ptr,  # [blocks_x], first window column that covers any pixel of the block
    last_q_ptr,  # [blocks_x], one past the last
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    BLOCK: tl.constexpr,
):
    """Each pixel sums the windows that cover it in row-major order of origins (Eq. 6)."""
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks_x
    y = program // blocks_x % height
    c = program // blocks_x // height
    x = block * BLOCK + tl.arange(0, BLOCK)
    dtype = canvas_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), dtype=dtype)
    norm = tl.zeros((BLOCK,), dtype=dtype)
    first_q = tl.load(first_q_ptr + block)
    last_q = tl.load(last_q_ptr + block)
    for p in range(tl.load(first_y_ptr + y), tl.load(last_y_ptr + y)):
        u = y - tl.load(origins_y_ptr + p)
        weight_u = tl.load(weight_y_ptr + u)
        row_ptr = windows_ptr + c * stride_c + u * stride_y
        for q in range(first_q, last_q):
            v = x - tl.load(origins_x_ptr + q)
            inside = (v >= 0) & (v < window_width) & (x < width)
            weight = weight_u * tl.load(weight_x_ptr + v, mask=inside, other=0.0)
            window_ptr = row_ptr + (p * count_x + q) * stride_n
            value = tl.load(window_ptr + v * stride_x, mask=inside, other=0.0)
            total += weight * value.to(dtype)
            norm += weight
    norm = tl.where(x < width, norm, 1.0)
    tl.store(canvas_ptr + (c * height + y) * width + x, total / norm, mask=x < width)


def scatter_mean(
    windows: Tensor,  # [P * Q, C, h, w] fp32 | bf16 | fp16 | fp64
    origins_y: list[int],  # [P]
    origins_x: list[int],  # [Q]
    weight_y: list[float],  # [h]
    weight_x: list[float],  # [w]
    height: int,
    width: int,
) -> Tensor:  # [C, H, W] fp32 (fp64 for fp64)
    """Launch the kernel; arguments have been checked by ops/scatter_mean.py."""
    _, channels, window_height, window_width = windows.shape
    dtype = torch.float64 if windows.dtype == torch.float64 else torch.float32
    canvas = windows.new_empty((channels, height, width), dtype=dtype)
    if canvas.numel() == 0:
        return canvas

    def upload(values: Tensor) -> Tensor:
        # Pageable memory has been read on return, so the host need not wait for the device.
        return values.to(windows.device, non_blocking=True)

    blocks_x = triton.cdiv(width, BLOCK)
    rows = torch.arange(height)
    starts = torch.arange(blocks_x) * BLOCK
    ends = (starts + BLOCK).clamp(max=width) - 1
    first_y, last_y = _covering(origins_y, window_height, rows, rows)
    first_q, last_q = _covering(origins_x, window_width, starts, ends)
    scatter_mean_kernel[(channels * height * blocks_x,)](
        windows,
        canvas,
        upload(torch.tensor(origins_x)),
        upload(first_y),
        upload(last_y),
        upload(torch.tensor(origins_y)),
        upload(torch.tensor(weight_y, dtype=dtype)),
        upload(torch.tensor(weight_x, dtype=dtype)),
        height,
        width,
        window_width,
        len(origins_x),
        blocks_x,
        upload(first_q),
        upload(last_q),
        *windows.stride(),
        BLOCK=BLOCK,
    )
    return canvas


def _covering(origins: list[int], window: int, first: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    """Windows of one axis that cover any position of [first, last], as half-open ranges."""
    ascending = torch.tensor(origins)
    return (
        torch.searchsorted(ascending, first - window, right=True),
        torch.searchsorted(ascending, last, right=True),
    )
