# SPDX-License-Identifier: Apache-2.0
"""One window row through the network: cut, conditioned, evaluated in canonical micro-batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssldiff_fast.canvas.bands import micro_batches
from ssldiff_fast.canvas.conditioning import Cond, join_conditioning
from ssldiff_fast.canvas.reuse import Evaluate
from ssldiff_fast.canvas.row_buffer import Bands
from ssldiff_fast.canvas.wide import Memory
from ssldiff_fast.ops import WindowPlan, gather_windows

if TYPE_CHECKING:
    from ssldiff_fast.canvas.denoiser import Field, WindowDenoiser
    from ssldiff_fast.canvas.mask import TissueMask

# Windows whose prepared conditioning is kept, where the plan is one for all steps.
_PREPARED_WINDOWS = 8192


@dataclass(frozen=True)
class WindowRow:
    """The model outputs of one window row, of every canvas of a batch.

    Attributes:
        row: its number.
        index: [M] int64 numbers of the windows that were evaluated.
        cond: [B, M, C, h, w] in the network's dtype.
        uncond: the same without conditioning, where there is guidance.
    """

    row: int
    index: Tensor
    cond: Tensor
    uncond: Tensor | None

    def of_columns(self, columns: range, count: int) -> slice:
        """Which of them lie in these columns of windows, of `count`."""
        begin = self.row * count
        bounds = torch.tensor([begin + columns.start, begin + columns.stop])
        return slice(*torch.searchsorted(self.index, bounds).tolist())


class RowEvaluator:
    """Evaluates window rows; the only place where the network is called.

    Args:
        denoiser: The network for windows.
        fields: One conditioning for all canvases of a batch, or one each.
        batch_size: Windows of one network call, at most.
        mask: Which windows are evaluated; all without it.
        keep_prepared: Whether the same plan comes again every step.
    """

    def __init__(
        self,
        denoiser: WindowDenoiser,
        fields: Sequence[Field],
        batch_size: int,
        mask: TissueMask | None,
        *,
        keep_prepared: bool,
    ) -> None:
        self.denoiser = denoiser
        self.fields = fields
        self.batch_size = batch_size
        self.mask = mask
        self._keep = keep_prepared
        self._prepared: OrderedDict[tuple[int, bool], tuple[int, Any]] = OrderedDict()

    def columns(self, plan: WindowPlan, row: int) -> Tensor:
        """[M] int64 columns of the windows of a row that are evaluated."""
        if self.mask is None:
            return torch.arange(len(plan.origins_x))
        return self.mask.columns(plan, row)

    def count(self, plan: WindowPlan) -> int:
        """Windows of a plan that are evaluated, of one canvas."""
        if self.mask is None:
            return len(plan)
        return sum(len(self.columns(plan, row)) for row in range(len(plan.origins_y)))

    def row(
        self,
        rows: Bands,  # of the canvas, [B, C, n, W] fp32
        plan: WindowPlan,
        row: int,
        time: float,
        *,
        guided: bool,
        where: str,
        after_batch: Callable[[int], None] | None = None,
        evaluate: Evaluate | None = None,
        wide: Memory | None = None,
    ) -> WindowRow:
        """The model outputs of window row `row`.

        `where` names the step in messages; `after_batch` is called with the number of evaluations
        (a guided pair is two) after every call of the network; `evaluate` is called in place of the
        denoiser; `wide` is where the outputs wait.
        """
        wide = wide or Memory()
        canvases, channels = rows.held[0].shape[:2]
        columns = self.columns(plan, row)
        index, pair = row * len(plan.origins_x) + columns, 2 if guided else 1
        count, of_row = canvases * len(columns), (canvases, len(columns))
        if not count:
            empty = rows.held[0].new_empty(*of_row, channels, *plan.window)
            return WindowRow(row, index, empty, empty if guided else None)
        state = self._state(plan, row, index, guided)
        # Micro-batches run over the row's windows of the first canvas, then of the second.
        batches = micro_batches(count, self.batch_size)
        of_batch = 4 * channels * plan.window[0] * plan.window[1] * len(batches[0])
        share = wide.share(len(batches), of_batch)
        whole: Tensor | None = None
        for first in range(0, len(batches), share):
            group = batches[first : first + share]
            begin, end = int(group[0][0]), int(group[-1][-1]) + 1
            crops = _crops(rows, plan, row, columns, begin, end)
            for members in group:
                x = _members(crops, members - begin)
                of_state = members % len(columns) if len(self.fields) == 1 else members
                here = int(members[0])
                if evaluate is None:
                    output = self.denoiser(x, time, state, of_state)
                else:
                    output = evaluate((row, here), x, time, state, of_state)
                _check_shape(output, (pair, *x.shape), where)
                there = min(here + len(members), count)
                if len(batches) == 1 and not wide.spills:
                    whole = output
                elif whole is None:
                    whole = wide.empty(pair, count, *output.shape[2:], like=output)
                if whole is not output:
                    whole[:, here:there] = output[:, : there - here]
                if after_batch is not None:
                    after_batch(pair * (there - here))
            assert whole is not None
            wide.release(whole)
        assert whole is not None  # for the type checker
        made = whole[:, :count].unflatten(1, of_row)
        return WindowRow(row, index, made[0], made[1] if guided else None)

    def _state(self, plan: WindowPlan, row: int, index: Tensor, guided: bool) -> Any:
        # Prepared row by row, whatever the order of work, so that it is rounded the same in each.
        key = (row, guided)
        if key in self._prepared:
            self._prepared.move_to_end(key)
            return self._prepared[key][1]
        origins = plan.origins_of(index)
        cond = join_conditioning([field.at(origins) for field in self.fields])
        uncond = _unconditional(self.fields[0], cond) if guided else None
        state = self.denoiser.prepare(cond, uncond)
        if self._keep:
            self._prepared[key] = (len(cond), state)
            while sum(count for count, _ in self._prepared.values()) > _PREPARED_WINDOWS:
                self._prepared.popitem(last=False)
        return state


def _unconditional(field: Field, cond: Cond) -> Cond:
    """What guidance goes away from: the field's `uncond`, or zeros like one window of `cond`."""
    # The null embedding is the zero vector (what the published models were trained with).
    return field.uncond if hasattr(field, "uncond") else torch.zeros_like(cond[:1])


