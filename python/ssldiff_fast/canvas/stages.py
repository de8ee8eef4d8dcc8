# SPDX-License-Identifier: Apache-2.0
"""One step of a run as a stream: rows of the canvas in, rows of the next canvas out.

Window rows are evaluated from top to bottom, and a canvas row is final once the last window row
that covers it is done. So a step needs the rows of a few windows only, can be written in place, and
the next step may follow one window height behind; the bytes do not depend on the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ssldiff_fast.canvas.window_rows import RowEvaluator, WindowRow
from ssldiff_fast.diffusion.solvers import AffineStep, apply_step, denoised
from ssldiff_fast.ops import CanvasStep, WindowPlan, scatter_mean


@dataclass(frozen=True)
class Rows:
    """Rows of a batch of canvases, from row `begin` on.

    Attributes:
        begin: the first row.
        canvas: [B, C, n, W] fp32.
        denoised: [B, C, n, W] fp32, the denoised canvas (x0) of the step that made them, where the
            next step or a callback reads it.
    """

    begin: int
    canvas: Tensor
    denoised: Tensor | None = None

    @property
    def end(self) -> int:
        """The row after the last."""
        return self.begin + self.canvas.shape[-2]


@dataclass(frozen=True)
class StepSettings:
    """What a stage does besides calling the network.

    Attributes:
        time: what the network is told.
        guidance_scale: 1 is no guidance.
        where: names the step in messages.
        step: the solver's step; None: the stage hands on the model output itself.
        seeds: of the fresh noise, one a canvas.
        number: of the step, from 0.
        noise: [B, C, H, W], in place of the seeds'.
        keeps_denoised: whether the denoised canvas is handed on too.
        background: [C, h, w] latent, repeated over the canvas, of what the mask leaves out.
        after_batch: called with the number of evaluations after every call of the network.
        of_denoised: (p, q) of x0 = p x + q output, which turns that latent into a model output.
    """

    time: float
    guidance_scale: float
    where: str
    step: AffineStep | None = None
    seeds: Sequence[int] = (0,)
    number: int = 0
    noise: Tensor | None = None
    keeps_denoised: bool = False
    background: Tensor | None = None
    of_denoised: tuple[float, float] | None = None
    after_batch: Callable[[int], None] | None = None


class Finite:
    """Whether all values are finite, asked now and answered later, with no wait in between."""

    def __init__(self, values: Tensor) -> None:
        answer = torch.isfinite(values).all()
        self._event: torch.cuda.Event | None = None
        if answer.device.type == "cuda":
            pinned = torch.empty((), dtype=torch.bool, pin_memory=True)
            answer = pinned.copy_(answer, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._answer = answer

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._answer)


class Stage(Protocol):
    """A step that takes rows and hands on rows."""

    def push(self, rows: Rows) -> None:
        """Takes the rows that follow those pushed before."""

    def advance(self) -> list[Rows]:
        """Evaluates the next window row and returns the rows that are final with it."""

    @property
    def need(self) -> int:
        """Rows of the canvas that must have been pushed for the next `advance`."""

    @property
    def pushed(self) -> int:
        """Rows pushed so far."""

    @property
    def finished(self) -> bool:
        """Whether all rows were handed on."""

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which `restore` goes on."""

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Goes on from a snapshot; a canvas that was pushed whole is pushed again after it."""


class WindowStage:
    """One step by windows.

    Args:
        plan: The windows.
        evaluator: Calls the network.
        settings: What the step does besides.
        in_place: The whole canvas is pushed at once and stays the caller's, who may write the
            rows that are handed on into it: the stage does not read them again.
    """

    def __init__(
        self,
        plan: WindowPlan,
        evaluator: RowEvaluator,
        settings: StepSettings,
        *,
        in_place: bool = True,
    ) -> None:
        self._in_place = in_place
        self.plan = plan
        self.settings = settings
        self._evaluator = evaluator
        self._row = 0  # the next window row
        self._done = self._head  # rows before it were handed on, but for those of the head
        self._held: deque[WindowRow] = deque()
        self._rows: Rows | None = None
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
        return 0 if self._rows is None else self._rows.end

    @property
    def need(self) -> int:
        if self.plan.wrap[0]:
            return self.plan.height
        return self.plan.origins_y[self._row] + self.plan.window[0]

    def push(self, rows: Rows) -> None:
        held = self._rows
        if held is None:
            self._rows = rows
            return
        previous = None
        if held.denoised is not None and rows.denoised is not None:
            previous = torch.cat((held.denoised, rows.denoised), dim=2)
        canvas = torch.cat((held.canvas, rows.canvas), dim=2)
        self._rows = Rows(held.begin, canvas, previous)

    def advance(self) -> list[Rows]:
        rows = self._given()
        outputs = self._evaluator.row(
            rows.canvas,
            self.plan,
            self._row,
            self.settings.time,
            first_row=rows.begin,
            guided=self.settings.guidance_scale != 1.0,
            where=self.settings.where,
            after_batch=self.settings.after_batch,
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

    def _given(self) -> Rows:
        if self._rows is None:
            raise RuntimeError("WindowStage: no rows were pushed before the stage was advanced.")
        return self._rows

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
        rows = self._given()
        if self._in_place:
            return
        gone = self._done - rows.begin
        before = None if rows.denoised is None else rows.denoised[:, :, gone:]
        self._rows = Rows(self._done, rows.canvas[:, :, gone:], before)

    def _covers(self, held: WindowRow, begin: int, end: int) -> bool:
        origin = self.plan.origins_y[held.row]
        last = origin + self.plan.window[0]
        wrapped = self.plan.wrap[0] and last - self.plan.height > begin
        return (origin < end and last > begin) or wrapped

    def _average(self, begin: int, end: int) -> Rows:
        """Rows `begin` to `end` of the next canvas (paper Eq. 6, guidance, the solver's step)."""
        held = [row for row in self._held if self._covers(row, begin, end)]
        rows, settings = self._given(), self.settings
        here = slice(begin - rows.begin, end - rows.begin)
        canvas = rows.canvas[:, :, here]
        previous = None if rows.denoised is None else rows.denoised[:, :, here]
        cond = torch.cat([row.cond for row in held], dim=1)
        uncond = None
        if settings.guidance_scale != 1.0:
            uncond = torch.cat([row.uncond for row in held if row.uncond is not None], dim=1)
        background = self._background(canvas, begin)
        bands = []
        # Without noise, which depends on the channel's number, canvases are so many channels more.
        together = settings.noise is not None or not (settings.step and settings.step.noise)
        for part in [slice(None)] if together else [slice(b, b + 1) for b in range(len(canvas))]:
            band = scatter_mean(
                _as_channels(cond[part]),
                self.plan,
                torch.cat([row.index for row in held]),
                rows=(begin, end),
                background=None if background is None else background[part].flatten(0, 1),
                uncond=None if uncond is None else _as_channels(uncond[part]),
                guidance_scale=settings.guidance_scale,
                step=self._step(canvas, previous, part),
            )
            bands.append(band if isinstance(band, tuple) else (band, None))
        shape = (-1, *canvas.shape[1:])
        following = torch.cat([band for band, _ in bands]).view(shape)
        kept = [band for _, band in bands if band is not None]
        if settings.step is not None and settings.noise is not None:
            following += settings.step.noise * settings.noise[:, :, begin:end]
        self._check(following, held)
        return Rows(begin, following, torch.cat(kept).view(shape) if kept else None)

    def _step(self, canvas: Tensor, previous: Tensor | None, part: slice) -> CanvasStep | None:
        step, settings = self.settings.step, self.settings
        if step is None:
            return None
        return CanvasStep(
            canvas[part].flatten(0, 1),
            x=step.x,
            output=step.output,
            noise=step.noise if settings.noise is None else 0.0,
            history=step.history,
            previous=None if not step.history or previous is None else previous[part].flatten(0, 1),
            denoised_x=step.denoised_x if settings.keeps_denoised else 0.0,
            denoised_output=step.denoised_output if settings.keeps_denoised else 0.0,
            seed=settings.seeds[part.start or 0],
            # Step 0 of the counter is the noise that runs start from.
            step=settings.number + 1,
        )

    def _background(self, canvas: Tensor, begin: int) -> Tensor | None:
        """The model output [B, C, n, W] that leads to the background latent."""
        latent, settings = self.settings.background, self.settings
        if latent is None or settings.of_denoised is None:
            return None
        y = torch.arange(begin, begin + canvas.shape[2]) % latent.shape[1]
        x = torch.arange(canvas.shape[3]) % latent.shape[2]
        tiled = latent.to(canvas)[:, y[:, None], x]
        p, q = settings.of_denoised
        return (tiled - p * canvas) / q

    def _check(self, band: Tensor, held: list[WindowRow]) -> None:
        """Raises RuntimeError where a band is not finite: of a GPU that of the row before, so that
        the next row is begun while this one is computed."""
        self._unchecked.append((Finite(band), band, held))
        waiting = 0 if self.finished or band.device.type != "cuda" else 1
        while len(self._unchecked) > waiting:
            finite, *what = self._unchecked.popleft()
            if not finite:
                self._refuse(*what)

    def _refuse(self, band: Tensor, held: list[WindowRow]) -> None:
        for row in held:
            for output in (row.cond, row.uncond):
                if output is None:
                    continue
                finite = torch.isfinite(output).flatten(2).all(2).all(0)
                if not bool(finite.all()):
                    window = int(row.index[int((~finite).nonzero()[0])])
                    raise _not_finite(self.settings.where, output.dtype, self.plan, window)
        raise _not_finite(self.settings.where, band.dtype)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        rows = self._rows
        if rows is not None and not self._in_place:
            tensors["canvas"] = rows.canvas
            if rows.denoised is not None:
                tensors["previous"] = rows.denoised
        for held in self._held:
            tensors[f"{held.row}.index"] = held.index
            tensors[f"{held.row}.cond"] = held.cond
            if held.uncond is not None:
                tensors[f"{held.row}.uncond"] = held.uncond
        numbers = {
            "row": self._row,
            "done": self._done,
            "begin": 0 if rows is None else rows.begin,
            "held": [held.row for held in self._held],
        }
        return tensors, numbers

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self._row, self._done = numbers["row"], numbers["done"]
        if "canvas" in tensors:
            self._rows = Rows(numbers["begin"], tensors["canvas"], tensors.get("previous"))
        self._held = deque(
            WindowRow(
                row,
                tensors[f"{row}.index"].cpu(),
                tensors[f"{row}.cond"],
                tensors.get(f"{row}.uncond"),
            )
            for row in numbers["held"]
        )


def _as_channels(windows: Tensor) -> Tensor:
    """[B, M, C, h, w] -> [M, B * C, h, w]: a view for one canvas."""
    return windows.transpose(0, 1).flatten(1, 2)


def _not_finite(
    where: str, dtype: torch.dtype, plan: WindowPlan | None = None, window: int = 0
) -> RuntimeError:
    place = ""
    if plan is not None:
        y, x = divmod(window, len(plan.origins_x))
        place = f", in the window with origin ({plan.origins_y[y]}, {plan.origins_x[x]})"
    return RuntimeError(
        f"CanvasDenoiser: the model output became NaN or infinite at {where}{place}, in "
        f"{str(dtype).removeprefix('torch.')}; use float32, or check the model's weights and the "
        "grid."
    )


class WholeStage:
    """One step by a denoiser of the whole canvas, whatever it is."""

    def __init__(self, denoiser: Any, settings: StepSettings, height: int) -> None:
        self._denoiser = denoiser
        self._settings = settings
        self._height = height
        self._rows: Rows | None = None
        self.finished = False

    @property
    def need(self) -> int:
        return self._height

    @property
    def pushed(self) -> int:
        return 0 if self._rows is None else self._rows.end

    def push(self, rows: Rows) -> None:
        self._rows = rows

    def advance(self) -> list[Rows]:
        step, settings, rows = self._settings.step, self._settings, self._rows
        if rows is None or step is None:
            raise RuntimeError("WholeStage: no canvas was pushed before the stage was advanced.")
        x = rows.canvas
        # Denoisers of one canvas are not asked to know of batches.
        single = len(x) == 1
        output = self._denoiser(x[0] if single else x, settings.time, step=settings.number)
        output = output[None] if single else output
        if output.shape != x.shape:
            raise RuntimeError(
                f"sample: the model output at {settings.where} has shape "
                f"{list(output.shape[single:])}, but the canvas is {list(x.shape[single:])}; the "
                "denoiser must keep the shape."
            )
        if not bool(torch.isfinite(output).all()):
            raise _not_finite(settings.where, output.dtype)
        following = apply_step(step, x, output, noise=settings.noise, history=rows.denoised)
        self.finished = True
        return [Rows(0, following, denoised(step, x, output) if settings.keeps_denoised else None)]

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"finished": self.finished}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self.finished = bool(numbers["finished"])
