# SPDX-License-Identifier: Apache-2.0
"""The sampling loop on the canvas, in the plain order: one step after another."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ssldiff_fast._checks import check_choice, check_shape
from ssldiff_fast.canvas.reuse import check_order
from ssldiff_fast.canvas.run import Run, Seeds, Settings, run_recipe
from ssldiff_fast.canvas.stages import Rows, Stage
from ssldiff_fast.canvas.start import NoiseRows, Start
from ssldiff_fast.canvas.state import Snapshot, StateFolder
from ssldiff_fast.canvas.wavefront import sample_rows
from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.slides.output import check_output, make_folder

StepCallback = Callable[[Any, int, float, dict[str, Tensor]], "dict[str, Tensor] | None"]
StatePath: TypeAlias = StateFolder | str | os.PathLike[str]

ORDERS = ("plain", "wavefront")
# Rows of the start that are drawn at once.
_START_ROWS = 256


class Denoiser(Protocol):
    """What the loop needs of a denoiser; `CanvasDenoiser` is one."""

    @property
    def prediction(self) -> str:
        """What it returns: "eps", "v" or "x0"."""
        ...

    def __call__(self, x: Tensor, t: float, *, step: int | None = None) -> Tensor:
        """[C, H, W] fp32 -> [C, H, W] fp32; [B, C, H, W] where it is sampled in batches."""
        ...


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor | NoiseRows,  # [C, H, W] or [B, C, H, W] fp32
    *,
    schedule: Schedule,
    solver: str = "ddim",
    steps: int = 50,
    spacing: str = "trailing",
    eta: float = 0.0,
    seed: Seeds = 0,
    order: str = "plain",
    reuse: int = 1,
    step_noise: Callable[[int], Tensor] | None = None,
    callback_on_step_end: StepCallback | None = None,
    state: StatePath | None = None,
    resume: bool | None = None,
    recipe: Mapping[str, Any] | None = None,
    scratch: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Tensor:
    """Denoise a canvas, or a batch of canvases.

    The bytes do not depend on the order, on an interruption, or on where the canvas lies. They do
    depend on what `CanvasDenoiser` names: the network and its dtype, device, libraries and
    micro-batch size.

    Args:
        denoiser: Callable (x, t, step=) -> model output; usually a `CanvasDenoiser`.
        noise: The canvas to start from, for example `canvas_noise(seed, C, H, W)`; or a function
            from rows (begin, end) to [C, n, W], which spares the memory of one canvas. One that is
            given whole is left as it was.
        schedule: The schedule that the model was trained with.
        solver: "ddim", "dpmpp_2m" or "authors".
        steps: Number of steps.
        spacing: "trailing" (starts in the noisiest step, so that what the network is told of the
            noise is what is there; needed with zero terminal SNR) or "leading".
        eta: Share of fresh noise in every step; 0 is deterministic.
        seed: Seed of that fresh noise, which is a function of seed, coordinate and step; for a
            batch one for all or one each.
        order: "plain" finishes each step before the next; "wavefront" lets every step follow one
            window height behind the one before (`sample_rows` hands on the rows as they come).
        reuse: The network's lower levels are evaluated in every so many steps, and what they made
            is used in the steps between; changes the result (docs/options.md). For a model on a
            CPU, windows that are the same in every step, and images whose maps fit into
            `reuse.MOST_BYTES`; plain order only. A state is then of a step that evaluates all.
        step_noise: Step (from 0) -> [C, H, W] noise, instead of the seed's; plain order only.
        callback_on_step_end: Called as (denoiser, step, t, {"latents": canvas, "denoised": x0})
            after every step, as in diffusers; a canvas returned under "latents" replaces ours.
            Plain order only.
        state: A folder that keeps the run: after a kill the same call goes on and ends in the same
            bytes. Ctrl-C then stops after the micro-batch under way. Writing takes under 1 % of
            the time.
        resume: True: there must be a state to go on from; False: start over; None: go on where
            there is one.
        recipe: JSON values that say what else decides the bytes, such as the model's weights; a
            state of another recipe is refused.
        scratch: A folder for the canvas as a memory-mapped file, for canvases larger than the
            memory; what is returned lies there.
        progress: Show a progress bar.

    Returns:
        The denoised canvas, of the shape and on the device of the noise, fp32.
    """
    call = "sample"
    check_choice("order", order, ORDERS, call=call)
    check_order(order, reuse, call=call)
    settings = Settings(
        schedule, solver, steps, spacing, eta, seed, state, resume, recipe or {}, progress, reuse
    )
    start = Start.of(noise, denoiser, call=call)
    if order == "wavefront":
        for name, given in (
            ("step_noise", step_noise),
            ("callback_on_step_end", callback_on_step_end),
        ):
            if given is not None:
                raise ValueError(
                    f"{call}: {name} needs the whole canvas of a step, which the wavefront order "
                    "never has; sample with order='plain'."
                )
        canvas = _allocate(start, "canvas", scratch)
        for rows in sample_rows(
            denoiser,  # type: ignore[arg-type]  # it says so itself
            noise,
            schedule=schedule,
            solver=solver,
            steps=steps,
            spacing=spacing,
            eta=eta,
            seed=seed,
            state=state,
            resume=resume,
            recipe=recipe,
            progress=progress,
        ):
            canvas[..., rows.begin : rows.end, :] = rows.canvas
        return canvas[0] if start.single else canvas
    run = Run(
        denoiser,
        settings,
        start.shape[0],
        call=call,
        step_noise=step_noise,
        keeps_denoised=callback_on_step_end is not None,
    )
    canvas = _PlainOrder(run, start, scratch, callback_on_step_end).finish()
    return canvas[0] if start.single else canvas


def _allocate(start: Start, name: str, scratch: str | os.PathLike[str] | None) -> Tensor:
    """A canvas in memory or in a memory-mapped file."""
    if scratch is None:
        return torch.empty(start.shape, device=start.device)
    if start.device.type != "cpu":
        raise ValueError(
            f"sample: scratch maps a file into memory, but the canvas is on {start.device}; leave "
            "it out, or keep the canvas on the CPU."
        )
    folder = make_folder(scratch)
    numbers = math.prod(start.shape)
    check_output(folder / f"{name}.f32", overwrite=True, needs=4 * numbers)
    mapped = torch.from_file(
        str(folder / f"{name}.f32"), shared=True, size=numbers, dtype=torch.float32
    )
    return mapped.view(start.shape)


class _PlainOrder:
    """One step after another, each written over the one before."""

    def __init__(
        self,
        run: Run,
        start: Start,
        scratch: str | os.PathLike[str] | None,
        callback: StepCallback | None,
    ) -> None:
        self._run = run
        self._start = start
        self._callback = callback
        self._canvas = _allocate(start, "canvas", scratch)
        self._denoised = _allocate(start, "denoised", scratch) if run.needs_history else None
        self._number = 0
        self._stage: Stage | None = None
        # Where steps reuse what others computed, and a state is kept: the canvas from which a run
        # can go on.
        self._kept: Snapshot | None = None

    def finish(self) -> Tensor:
        """All steps; the denoised canvas [B, C, H, W]."""
        run = self._run
        found = run.start(
            lambda: run_recipe(run, "plain", self._start.shape, self._start.identity())
        )
        finished = False
        try:
            if found is None:
                for y in range(0, self._start.shape[2], _START_ROWS):
                    end = min(y + _START_ROWS, self._start.shape[2])
                    self._canvas[:, :, y:end] = self._start.rows(y, end)
            else:
                self._restore(found)
            self._keep()
            with run.attentive():
                while self._number < len(run.steps):
                    self._step()
            finished = True
        finally:
            run.close(finished=finished)
        return self._canvas

    def _begin(self) -> Stage:
        stage = self._run.stage(self._number, self._canvas)
        stage.push(Rows(0, self._canvas, self._denoised))
        return stage

    def _step(self) -> None:
        stage = self._stage = self._stage or self._begin()
        while not stage.finished:
            for band in self._run.advance(stage, self._snapshot):
                here = slice(band.begin, band.end)
                self._canvas[:, :, here] = band.canvas
                if self._denoised is not None and band.denoised is not None:
                    self._denoised[:, :, here] = band.denoised
            if not stage.finished:
                self._run.checkpoint(self._snapshot)
        self._run.step_done(self._number)
        if self._callback is not None:
            self._call_back(self._callback)
        self._stage = None
        self._number += 1
        self._keep()
        if self._number < len(self._run.steps):
            self._run.checkpoint(self._snapshot)
        elif self._run.keeps_result:
            self._run.checkpoint(self._snapshot, at_once=True)

    def _keep(self) -> None:
        if not self._run.reuses or self._run.settings.state is None:
            return
        if self._number == len(self._run.steps):
            self._kept = None
        elif self._run.goes_on_from(self._number):
            now = self._snapshot_of_now()
            copies = {name: tensor.clone() for name, tensor in now.tensors.items()}
            self._kept = Snapshot(copies, now.numbers)

    def _snapshot(self) -> Snapshot:
        return self._kept or self._snapshot_of_now()

    def _snapshot_of_now(self) -> Snapshot:
        tensors, numbers = ({}, None) if self._stage is None else self._stage.snapshot()
        whole = {"canvas": self._canvas}
        if self._denoised is not None:
            whole["denoised"] = self._denoised
        return Snapshot(
            {**whole, **{f"stage/{name}": tensor for name, tensor in tensors.items()}},
            {"step": self._number, "stage": numbers, "evaluations": self._run.evaluations},
        )

    def _restore(self, found: Snapshot) -> None:
        self._canvas.copy_(found.tensors["canvas"])
        if self._denoised is not None:
            self._denoised.copy_(found.tensors["denoised"])
        self._number = found.numbers["step"]
        if found.numbers["stage"] is not None:
            self._stage = self._begin()
            own = {
                name.removeprefix("stage/"): tensor.to(self._canvas.device)
                for name, tensor in found.tensors.items()
                if name.startswith("stage/")
            }
            self._stage.restore(own, found.numbers["stage"])

    def _call_back(self, callback: StepCallback) -> None:
        step, canvas = self._run.steps[self._number], self._canvas
        shown = {"latents": canvas, "denoised": self._denoised}
        given = {
            name: tensor[0] if self._start.single else tensor
            for name, tensor in shown.items()
            if tensor is not None
        }
        answer = callback(self._run.denoiser, self._number, step.time, given)
        if not answer or "latents" not in answer:
            return
        latents = answer["latents"]
        check_shape("latents", latents, " ".join(map(str, given["latents"].shape)), call="callback")
        canvas.copy_(latents.expand_as(canvas))
