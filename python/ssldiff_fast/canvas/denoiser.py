# SPDX-License-Identifier: Apache-2.0
"""A network for windows, made into a network for the whole canvas (MultiDiffusion)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ssldiff_fast._checks import check_dtype, check_positive, check_shape
from ssldiff_fast.canvas.bands import blend_window_rows, crop_windows, micro_batches
from ssldiff_fast.canvas.conditioning import Cond
from ssldiff_fast.canvas.regions import with_regions
from ssldiff_fast.diffusion.guidance import guide
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


def unconditional(field: Field, cond: Cond) -> Cond:
    """What guidance goes away from: the field's `uncond`, or zeros like one window of `cond`."""
    # The null embedding is the zero vector (what the published models were trained with).
    return field.uncond if hasattr(field, "uncond") else torch.zeros_like(cond[:1])


class CanvasDenoiser:
    """The model output on the whole canvas, as a function of the canvas and t.

    Since it looks like a network, every sampler whose step is pointwise can use it. Windows are
    cut from the canvas, denoised in canonical micro-batches and averaged (paper Eq. 6); beside
    canvas and result only a few window rows are in memory.

    Args:
        denoiser: The network for windows.
        windows: One plan for all steps, or a function from the step to its plan.
        field: The conditioning; it must cover the canvas.
        guidance_scale: 1 is no guidance.
        batch_size: Windows of one network call, at most; it belongs to the recipe, for the rounding
            of a network depends on it.
        rows_held: Window rows gathered before they are averaged; changes memory, not the result.
    """

    def __init__(
        self,
        denoiser: WindowDenoiser,
        windows: Windows,
        field: Field,
        *,
        guidance_scale: float = 1.0,
        batch_size: int = 16,
        rows_held: int | None = None,
    ) -> None:
        call = "CanvasDenoiser"
        check_positive("batch_size", batch_size, call=call)
        if rows_held is not None:
            check_positive("rows_held", rows_held, call=call)
        if not math.isfinite(guidance_scale):
            raise ValueError(f"{call}: guidance_scale is {guidance_scale}, but it must be finite.")
        self.denoiser = with_regions(denoiser, [field])
        self.windows = windows
        self.field = field
        self.guidance_scale = float(guidance_scale)
        self.batch_size = batch_size
        self.rows_held = rows_held
        if self.guidance_scale != 1.0 and getattr(field, "uncond", field) is None:
            raise ValueError(
                f"{call}: guidance_scale is {guidance_scale}, but the field has no unconditional "
                "embedding; give it uncond= (the negative prompt's), or guidance_scale=1."
            )
        self._prepared: tuple[WindowPlan, State] | None = None
        plan = windows if isinstance(windows, WindowPlan) else windows(0)
        self._check_plan(plan)
        self.size = (plan.height, plan.width)

    @property
    def prediction(self) -> str:
        """What the model output is: "eps", "v" or "x0"."""
        return self.denoiser.prediction

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.denoiser.channels

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,  # [C, H, W] fp32
        t: float | Tensor,
        *,
        step: int | None = None,
    ) -> Tensor:
        """The model output on the canvas.

        Args:
            x: The canvas.
            t: The time that the network is told.
            step: Number of the step, from 0; needed where the windows change from step to step.

        Returns:
            [C, H, W] fp32.
        """
        call = "CanvasDenoiser"
        check_dtype("x", x, [torch.float32], call=call)
        sizes = {"C": self.channels, "H": self.size[0], "W": self.size[1]}
        check_shape("x", x, "C H W", sizes, call=call)
        plan = self._plan(step)
        state = self._state(plan)
        time = float(t)
        where = f"step {step}" if step is not None else f"t = {time:g}"
        rows = (
            self._window_row(x, time, plan, state, row, where) for row in range(len(plan.origins_y))
        )
        output, y = torch.empty_like(x), 0
        for band in blend_window_rows(plan, rows, rows_held=self.rows_held):
            output[:, y : y + band.shape[1]] = band
            y += band.shape[1]
        return output

    def _plan(self, step: int | None) -> WindowPlan:
        if isinstance(self.windows, WindowPlan):
            return self.windows
        if step is None:
            raise ValueError(
                "CanvasDenoiser: step is None, but these windows change from step to step; "
                "pass step=0, 1, ... with every call."
            )
        return self.windows(step)

    def _state(self, plan: WindowPlan) -> State:
        # One plan for all steps is prepared once; identity first, as plans compare by content.
        if self._prepared is None or (self._prepared[0] is not plan and self._prepared[0] != plan):
            cond = self.field.at(plan.origins)
            uncond = unconditional(self.field, cond) if self.guidance_scale != 1.0 else None
            self._prepared = (plan, self.denoiser.prepare(cond, uncond))
        return self._prepared[1]

    def _window_row(
        self, x: Tensor, t: float, plan: WindowPlan, state: State, row: int, where: str
    ) -> Tensor:
        """The guided model output of one window row: [Q, C, h, w] fp32."""
        count = len(plan.origins_x)
        outputs = []
        for columns in micro_batches(count, self.batch_size):
            crops = crop_windows(x, plan, row, columns)
            output = self.denoiser(crops, t, state, columns + row * count)
            pair = 1 if self.guidance_scale == 1.0 else 2
            expected = (pair, *crops.shape)
            if tuple(output.shape) != expected:
                raise RuntimeError(
                    f"CanvasDenoiser: the model output at {where} has shape "
                    f"{list(output.shape)}, but {list(expected)} was expected; the denoiser must "
                    "return one output of the windows' shape for each of the guided pair."
                )
            dtype, output = output.dtype, output.float()
            guided = guide(output[0], output[1], self.guidance_scale) if pair == 2 else output[0]
            self._check_output(guided, plan, row, columns, where, dtype)
            outputs.append(guided)
        return torch.cat(outputs)[:count]

    @staticmethod
    def _check_output(
        output: Tensor,
        plan: WindowPlan,
        row: int,
        columns: Tensor,
        where: str,
        dtype: torch.dtype,
    ) -> None:
        finite = torch.isfinite(output).flatten(1).all(1)
        if bool(finite.all()):
            return
        column = int(columns[int((~finite).nonzero()[0])])
        origin = (plan.origins_y[row], plan.origins_x[column])
        raise RuntimeError(
            f"CanvasDenoiser: the model output became NaN or infinite at {where}, in the window "
            f"with origin {origin}, in {str(dtype).removeprefix('torch.')}; use float32, or check "
            "the model's weights and the grid."
        )

    def _check_plan(self, plan: WindowPlan) -> None:
        if tuple(plan.window) != tuple(self.denoiser.window):
            raise ValueError(
                f"CanvasDenoiser: windows are {plan.window}, but the model denoises windows of "
                f"{tuple(self.denoiser.window)} latents; make the plan with that size."
            )
        covered = self.field.size
        if covered[0] < plan.height or covered[1] < plan.width:
            raise ValueError(
                f"CanvasDenoiser: field covers {covered[0]} x {covered[1]} latents, but the canvas "
                f"is {plan.height} x {plan.width}; use a larger grid or a smaller canvas."
            )