def _crops(
    rows: Bands, plan: WindowPlan, row: int, columns: Tensor, begin: int, end: int
) -> Tensor:  # [end - begin, C, h, w]
    """Windows `begin` to `end` - 1 of a window row, counted through the canvases of a batch."""
    y, count, crops = plan.origins_y[row], len(columns), []
    for canvas in range(begin // count, (end - 1) // count + 1):
        own = columns[max(0, begin - canvas * count) : end - canvas * count]
        first, last = int(own[0]), int(own[-1]) + 1
        left, right = plan.origins_x[first], plan.origins_x[last - 1] + plan.window[1]
        block = rows.read(y, y + plan.window[0], range(left, right))
        part = plan.part(range(row, row + 1), range(first, last))
        crops.append(gather_windows(block[canvas], part, own - first))
    return crops[0] if len(crops) == 1 else torch.cat(crops)


def _members(crops: Tensor, members: Tensor) -> Tensor:
    """The windows of one micro-batch; a view where none is padding."""
    begin, size = int(members[0]), len(members)
    if begin + size <= len(crops):
        return crops[begin : begin + size]
    return crops[members.to(crops.device)]


def _check_shape(output: Tensor, expected: tuple[int, ...], where: str) -> None:
    if tuple(output.shape) != expected:
        raise RuntimeError(
            f"CanvasDenoiser: the model output at {where} has shape {list(output.shape)}, but "
            f"{list(expected)} was expected; the denoiser must return one output of the windows' "
            "shape for each of the guided pair."
        )
