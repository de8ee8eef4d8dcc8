# SPDX-License-Identifier: Apache-2.0
"""What both orders of a run share: its steps, its recipe, its state, progress and Ctrl-C."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from ssldiff_fast._checks import check_count, check_number
from ssldiff_fast.canvas.denoiser import CanvasDenoiser
from ssldiff_fast.canvas.interrupt import Interrupted, StopRequest
from ssldiff_fast.canvas.noise import canvas_noise, check_seed
from ssldiff_fast.canvas.reuse import DeepMaps, Evaluate, begins, deep_maps
from ssldiff_fast.canvas.stages import Rows, Stage, StepSettings, WholeStage
from ssldiff_fast.canvas.state import Snapshot, StateFolder, going_on
from ssldiff_fast.canvas.wide import Memory
from ssldiff_fast.canvas.window_stage import WindowStage
from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.diffusion.solvers import AffineStep, get_solver

logger = logging.getLogger(__name__)

Seeds: TypeAlias = int | Sequence[int]
# Windows of which the field's embeddings take part in the recipe.
_FIELD_WINDOWS = 1024


@dataclass(frozen=True)
class Settings:
    """How a canvas is denoised, and how the run is kept and shown.

    Attributes:
        schedule: the schedule that the model was trained with.
        solver: "ddim", "dpmpp_2m" or "authors".
        steps: number of steps.
        spacing: of the timesteps, "trailing" or "leading" (`Schedule.timesteps`).
        eta: share of fresh noise in every step; 0 is deterministic.
        seed: of that fresh noise, which is a function of seed, coordinate and step; one for each
            canvas of a batch.
        state: a folder (or a `StateFolder`) from which a run that was killed goes on.
        resume: True: there must be a state; False: start over; None: go on where there is one.
        recipe: JSON values that say what else decides the bytes, such as the model's weights; a
            state of another recipe is refused.
        progress: show a progress bar.
        reuse: the network's lower levels are evaluated in every so many steps; 1: in all.
    """

    schedule: Schedule
    solver: str = "ddim"
    steps: int = 50
    spacing: str = "trailing"
    eta: float = 0.0
    seed: Seeds = 0
    state: StateFolder | str | os.PathLike[str] | None = None
    resume: bool | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False
    reuse: int = 1

    def plan(self, prediction: str, call: str) -> list[AffineStep]:
        """The solver's steps, and the settings checked."""
        if not check_number("eta", self.eta, call=call) >= 0.0:
            raise ValueError(f"{call}: eta is {self.eta}, but it must be 0 or above.")
        timesteps = self.schedule.timesteps(self.steps, self.spacing)
        solver = get_solver(self.solver)
        return solver(self.schedule, timesteps, prediction=prediction, eta=self.eta)


