# SPDX-License-Identifier: Apache-2.0
"""A network for windows, made into a network for the whole canvas (MultiDiffusion)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ssldiff_fast._checks import (
    check_count,
    check_dtype,
    check_finite,
    check_number,
    check_shape,
)
from ssldiff_fast.canvas.conditioning import Cond
from ssldiff_fast.canvas.mask import TissueMask
from ssldiff_fast.canvas.regions import with_regions
from ssldiff_fast.canvas.stages import Rows, StepSettings
from ssldiff_fast.canvas.window_rows import RowEvaluator
from ssldiff_fast.canvas.window_stage import WindowStage
from ssldiff_fast.diffusion.prediction import denoised_coefficients
from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.ops import WindowPlan

# Whatever a denoiser keeps between `prepare` and its calls.
State: TypeAlias = Any
Windows: TypeAlias = WindowPlan | Callable[[int], WindowPlan]


class WindowDenoiser(Protocol):
    """A network that denoises windows; what a model must offer to be used on a canvas."""

    @property
    def window(self) -> tuple[int, int]:
        """(h, w) in latents."""
        ...

    @property
    def channels(self) -> int:
        """Latent channels C."""
        ...

    @property
    def prediction(self) -> str:
        """What the network predicts: "eps", "v" or "x0"."""
        ...

    def prepare(
        self,
        cond: Cond,  # [N, T, D] fp32, raw embeddings of all windows; or a `Conditioning`
        uncond: Cond | None,  # [1, T, D] fp32, or of one; None where no guidance is wanted
    ) -> State:
        """Everything that is independent of t, once per window set."""
        ...

    def __call__(
        self,
        x: Tensor,  # [B, C, h, w] fp32
        t: float,
        state: State,
        index: Tensor,  # [B] int64, which windows of the set these are
    ) -> Tensor:
        """The model output of a batch of windows.

        Returns:
            [2, B, C, h, w], conditional and unconditional, where the state has both (one call for
            the pair lets a network share what both have in common); [1, B, C, h, w] otherwise.
        """
        ...


class Field(Protocol):
    """Embeddings as a function of position."""

    @property
    def size(self) -> tuple[int, int]:
        """The canvas (H, W) that it describes, in latents."""
        ...

    def at(self, origins: Tensor) -> Cond:
        """[N, 2] int64 window origins -> [N, T, D] fp32, or a `Conditioning` of N windows.

        A field may have an attribute `uncond`: the conditioning of one window ([1, T, D], ...) that
        guidance goes away from, such as a negative prompt. Without it that is the zero embedding.
        """
        ...


class CanvasDenoiser:
    """The model output on the whole canvas, as a function of the canvas and t.

    Since it looks like a network, every sampler whose step is pointwise can use it. Windows are
    cut from the canvas, denoised in canonical micro-batches and averaged (paper Eq. 6); beside
    canvas and result only a few window rows are in memory.

    What the bytes depend on: the network and its device, dtype and library versions, the windows,
    the field, the guidance, the mask and `batch_size`. Not on the order in which canvas rows are
    finished, nor on the number of threads with our networks. (PyTorch's convolutions on a CPU, in
    others, do round differently with another.)

    Args:
        denoiser: The network for windows.
        windows: One plan for all steps, or a function from the step to its plan.
        field: The conditioning, which must cover the canvas; a list of them for a batch of
            canvases [B, C, H, W], one each.
        guidance_scale: 1 is no guidance.
        guidance_interval: (low, high): outside low <= t <= high there is no guidance, and only
            the conditional is evaluated (Kynkaanniemi et al. 2024). None: guidance everywhere.
        batch_size: Windows of one network call, at most; it belongs to the recipe, for the rounding
            of a network depends on it.
        mask: Where there is tissue. Windows without any are not evaluated and count as windows
            whose denoised latent is the `background`.
        background: [C, h, w] latent that is repeated over the canvas; [C, 1, 1] for one colour.
            Needed with `mask`.
        schedule: Of the model; with `mask` it turns the background into a model output where a
            scheduler of other libraries steps. `sample` passes its own.
    """

    def __init__(
        self,
        denoiser: WindowDenoiser,
        windows: Windows,
        field: Field | Sequence[Field],
        *,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        batch_size: int = 16,
        mask: TissueMask | Tensor | None = None,  # [R, K] bool
        background: Tensor | None = None,  # [C, h, w] fp32
        schedule: Schedule | None = None,
    ) -> None:
        call = "CanvasDenoiser"
        self.fields = list(field) if isinstance(field, Sequence) else [field]
        self.denoiser = with_regions(denoiser, self.fields)
        self.windows = windows
        self.guidance_scale = check_number("guidance_scale", guidance_scale, call=call)
        if self.guidance_scale != 1.0 and any(getattr(f, "uncond", f) is None for f in self.fields):
            raise ValueError(
                f"{call}: guidance_scale is {guidance_scale}, but the field has no unconditional "
                "embedding; give it uncond= (the negative prompt's), or guidance_scale=1."
            )
        self.guidance_interval = _checked_interval(guidance_interval)
        self.batch_size = check_count("batch_size", batch_size, call=call)
        self.mask = TissueMask(mask) if isinstance(mask, Tensor) else mask
        self.background = _checked_background(background, self.mask, denoiser)
        self.schedule = schedule
        plan = self.plan(0)
        self._check_plan(plan)
        self.size = (plan.height, plan.width)
        self.evaluator = RowEvaluator(
            self.denoiser,
            self.fields,
            self.batch_size,
            self.mask,
            keep_prepared=self.has_one_plan,
        )

    @property
    def prediction(self) -> str:
        """What the model output is: "eps", "v" or "x0"."""
        return self.denoiser.prediction

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.denoiser.channels

    @property
    def has_one_plan(self) -> bool:
        """Whether the windows are the same in every step."""
        return isinstance(self.windows, WindowPlan)

    def plan(self, step: int | None) -> WindowPlan:
        """The windows of a step."""
        if isinstance(self.windows, WindowPlan):
            return self.windows
        if step is None:
            raise ValueError(
                "CanvasDenoiser: step is None, but these windows change from step to step; "
                "pass step=0, 1, ... with every call."
            )
        return self.windows(step)

    def scale_at(self, t: float) -> float:
        """The guidance scale at a time: 1 outside the interval."""
        if self.guidance_interval is None:
            return self.guidance_scale
        low, high = self.guidance_interval
        return self.guidance_scale if low <= t <= high else 1.0

    def evaluations(self, step: int, t: float) -> tuple[int, int]:
        """Network evaluations of a step, of one canvas, and how many the mask saves.

        A guided pair counts as two.
        """
        plan, pair = self.plan(step), 1 if self.scale_at(t) == 1.0 else 2
        done = self.evaluator.count(plan)
        return pair * done, pair * (len(plan) - done)

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,  # [C, H, W] or [B, C, H, W] fp32
        t: float | Tensor,
        *,
        step: int | None = None,
    ) -> Tensor:
        """The model output on the canvas.

        Args:
            x: The canvas, or a batch of them.
            t: The time that the network is told.
            step: Number of the step, from 0; needed where the windows change from step to step.

        Returns:
            The shape of x, fp32.
        """
        canvas = self.as_batch("x", x, call="CanvasDenoiser")
        time = _as_time(t)
        settings = StepSettings(
            time=time,
            guidance_scale=self.scale_at(time),
            where=f"step {step}" if step is not None else f"t = {time:g}",
            background=self.background,
            of_denoised=self._of_denoised(time),
        )
        stage = WindowStage(self.plan(step), self.evaluator, settings)
        stage.push(Rows(0, canvas))
        output = torch.empty_like(canvas)
        while not stage.finished:
            for band in stage.advance():
                output[:, :, band.begin : band.end] = band.canvas
        return output if x.ndim == 4 else output[0]

    def as_batch(self, name: str, x: Tensor, *, call: str) -> Tensor:
        """A canvas or a batch of them as [B, C, H, W], checked."""
        check_dtype(name, x, [torch.float32], call=call)
        sizes = {"C": self.channels, "H": self.size[0], "W": self.size[1]}
        if x.ndim == 4:
            check_shape(name, x, "B C H W", sizes, call=call)
        else:
            check_shape(name, x, "C H W", sizes, call=call)
            x = x[None]
        if len(self.fields) not in (1, len(x)):
            raise ValueError(
                f"{call}: {name} holds {len(x)} canvases, but there are {len(self.fields)} fields; "
                "pass one field for all, or one for each canvas."
            )
        return x

    def _of_denoised(self, time: float) -> tuple[float, float] | None:
        if self.background is None or self.prediction == "x0":
            return (0.0, 1.0)
        if self.schedule is None:
            raise ValueError(
                "CanvasDenoiser: schedule is None, but with a mask the background latent must be "
                f"turned into the model's prediction ({self.prediction}); pass schedule=."
            )
        return denoised_coefficients(self.prediction, self.schedule.abar(round(time)))

    def _check_plan(self, plan: WindowPlan) -> None:
        if tuple(plan.window) != tuple(self.denoiser.window):
            raise ValueError(
                f"CanvasDenoiser: windows are {plan.window}, but the model denoises windows of "
                f"{tuple(self.denoiser.window)} latents; make the plan with that size."
            )
        for field in self.fields:
            height, width = field.size
            if height < plan.height or width < plan.width:
                raise ValueError(
                    f"CanvasDenoiser: field covers {height} x {width} latents, but the canvas is "
                    f"{plan.height} x {plan.width}; use a larger grid or a smaller canvas."
                )
            if getattr(field, "everywhere", False):
                continue
            wrap = getattr(field, "wrap", plan.wrap)
            for axis, ours, its, mine, size in zip(
                "yx", plan.wrap, wrap, (plan.height, plan.width), (height, width)
            ):
                if ours and not (its and mine == size):
                    raise ValueError(
                        f"CanvasDenoiser: windows wrap along {axis}, but the field does not with "
                        f"the canvas's period of {mine} latents; make it with wrap= and that size."
                    )


def _as_time(t: float | Tensor) -> float:
    if isinstance(t, Tensor) and t.numel() != 1:
        if t.ndim > 1 or not bool((t == t.flatten()[0]).all()):
            raise ValueError(
                f"CanvasDenoiser: t has shape {list(t.shape)}, but all windows of a canvas are "
                "denoised at one time; pass one number."
            )
        t = t[0]
    time = float(t)
    if not math.isfinite(time):
        raise ValueError(f"CanvasDenoiser: t is {time}, but it must be finite.")
    return time


def _checked_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    if interval is None:
        return None
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise ValueError(
            f"CanvasDenoiser: guidance_interval is {interval}, but it must be (low, high) in t "
            "with low <= high."
        )
    return float(interval[0]), float(interval[1])


def _checked_background(
    background: Tensor | None, mask: TissueMask | None, denoiser: WindowDenoiser
) -> Tensor | None:
    call = "CanvasDenoiser"
    if (mask is None) != (background is None):
        there, missing = ("mask", "background") if background is None else ("background", "mask")
        raise ValueError(
            f"{call}: {missing} is None, but {there} was given; what the mask leaves out takes "
            "the background latent, so pass both or neither."
        )
    if background is None:
        return None
    check_shape("background", background, "C _ _", {"C": denoiser.channels}, call=call)
    check_finite("background", background, call=call)
    return background.detach().float()
