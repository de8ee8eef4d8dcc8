# SPDX-License-Identifier: Apache-2.0
"""Window rows in, finished canvas rows out: what denoising and decoding have in common.

Windows are evaluated one window row after another, in canonical micro-batches, and a canvas row is
final once the last window row that covers it is done. So only a few window rows are ever held, and
the bytes do not depend on how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ssldiff_fast._checks import check_positive
from ssldiff_fast.ops import WindowPlan, scatter_mean

# Window outputs held before they are averaged. More saves repeated work where bands meet.
_HELD_BYTES = 64 * 2**20


def micro_batches(count: int, batch_size: int) -> list[Tensor]:
    """The canonical micro-batches of a window row of `count` windows.

    As few as `batch_size` allows, all of one size, which is as small as that number permits; the
    last one is padded with its last window. So the shape that the network sees, and with it the
    rounding, depends on the plan and on `batch_size` only.

    Returns:
        One [B] int64 tensor of columns a micro-batch; B is the same for all.
    """
    check_positive("batch_size", batch_size, call="micro_batches")
    if count == 0:
        return []
    groups = -(-count // batch_size)
    size = -(-count // groups)
    return [
        torch.arange(group * size, (group + 1) * size).clamp(max=count - 1)
        for group in range(groups)
    ]


def blend_window_rows(
    plan: WindowPlan,
    rows: Iterable[Tensor],  # P of [Q, C, h, w] fp32 | bf16 | fp16
    *,
    rows_held: int | None = None,
) -> Iterator[Tensor]:
    """Weighted mean of windows (paper Eq. 6) as bands of canvas rows, from top to bottom.

    Args:
        plan: The windows.
        rows: The outputs of each window row, in order.
        rows_held: Window rows that are gathered before their canvas rows are averaged; the result
            is the same for any number.

    Yields:
        [C, n, W] fp32; the bands follow one another without gap.
    """
    h, count = plan.window[0], len(plan.origins_x)
    held: list[Tensor] = []
    first, done = 0, 0  # first window row held; canvas rows handed on
    for index, row in enumerate(rows):
        held.append(row)
        every = rows_held or max(1, _HELD_BYTES // (row.numel() * row.element_size()))
        is_last = index + 1 == len(plan.origins_y)
        if (index + 1) % every and not is_last:
            continue
        final = plan.height if is_last else plan.origins_y[index + 1]
        if plan.wrap[0] and not is_last:
            final = 0  # the last window rows cover the first canvas rows
        if final == done:
            continue
        numbers = torch.arange(first * count, (index + 1) * count)
        yield scatter_mean(torch.cat(held), plan, numbers, rows=(done, final))
        done = final
        while held and plan.origins_y[first] + h <= done:
            held.pop(0)
            first += 1
