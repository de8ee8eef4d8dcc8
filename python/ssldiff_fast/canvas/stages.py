# SPDX-License-Identifier: Apache-2.0
"""One step of a run as a stream: rows of the canvas in, rows of the next canvas out.

Window rows are evaluated from top to bottom, and a canvas row is final once the last window row
that covers it is done. So a step needs the rows of a few windows only, can be written in place, and
the next step may follow one window height behind; the bytes do not depend on the order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ssldiff_fast.canvas.reuse import Evaluate
from ssldiff_fast.diffusion.solvers import AffineStep, apply_step, denoised
from ssldiff_fast.ops import WindowPlan


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
        evaluate: called for each micro-batch in place of the denoiser.
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
    evaluate: Evaluate | None = None

    @property
    def counter(self) -> int:
        """The step of the noise's counter: 0 is the noise that runs start from."""
        return self.number + 1


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


def not_finite(
    where: str, dtype: torch.dtype, plan: WindowPlan | None = None, window: int = 0
) -> RuntimeError:
    """What a stage raises when the network overflowed."""
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
            raise not_finite(settings.where, output.dtype)
        following = apply_step(step, x, output, noise=settings.noise, history=rows.denoised)
        self.finished = True
        return [Rows(0, following, denoised(step, x, output) if settings.keeps_denoised else None)]

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"finished": self.finished}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        self.finished = bool(numbers["finished"])
