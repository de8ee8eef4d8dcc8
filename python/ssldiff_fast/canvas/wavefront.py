# SPDX-License-Identifier: Apache-2.0
"""The wavefront order: every step follows one window height behind the one before.

An image of any height needs the memory of `steps x window height` rows, its first rows are
finished long before its last are begun, and the bytes are those of the plain order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast.canvas.denoiser import CanvasDenoiser
from ssldiff_fast.canvas.run import Run, Seeds, Settings, run_recipe
from ssldiff_fast.canvas.stages import Rows
from ssldiff_fast.canvas.start import NoiseRows, Start
from ssldiff_fast.canvas.state import Snapshot, StateFolder
from ssldiff_fast.canvas.wide import Memory, Where, wide_rows
from ssldiff_fast.diffusion.schedule import Schedule


def sample_rows(
    denoiser: CanvasDenoiser,
    noise: Tensor | NoiseRows,  # [C, H, W] or [B, C, H, W] fp32
    *,
    schedule: Schedule,
    solver: str = "ddim",
    steps: int = 50,
    spacing: str = "trailing",
    eta: float = 0.0,
    seed: Seeds = 0,
    state: StateFolder | str | os.PathLike[str] | None = None,
    resume: bool | None = None,
    recipe: Mapping[str, Any] | None = None,
    durable: Callable[[], int] | None = None,
    scratch: Where = None,
    progress: bool = False,
) -> Generator[Rows]:
    """Denoise a canvas in the wavefront order and hand on its rows as they become final.

    Args:
        denoiser: The canvas; its windows must not wrap along y.
        noise: As for `sample`. A function from rows (begin, end) keeps the memory bounded, for
            example `lambda y0, y1: philox_normal(seed, C, (y0, y1), W)`.
        schedule, solver, steps, spacing, eta, seed, state, resume, recipe, progress: As for
            `sample`; the bytes are the same.
        durable: With `state`: how many rows, from the top, the consumer has made durable. Rows
            from there on are kept in the state, and handed on again when the run goes on. Without
            it all rows are kept there, so that a state grows with the image.
        scratch: A folder for rows that wait, for canvases so wide that `steps x window height` rows
            of them are much memory: a file without a name there, of which pieces are in memory.
            What is handed on lies there too. On a GPU rows stay where they are.

    Returns:
        A generator of `Rows`, from top to bottom without gap; of one canvas without a batch axis
        `Rows.canvas` is [C, n, W]. A run that goes on starts from the row that `durable` had named;
        one that is closed early saves its state first.
    """
    call = "sample_rows"
    if not isinstance(denoiser, CanvasDenoiser):
        raise TypeError(
            f"{call}: denoiser is a {type(denoiser).__name__}, but the wavefront order needs to "
            "know its windows; pass a CanvasDenoiser, or sample with order='plain'."
        )
    settings = Settings(
        schedule, solver, steps, spacing, eta, seed, state, resume, recipe or {}, progress
    )
    start = Start.of(noise, denoiser, call=call)
    run = Run(denoiser, settings, start.shape[0], call=call)
    for number in range(len(run.steps)):
        if denoiser.plan(number).wrap[0]:
            raise ValueError(
                f"{call}: the windows wrap along y, where the first rows are final only with the "
                "last; wrap along x alone, or sample with order='plain'."
            )
    return Wavefront(run, start, durable, wide_rows(scratch)).rows()


class Wavefront:
    """All steps of a run at once, each a window height behind the one before."""

    def __init__(
        self, run: Run, start: Start, durable: Callable[[], int] | None, wide: Memory
    ) -> None:
        self._run = run
        self._start = start
        self._durable = durable or (lambda: 0)
        self._keeps = run.settings.state is not None
        like = start.like
        self._wide = wide if like.device.type == "cpu" else Memory()
        self._stages = [
            run.stage(n, like, in_place=False, wide=self._wide) for n in range(len(run.steps))
        ]
        self._handed: list[Rows] = []  # and not durable yet

    @torch.no_grad()
    def rows(self) -> Generator[Rows]:
        """The final rows, from top to bottom."""
        start = self._start
        found = self._run.start(
            lambda: run_recipe(self._run, "wavefront", start.shape, start.identity()), self._wide
        )
        finished = False
        try:
            if found is not None:
                self._restore(found)
            yield from map(self._outside, list(self._handed))
            while not self._stages[-1].finished:
                # Between rows Ctrl-C is the consumer's.
                with self._run.attentive():
                    final = self._next()
                for rows in final:
                    if self._keeps:
                        self._handed.append(rows)
                    yield self._outside(rows)
                with self._run.attentive():
                    self._run.checkpoint(self._snapshot)
            finished = True
            if self._run.keeps_result:
                self._run.checkpoint(self._snapshot, at_once=True)
        except GeneratorExit:
            self._run.checkpoint(self._snapshot, at_once=True)
            raise
        finally:
            self._run.close(finished=finished)

    def _outside(self, rows: Rows) -> Rows:
        return Rows(rows.begin, rows.canvas[0] if self._start.single else rows.canvas)

    def _next(self) -> list[Rows]:
        """Advances the last step that can be, which keeps the fewest rows; its final rows."""
        for number, stage in reversed(list(enumerate(self._stages))):
            if stage.finished or stage.need > stage.pushed:
                continue
            bands = self._run.advance(stage, self._snapshot)
            if stage.finished:
                self._run.step_done(number)
            if stage is self._stages[-1]:
                return bands
            for band in bands:
                self._stages[number + 1].push(band)
            return []
        first = self._stages[0]
        first.push(Rows(first.pushed, self._drawn(first.pushed, first.need)))
        return []

    def _drawn(self, begin: int, end: int) -> Tensor:
        """Rows of the start."""
        batch, channels, _, width = self._start.shape
        share = self._wide.share(end - begin, 4 * batch * channels * width)
        if share == end - begin:
            return self._start.rows(begin, end)
        whole = self._wide.empty(batch, channels, end - begin, width, like=self._start.like)
        for y in range(begin, end, share):
            part = self._start.rows(y, min(y + share, end))
            whole[:, :, y - begin : y - begin + share] = part
        self._wide.release(whole)
        return whole

    def _snapshot(self) -> Snapshot:
        durable = self._durable()
        self._handed = [rows for rows in self._handed if rows.end > durable]
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {"evaluations": self._run.evaluations, "stages": []}
        for number, stage in enumerate(self._stages):
            of_stage, where = stage.snapshot()
            tensors.update({f"{number}/{name}": tensor for name, tensor in of_stage.items()})
            numbers["stages"].append(where)
        numbers["begin"] = None
        if self._handed:
            numbers["begin"] = self._handed[0].begin
            tensors.update({f"handed.{n}": rows.canvas for n, rows in enumerate(self._handed)})
        return Snapshot(tensors, numbers, self._wide)

    def _restore(self, found: Snapshot) -> None:
        device = self._start.device
        tensors = {name: tensor.to(device) for name, tensor in found.tensors.items()}
        for number, (stage, where) in enumerate(zip(self._stages, found.numbers["stages"])):
            prefix = f"{number}/"
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            stage.restore(own, where)
        if found.numbers["begin"] is not None:
            begin, self._handed = found.numbers["begin"], []
            while f"handed.{len(self._handed)}" in tensors:
                self._handed.append(Rows(begin, tensors[f"handed.{len(self._handed)}"]))
                begin = self._handed[-1].end
