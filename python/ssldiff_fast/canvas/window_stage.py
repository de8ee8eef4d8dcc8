# SPDX-License-Identifier: Apache-2.0
"""One step of a run by windows, as a stream of rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast._checks import all_finite
from ssldiff_fast.canvas.bands import Piece, column_pieces
from ssldiff_fast.canvas.row_buffer import Bands
from ssldiff_fast.canvas.stages import Rows, StepSettings, not_finite
from ssldiff_fast.canvas.wide import Memory
from ssldiff_fast.canvas.window_rows import RowEvaluator, WindowRow
from ssldiff_fast.ops import CanvasStep, WindowPlan, philox_normal, scatter_mean


class Finite:
    """Whether all values are finite, asked now and answered later, with no wait in between."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._answer: bool | Tensor
        if values.device.type != "cuda":
            self._answer = all_finite(values)
        else:
            answer = torch.isfinite(values).all()
            pinned = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._answer = pinned.copy_(answer, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._answer)


class WindowStage:
    """One step by windows.

    Args:
        plan: The windows.
        evaluator: Calls the network.
        settings: What the step does besides.
        in_place: The whole canvas is pushed at once and stays the caller's, who may write the
            rows that are handed on into it: the stage does not read them again.
        wide: Where rows and model outputs wait.
    """

    def __init__(
        self,
        plan: WindowPlan,
        evaluator: RowEvaluator,
        settings: StepSettings,
        *,
        in_place: bool = True,
        wide: Memory | None = None,
    ) -> None:
        self._wide = wide or Memory()
        self._in_place = in_place
        self.plan = plan
        self.settings = settings
        self._evaluator = evaluator
        self._row = 0  # the next window row
        self._done = self._head  # rows before it were handed on, but for those of the head
        self._held: deque[WindowRow] = deque()
        self._canvas, self._previous = Bands(wide=self._wide), Bands(wide=self._wide)
        self._unchecked: deque[tuple[Finite, Tensor, list[WindowRow]]] = deque()

    @property
    def _head(self) -> int:
        """Rows at the top that windows at the bottom cover too, round the end: final at last."""
        if not self.plan.wrap[0]:
            return 0
        return max(0, self.plan.origins_y[-1] + self.plan.window[0] - self.plan.height)

    @property
    def finished(self) -> bool:
        return self._row == len(self.plan.origins_y)

    @property
    def pushed(self) -> int:
        return self._canvas.end

    @property
    def need(self) -> int:
        if self.plan.wrap[0]:
            return self.plan.height
        return self.plan.origins_y[self._row] + self.plan.window[0]

    def push(self, rows: Rows) -> None:
        self._canvas.push(rows.canvas)
        if rows.denoised is not None:
            self._previous.push(rows.denoised)

    def advance(self) -> list[Rows]:
        outputs = self._evaluator.row(
            self._canvas,
            self.plan,
            self._row,
            self.settings.time,
            guided=self.settings.guidance_scale != 1.0,
            where=self.settings.where,
            after_batch=self.settings.after_batch,
            evaluate=self.settings.evaluate,
            wide=self._wide,
        )
        self._held.append(outputs)
        self._row += 1
        last = self.finished
        final = self.plan.height if last else self.plan.origins_y[self._row]
        spans = [(self._done, final)] + ([(0, self._head)] if last else [])
        bands = [self._average(begin, end) for begin, end in spans if begin < end]
        self._done = max(self._done, final)
        self._forget()
        return bands

    def _forget(self) -> None:
        """Drops window rows, and canvas rows of its own, that no later row needs."""
        head, h = self._head, self.plan.window[0]
        keep = [
            held
            for held in self._held
            if self.plan.origins_y[held.row] + h > self._done
            or self.plan.origins_y[held.row] < head
        ]
        self._held = deque(() if self.finished else keep)
        if not self._in_place:
            self._canvas.forget(self._done)
            self._previous.forget(self._done)

    def _covers(self, held: WindowRow, begin: int, end: int) -> bool:
        origin = self.plan.origins_y[held.row]
        last = origin + self.plan.window[0]
        wrapped = self.plan.wrap[0] and last - self.plan.height > begin
        return (origin < end and last > begin) or wrapped

    def _average(self, begin: int, end: int) -> Rows:
        """Rows `begin` to `end` of the next canvas (paper Eq. 6, guidance, the solver's step)."""
        held = [row for row in self._held if self._covers(row, begin, end)]
        of_window = sum(row.cond[:, :1].nbytes for row in held)
        share = self._wide.share(len(self.plan.origins_x), of_window)
        pieces = column_pieces(self.plan, share)
        if pieces[0].whole:
            return Rows(begin, *self._piece(begin, end, held, pieces[0], None))
        noise = self._fresh_noise(begin, end)
        whole: list[Tensor] = []
        for piece in pieces:
            made = self._piece(begin, end, held, piece, noise)
            for number, part in enumerate(part for part in made if part is not None):
                if len(whole) == number:
                    shape = (*part.shape[:3], self.plan.width)
                    whole.append(self._wide.empty(*shape, like=part))
                here = slice(piece.columns.start, piece.columns.stop)
                whole[number][..., here] = part[..., piece.inside]
            self._wide.release(*whole)
        return Rows(begin, *whole)

    def _fresh_noise(self, begin: int, end: int) -> Tensor | None:
        """That of whole rows, [B, C, n, W], where the step draws some: its coordinates are the
        canvas's, which a piece of it does not know."""
        step, settings, like = self.settings.step, self.settings, self._canvas.held[0]
        if step is None or not step.noise:
            return None
        drawn = [
            philox_normal(seed, like.shape[1], (begin, end), like.shape[3], step=settings.counter)
            for seed in settings.seeds
        ]
        return torch.stack(drawn).to(like.device)

    def _piece(
        self,
        begin: int,
        end: int,
        held: list[WindowRow],
        piece: Piece,
        noise: Tensor | None,  # [B, C, n, W]; None: it is drawn on the way
    ) -> tuple[Tensor, Tensor | None]:
        """The columns that a piece's windows cover: the next canvas, and the denoised one."""
        settings, covered = self.settings, piece.covered(self.plan)
        plan, rows, index, windows = self._windows_of(begin, end, held, piece)
        canvas, previous = self._canvas.read(begin, end, covered), None
        if settings.step is not None and settings.step.history:
            previous = self._previous.read(begin, end, covered)
        outputs = [_joined([row.cond for row in held], windows)]
        if settings.guidance_scale != 1.0:
            outputs.append(_joined([row.uncond for row in held if row.uncond is not None], windows))
        self._wide.release(*(row.cond for row in held))
        background = self._background(canvas, begin, piece.left)
        if noise is None and settings.noise is not None:
            noise = settings.noise[:, :, begin:end]
        bands = []
        # Without noise, which depends on the channel's number, canvases are so many channels more.
        together = noise is not None or not (settings.step and settings.step.noise)
        for part in [slice(None)] if together else [slice(b, b + 1) for b in range(len(canvas))]:
            cond, *uncond = (_as_channels(output[part]) for output in outputs)
            band = scatter_mean(
                cond,
                plan,
                index,
                rows=rows,
                background=None if background is None else background[part].flatten(0, 1),
                uncond=uncond[0] if uncond else None,
                guidance_scale=settings.guidance_scale,
                step=self._step(canvas, previous, part, draws=noise is None),
            )
            bands.append(band if isinstance(band, tuple) else (band, None))
        following = torch.cat([band for band, _ in bands]).view(-1, *canvas.shape[1:])
        kept = [band for _, band in bands if band is not None]
        if settings.step is not None and noise is not None:
            following += settings.step.noise * noise[..., covered.start : covered.stop]
        self._check(following[..., piece.inside], held)
        return following, torch.cat(kept).view(following.shape) if kept else None

    def _windows_of(
        self, begin: int, end: int, held: list[WindowRow], piece: Piece
    ) -> tuple[WindowPlan, tuple[int, int], Tensor, list[slice]]:
        """A piece's windows as a plan of their own: it, the rows `begin` to `end` - 1 in it, the
        numbers of those that were evaluated, and which of each window row these are."""
        if piece.whole:
            index = torch.cat([row.index for row in held])
            return self.plan, (begin, end), index, [slice(None)] * len(held)
        count, first = len(self.plan.origins_x), held[0].row
        windows = [row.of_columns(piece.windows, count) for row in held]
        index = torch.cat(
            [
                row.index[own] % count - piece.windows.start + number * len(piece.windows)
                for number, (row, own) in enumerate(zip(held, windows))
            ]
        )
        plan = self.plan.part(range(first, first + len(held)), piece.windows)
        top = self.plan.origins_y[first]
        return plan, (begin - top, end - top), index, windows

    def _step(
        self, canvas: Tensor, previous: Tensor | None, part: slice, *, draws: bool
    ) -> CanvasStep | None:
        step, settings = self.settings.step, self.settings
        if step is None:
            return None
        return CanvasStep(
            canvas[part].flatten(0, 1),
            x=step.x,
            output=step.output,
            noise=step.noise if draws else 0.0,
            history=step.history,
            previous=None if previous is None else previous[part].flatten(0, 1),
            denoised_x=step.denoised_x if settings.keeps_denoised else 0.0,
            denoised_output=step.denoised_output if settings.keeps_denoised else 0.0,
            seed=settings.seeds[part.start or 0],
            step=settings.counter,
        )

    def _background(self, canvas: Tensor, top: int, left: int) -> Tensor | None:
        """The model output [B, C, n, w] that leads to the background latent."""
        latent, settings = self.settings.background, self.settings
        if latent is None or settings.of_denoised is None:
            return None
        y = torch.arange(top, top + canvas.shape[2]) % latent.shape[1]
        x = torch.arange(left, left + canvas.shape[3]) % latent.shape[2]
        tiled = latent.to(canvas)[:, y[:, None], x]
        p, q = settings.of_denoised
        return (tiled - p * canvas) / q

    def _check(self, band: Tensor, held: list[WindowRow]) -> None:
        """Raises RuntimeError where a band is not finite: of a GPU that of the row before, so that
        the next row is begun while this one is computed."""
        self._unchecked.append((Finite(band), band, held))
        waiting = 0 if self.finished or band.device.type != "cuda" else 1
        while len(self._unchecked) > waiting:
            finite, checked, rows = self._unchecked.popleft()
            if not finite:
                self._refuse(checked, rows)

    def _refuse(self, band: Tensor, held: list[WindowRow]) -> None:
        for row in held:
            for output in (row.cond, row.uncond):
                if output is None:
                    continue
                finite = torch.isfinite(output).flatten(2).all(2).all(0)
                if not bool(finite.all()):
                    window = int(row.index[int((~finite).nonzero()[0])])
                    raise not_finite(self.settings.where, output.dtype, self.plan, window)
        raise not_finite(self.settings.where, band.dtype)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        bands = 0 if self._in_place else len(self._canvas.held)
        if bands:
            for name, rows in (("canvas", self._canvas), ("previous", self._previous)):
                tensors.update({f"{name}.{n}": band for n, band in enumerate(rows.held)})
        for held in self._held:
            tensors[f"{held.row}.index"] = held.index
            tensors[f"{held.row}.cond"] = held.cond
            if held.uncond is not None:
                tensors[f"{held.row}.uncond"] = held.uncond
        numbers = {
            "row": self._row,
            "done": self._done,
            "begin": self._canvas.begin,
            "bands": bands,
            "held": [held.row for held in self._held],
        }
        return tensors, numbers

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self._row, self._done = numbers["row"], numbers["done"]
        if numbers["bands"]:
            self._canvas = Bands(numbers["begin"], self._wide)
            self._previous = Bands(numbers["begin"], self._wide)
            for n in range(numbers["bands"]):
                self.push(Rows(0, tensors[f"canvas.{n}"], tensors.get(f"previous.{n}")))
        self._held = deque(
            WindowRow(
                row,
                tensors[f"{row}.index"].cpu(),
                tensors[f"{row}.cond"],
                tensors.get(f"{row}.uncond"),
            )
            for row in numbers["held"]
        )


def _joined(rows: list[Tensor], windows: list[slice]) -> Tensor:
    """Some windows of each row: [B, M, C, h, w]."""
    parts = [row[:, own] for row, own in zip(rows, windows, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _as_channels(windows: Tensor) -> Tensor:
    """[B, M, C, h, w] -> [M, B * C, h, w]: a view for one canvas."""
    return windows.transpose(0, 1).flatten(1, 2)
