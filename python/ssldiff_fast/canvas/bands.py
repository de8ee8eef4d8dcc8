# SPDX-License-Identifier: Apache-2.0
"""Window rows in, finished canvas rows out: what denoising and decoding have in common.

Windows are evaluated one window row after another, in canonical micro-batches, and a canvas row is
final once the last window row that covers it is done. So only a few window rows are ever held, and
the bytes do not depend on how many.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssldiff_fast._checks import check_positive
from ssldiff_fast.canvas.wide import Memory
from ssldiff_fast.ops import WindowPlan, scatter_mean


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


def even_parts(columns: Sequence[int], most: int) -> list[Sequence[int]]:
    """Columns in as few parts of up to `most` as there can be, whose sizes differ by one at most.

    Unlike micro-batches they are not padded: an autoencoder's launches are kept for no shape.
    """
    count = len(columns)
    parts = -(-count // most)
    ends = [number * count // parts for number in range(parts + 1)] if parts else []
    return [columns[begin:end] for begin, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Piece:
    """Some columns of the canvas, and the windows that cover them.

    Attributes:
        columns: of the canvas.
        windows: columns of windows.
        left: the canvas's column that `windows` begin with.
        whole: these are all columns and windows.
    """

    columns: range
    windows: range
    left: int
    whole: bool

    def covered(self, plan: WindowPlan) -> range:
        """The columns that the windows cover."""
        last = plan.width if self.whole else plan.origins_x[self.windows[-1]] + plan.window[1]
        return range(self.left, last)

    @property
    def inside(self) -> slice:
        """The columns among those that the windows cover."""
        return slice(self.columns.start - self.left, self.columns.stop - self.left)


def column_pieces(plan: WindowPlan, share: int) -> list[Piece]:
    """The canvas in pieces of `share` columns of windows, from left to right.

    A canvas that wraps along x is one piece.
    """
    count = len(plan.origins_x)
    if plan.wrap[1] or share >= count:
        return [Piece(range(plan.width), range(count), 0, True)]
    pieces = []
    for first in range(0, count, share):
        last = min(first + share, count)
        begin = plan.origins_x[first] if first else 0
        end = plan.width if last == count else plan.origins_x[last]
        lead = bisect.bisect_right(plan.origins_x, begin - plan.window[1])
        pieces.append(Piece(range(begin, end), range(lead, last), plan.origins_x[lead], False))
    return pieces


class RowBlend:
    """Weighted mean of windows (paper Eq. 6), a window row after another, from top to bottom.

    Args:
        plan: The windows.
        wide: Where the rows were made, of which pieces are in memory at once.
    """

    def __init__(self, plan: WindowPlan, wide: Memory | None = None) -> None:
        self._plan = plan
        self._wide = wide or Memory()
        self._held: deque[tuple[int, Tensor]] = deque()
        self._rows = self._done = 0  # window rows taken; canvas rows that are final

    def push(
        self,
        row: Tensor,  # [Q, C, h, w] fp32 | bf16 | fp16
    ) -> range:
        """Takes the next window row; the canvas rows that are final with it, perhaps none."""
        plan, held = self._plan, self._held
        while held and plan.origins_y[held[0][0]] + plan.window[0] <= self._done:
            held.popleft()
        held.append((self._rows, row))
        self._rows += 1
        is_last = self._rows == len(plan.origins_y)
        end = plan.height if is_last else plan.origins_y[self._rows]
        if plan.wrap[0] and not is_last:
            end = 0  # the last window rows cover the first canvas rows
        begin, self._done = self._done, max(self._done, end)
        return range(begin, self._done)

    def pieces(self, rows: range) -> Iterator[tuple[int, Tensor]]:
        """Canvas rows that `push` named: first column and [C, n, w] fp32, from left to right."""
        of_window = sum(row[0].nbytes for _, row in self._held)
        share = self._wide.share(len(self._plan.origins_x), of_window)
        for piece in column_pieces(self._plan, share):
            yield piece.columns.start, self._piece(rows, piece)

    def _piece(self, rows: range, piece: Piece) -> Tensor:
        plan, (first, _), numbers = self._plan, self._held[0], piece.windows
        windows = torch.cat([row[numbers.start : numbers.stop] for _, row in self._held])
        self._wide.release(*(row for _, row in self._held))
        if piece.whole:
            index = torch.arange(len(windows)) + first * len(numbers)
            return scatter_mean(windows, plan, index, rows=(rows.start, rows.stop))
        part = plan.part(range(first, first + len(self._held)), numbers)
        top = plan.origins_y[first]
        mean = scatter_mean(windows, part, rows=(rows.start - top, rows.stop - top))
        return mean[:, :, piece.inside]


def blend_window_rows(
    plan: WindowPlan,
    rows: Iterable[Tensor],  # P of [Q, C, h, w] fp32 | bf16 | fp16
) -> Iterator[Tensor]:
    """Weighted mean of windows (paper Eq. 6) as bands of canvas rows, from top to bottom.

    Args:
        plan: The windows.
        rows: The outputs of each window row, in order.

    Yields:
        [C, n, W] fp32; the bands follow one another without gap.
    """
    blend = RowBlend(plan)
    for row in rows:
        final = blend.push(row)
        if final:
            yield torch.cat([piece for _, piece in blend.pieces(final)], dim=2)
