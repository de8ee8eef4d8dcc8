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
        canvas: Tensor,  # [B, C, n, W] fp32, rows from `first_row` on
        plan: WindowPlan,
        row: int,
        time: float,
        *,
        first_row: int,
        guided: bool,
        where: str,
        after_batch: Callable[[int], None] | None = None,
    ) -> WindowRow:
        """The model outputs of window row `row`.

        `where` names the step in messages; `after_batch` is called with the number of evaluations
        (a guided pair is two) after every call of the network.
        """
        batch, channels = canvas.shape[:2]
        columns = self.columns(plan, row)
        index, pair = row * len(plan.origins_x) + columns, 2 if guided else 1
        shape = (batch * len(columns), channels, *plan.window)
        if not len(columns):
            empty = canvas.new_empty(batch, *shape)
            return WindowRow(row, index, empty, empty if guided else None)
        crops = gather_windows(canvas.flatten(0, 1), plan, index, first_row=first_row)
        # Micro-batches run over the row's windows of the first canvas, then of the second.
        crops = crops.unflatten(1, (batch, channels)).transpose(0, 1).reshape(shape)
        state = self._state(plan, row, index, guided)
        shared = len(self.fields) == 1
        outputs = []
        for members in micro_batches(len(crops), self.batch_size):
            x = _members(crops, members)
            of_state = members % len(columns) if shared else members
            output = self.denoiser(x, time, state, of_state)
            _check_shape(output, (pair, *x.shape), where)
            outputs.append(output)
            if after_batch is not None:
                padding = max(0, int(members[0]) + len(members) - len(crops))
                after_batch(pair * (len(members) - padding))
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        whole = whole[:, : shape[0]].unflatten(1, (batch, len(columns)))
        return WindowRow(row, index, whole[0], whole[1] if guided else None)

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
