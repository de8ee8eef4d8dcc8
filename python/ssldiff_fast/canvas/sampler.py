# SPDX-License-Identifier: Apache-2.0
"""The sampling loop on the canvas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ssldiff_fast._checks import check_dtype, check_finite, check_shape
from ssldiff_fast.canvas.noise import canvas_noise
from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.diffusion.solvers import AffineStep, apply_step, denoised, get_solver

StepCallback = Callable[[Any, int, float, dict[str, Tensor]], "dict[str, Tensor] | None"]


class Denoiser(Protocol):
    """What the loop needs of a denoiser; `CanvasDenoiser` is one."""

    @property
    def prediction(self) -> str:
        """What it returns: "eps", "v" or "x0"."""
        ...

    def __call__(self, x: Tensor, t: float, *, step: int | None = None) -> Tensor:
        """[C, H, W] fp32 -> [C, H, W] fp32."""
        ...


def sample(
    denoiser: Denoiser,
    noise: Tensor,  # [C, H, W] fp32
    *,
    schedule: Schedule,
    solver: str = "ddim",
    steps: int = 50,
    spacing: str = "trailing",
    eta: float = 0.0,
    seed: int = 0,
    step_noise: Callable[[int], Tensor] | None = None,
    callback_on_step_end: StepCallback | None = None,
    progress: bool = False,
) -> Tensor:
    """Denoise a canvas.

    Args:
        denoiser: Callable (x, t, step=) -> model output; usually a `CanvasDenoiser`.
        noise: The canvas to start from, for example `canvas_noise(seed, C, H, W)`.
        schedule: The schedule that the model was trained with.
        solver: "ddim", "dpmpp_2m" or "authors".
        steps: Number of steps.
        spacing: "trailing" (starts in the noisiest step) or "leading".
        eta: Share of fresh noise in every step; 0 is deterministic.
        seed: Seed of that fresh noise, which is a function of seed, coordinate and step.
        step_noise: Step (from 0) -> [C, H, W] noise, instead of the seed's.
        callback_on_step_end: Called as (denoiser, step, t, {"latents": canvas, "denoised": x0})
            after every step, as in diffusers; a canvas returned under "latents" replaces ours.
        progress: Show a progress bar.

    Returns:
        [C, H, W] fp32, the denoised canvas.
    """
    call = "sample"
    sizes = check_shape("noise", noise, "C H W", call=call)
    check_dtype("noise", noise, [torch.float32], call=call)
    check_finite("noise", noise, call=call)
    if not (math.isfinite(eta) and eta >= 0.0):
        raise ValueError(f"{call}: eta is {eta}, but it must be 0 or above.")
    timesteps = schedule.timesteps(steps, spacing)
    plan = get_solver(solver)(schedule, timesteps, prediction=denoiser.prediction, eta=eta)

    def drawn(step: int) -> Tensor:
        if step_noise is not None:
            return step_noise(step).to(noise)
        # Step 0 of the counter is the noise that runs start from.
        return canvas_noise(
            seed, sizes["C"], sizes["H"], sizes["W"], step=step + 1, device=noise.device
        )

    x, history = noise, None
    bar = tqdm(plan, desc="denoising", unit="step", disable=not progress)
    for number, step in enumerate(bar):
        output = denoiser(x, step.time, step=number)
        _check_output(output, x, number)
        now = denoised(step, x, output)
        x = apply_step(
            step, x, output, noise=drawn(number) if step.noise else None, history=history
        )
        history = now
        if callback_on_step_end is not None:
            x = _call_back(callback_on_step_end, denoiser, number, step, x, now)
    return x


def _check_output(output: Tensor, x: Tensor, number: int) -> None:
    if output.shape != x.shape:
        raise RuntimeError(
            f"sample: the model output at step {number} has shape {list(output.shape)}, but the "
            f"canvas is {list(x.shape)}; the denoiser must keep the shape."
        )
    if not bool(torch.isfinite(output).all()):
        dtype = str(output.dtype).removeprefix("torch.")
        raise RuntimeError(
            f"sample: the model output became NaN or infinite at step {number} in {dtype}; use "
            "float32, or check the model's weights and the grid."
        )


def _call_back(
    callback: StepCallback,
    denoiser: Denoiser,
    number: int,
    step: AffineStep,
    x: Tensor,
    now: Tensor,
) -> Tensor:
    answer = callback(denoiser, number, step.time, {"latents": x, "denoised": now})
    if not answer or "latents" not in answer:
        return x
    check_shape("latents", answer["latents"], " ".join(map(str, x.shape)), call="callback")
    return answer["latents"].to(x)