class Run:
    """One run: makes its stages, advances them, keeps its state."""

    def __init__(
        self,
        denoiser: Any,
        settings: Settings,
        batch: int,
        *,
        call: str,
        step_noise: Callable[[int], Tensor] | None = None,
        keeps_denoised: bool = False,
    ) -> None:
        self.denoiser = denoiser
        self.settings = settings
        self.steps = settings.plan(denoiser.prediction, call)
        self.seeds = _seeds(settings.seed, batch, call)
        self.batch = batch
        self.step_noise = step_noise
        self.saved = 0
        self._begins, self._deep = self._reusing(call)
        self._keeps_denoised = keeps_denoised
        self._stop = StopRequest()
        self._bar: tqdm[Any] | None = None
        self._state: StateFolder | None = None
        self._owns_state = not isinstance(settings.state, StateFolder)
        self._done = 0  # network evaluations

    def _reusing(self, call: str) -> tuple[list[bool], DeepMaps | None]:
        """Which steps evaluate the whole network, and what the others reuse."""
        reuse = check_count("reuse", self.settings.reuse, call=call)
        if reuse == 1:
            return [True] * len(self.steps), None
        if not isinstance(self.denoiser, CanvasDenoiser):
            raise ValueError(
                f"{call}: reuse is {reuse}, but the denoiser is a {type(self.denoiser).__name__}, "
                "which has no windows; pass a CanvasDenoiser, or leave it out."
            )
        maps = deep_maps(self.denoiser, reuse, self.batch, call=call)
        return begins(self.denoiser, [step.time for step in self.steps], reuse), maps

    def goes_on_from(self, number: int) -> bool:
        """Whether a run can go on from the beginning of a step: none is before it whose maps the
        step reuses."""
        return self._begins[number]

    @property
    def reuses(self) -> bool:
        """Whether steps reuse what others computed."""
        return self._deep is not None

    @property
    def needs_history(self) -> bool:
        """Whether denoised canvases are kept at all."""
        return self._keeps_denoised or any(step.history for step in self.steps)

    def stage(
        self, number: int, like: Tensor, *, in_place: bool = True, wide: Memory | None = None
    ) -> Stage:
        """The stage of a step; `like` is a canvas [B, C, H, W], or rows of one."""
        step = self.steps[number]
        following = self.steps[number + 1] if number + 1 < len(self.steps) else None
        settings = StepSettings(
            time=step.time,
            guidance_scale=1.0,
            where=f"step {number}",
            step=step,
            seeds=self.seeds,
            number=number,
            noise=self._given_noise(number, like),
            keeps_denoised=self._keeps_denoised or bool(following and following.history),
        )
        if not isinstance(self.denoiser, CanvasDenoiser):
            return WholeStage(self.denoiser, settings, like.shape[2])
        settings = replace(
            settings,
            guidance_scale=self.denoiser.scale_at(step.time),
            background=self.denoiser.background,
            of_denoised=(step.denoised_x, step.denoised_output),
            after_batch=self._evaluated,
            evaluate=self._evaluate(number),
        )
        plan = self.denoiser.plan(number)
        return WindowStage(plan, self.denoiser.evaluator, settings, in_place=in_place, wide=wide)

    def _evaluate(self, number: int) -> Evaluate | None:
        if self._deep is None:
            return None
        return self._deep.renew if self._begins[number] else self._deep.reuse

    def _given_noise(self, number: int, like: Tensor) -> Tensor | None:
        """Noise that the stage does not draw itself."""
        if not self.steps[number].noise:
            return None
        if self.step_noise is not None:
            return self.step_noise(number).to(like).expand_as(like)
        if isinstance(self.denoiser, CanvasDenoiser):
            return None
        drawn = [
            # Step 0 of the counter is the noise that runs start from.
            canvas_noise(seed, *like.shape[1:], step=number + 1, device=like.device)
            for seed in self.seeds
        ]
        return torch.stack(drawn)

    def advance(self, stage: Stage, save: Callable[[], Snapshot]) -> list[Rows]:
        """The stage's next rows; where a stop was requested, the state is written first."""
        if self._state is None:
            return stage.advance()
        before = self._done
        try:
            self._stop.check()
            return stage.advance()
        except Interrupted:
            self._done = before  # the row under way is done again
            self._state.write(save())
            raise Interrupted(going_on(self._state)) from None

    def checkpoint(self, save: Callable[[], Snapshot], *, at_once: bool = False) -> None:
        """Writes a state where its cost allows, or at once."""
        if self._state is None:
            return
        if at_once:
            self._state.try_write(save())
        else:
            self._state.save_if_due(save())

    def attentive(self) -> AbstractContextManager[Any]:
        """Within it the first Ctrl-C waits for the micro-batch under way, where a state is kept."""
        return nullcontext() if self._state is None else self._stop

    def start(
        self, recipe: Callable[[], Mapping[str, Any]], wide: Memory | None = None
    ) -> Snapshot | None:
        """Opens state and progress bar; a snapshot, made in `wide`, where the run goes on."""
        state = self.settings.state
        found = None
        if state is not None:
            self._state = state if isinstance(state, StateFolder) else StateFolder(state)
            if self._owns_state:
                self._state.__enter__()
            try:
                found = self._state.open(recipe(), resume=self.settings.resume, wide=wide)
            except BaseException:
                self._leave()
                raise
        elif self.settings.resume:
            raise ValueError("sample: resume is True, but there is no state folder; pass state=.")
        self._done = 0 if found is None else int(found.numbers["evaluations"])
        self._show()
        return found

    def _show(self) -> None:
        total, unit = len(self.steps), "step"
        if isinstance(self.denoiser, CanvasDenoiser):
            counts = self._counts(self.denoiser)
            total, unit = self.batch * sum(done for done, _ in counts), "evaluation"
            self.saved = self.batch * sum(saved for _, saved in counts)
            if self.denoiser.mask is not None:
                logger.info(
                    "mask: %d of %d network evaluations are saved", self.saved, total + self.saved
                )
        self.total = total
        self._bar = tqdm(
            total=total,
            initial=self._done,
            desc="denoising",
            unit=unit,
            disable=not self.settings.progress,
        )

    def _counts(self, denoiser: CanvasDenoiser) -> list[tuple[int, int]]:
        same = denoiser.evaluations(0, self.steps[0].time) if denoiser.has_one_plan else None
        if same is not None and denoiser.guidance_interval is None:
            return [same] * len(self.steps)
        return [denoiser.evaluations(n, step.time) for n, step in enumerate(self.steps)]

    def _evaluated(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        self._stop.check()

    def step_done(self, number: int) -> None:
        """Tells the progress bar of a step."""
        if self._bar is None:
            return
        if not isinstance(self.denoiser, CanvasDenoiser):
            self._done += 1
            self._bar.update(1)
        self._bar.set_postfix_str(f"step {number + 1} of {len(self.steps)}", refresh=False)

    @property
    def evaluations(self) -> int:
        """Network evaluations so far, those before an interruption included."""
        return self._done

    @property
    def keeps_result(self) -> bool:
        """Whether the end of the run is kept as well, for a caller who has more to do with it."""
        return self._state is not None and not self._owns_state

    def close(self, *, finished: bool) -> None:
        """Ends the bar and, for a run that is over, drops its states."""
        if self._bar is not None:
            self._bar.close()
        if self._state is not None and finished and self._owns_state:
            self._state.clear()
        self._leave()

    def _leave(self) -> None:
        if self._state is not None and self._owns_state:
            self._state.__exit__(None, None, None)
        self._state = None


def _seeds(seed: Seeds, batch: int, call: str) -> list[int]:
    """One seed for each canvas."""
    if not isinstance(seed, Sequence):
        return [check_seed(seed)] * batch
    if len(seed) != batch:
        raise ValueError(
            f"{call}: seed holds {len(seed)} seeds, but there are {batch} canvases; pass one each."
        )
    return [check_seed(one) for one in seed]


def run_recipe(run: Run, order: str, shape: Sequence[int], noise: str) -> dict[str, Any]:
    """Everything that this room knows to decide the bytes of a run, as JSON values."""
    settings, denoiser = run.settings, run.denoiser
    recipe: dict[str, Any] = {
        **settings.recipe,
        "order": order,
        "shape": list(shape),
        "solver": settings.solver,
        "steps": settings.steps,
        "spacing": settings.spacing,
        "eta": settings.eta,
        "reuse": settings.reuse,
        "seed": run.seeds,
        "schedule": settings.schedule.to_config(),
        "prediction": denoiser.prediction,
        "noise": noise,
    }
    if not isinstance(denoiser, CanvasDenoiser):
        return recipe
    first, last = denoiser.plan(0), denoiser.plan(len(run.steps) - 1)
    background, model = denoiser.background, getattr(denoiser.denoiser, "model", None)
    return {
        **recipe,
        "weights": getattr(model, "weights_hash", None),
        "window": list(first.window),
        "windows": _digest(repr((first, last)).encode()),
        "guidance_scale": denoiser.guidance_scale,
        "guidance_interval": denoiser.guidance_interval and list(denoiser.guidance_interval),
        "batch_size": denoiser.batch_size,
        "field": _field_digest(denoiser),
        "mask": denoiser.mask and _digest(denoiser.mask.tissue.numpy().tobytes()),
        "background": None if background is None else digest(background),
    }


def _field_digest(denoiser: CanvasDenoiser) -> str:
    """Of the embeddings of windows spread over the canvas."""
    plan = denoiser.plan(0)
    index = torch.linspace(0, len(plan) - 1, min(len(plan), _FIELD_WINDOWS)).long()
    origins = plan.origins_of(index)
    return _digest(repr([_parts(field.at(origins)) for field in denoiser.fields]).encode())


def _parts(cond: Any) -> Any:
    """A conditioning of any kind with a digest in place of each tensor."""
    if isinstance(cond, Tensor):
        return digest(cond)
    if isinstance(cond, Mapping):
        return {name: _parts(value) for name, value in sorted(cond.items())}
    if is_dataclass(cond):
        return {entry.name: _parts(getattr(cond, entry.name)) for entry in fields(cond)}
    return repr(cond)


def digest(tensor: Tensor) -> str:
    """Of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return _digest(flat.view(torch.uint8).numpy())


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
