# SPDX-License-Identifier: Apache-2.0
"""Solvers as plans of affine steps.

Every solver here moves the canvas by

    x' = a x + b output + c noise + d previous_denoised,      denoised = p x + q output

with coefficients that depend on the step alone, not on the position. That is the condition under
which averaging window outputs and then stepping the canvas equals stepping windows and averaging
(paper Eq. 6), so a solver never sees windows: it is a function from the schedule to its steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ssldiff_fast.diffusion.prediction import denoised_coefficients, noise_coefficients
from ssldiff_fast.diffusion.schedule import Schedule


@dataclass(frozen=True)
class AffineStep:
    """One step of a solver.

    Args:
        t: Schedule index of the step.
        time: What the network is given as its time; differs from `t` for `authors` only.
        x: Coefficient of the canvas.
        output: Coefficient of the model output.
        denoised_x: Coefficient of the canvas in the denoised canvas (x0).
        denoised_output: Coefficient of the model output in the denoised canvas.
        noise: Coefficient of fresh noise; 0 means that none is drawn.
        history: Coefficient of the previous step's denoised canvas; 0 means it is not read.
    """

    t: int
    time: float
    x: float
    output: float
    denoised_x: float
    denoised_output: float
    noise: float = 0.0
    history: float = 0.0


class Solver(Protocol):
    """Plans all steps of a run; `timesteps` run from noisy to clean, the end is abar = 1."""

    def __call__(
        self, schedule: Schedule, timesteps: Sequence[int], *, prediction: str, eta: float
    ) -> list[AffineStep]: ...


def _combine(
    t: int,
    abar: float,
    prediction: str,
    *,
    of_x: float = 0.0,
    of_denoised: float = 0.0,
    of_eps: float = 0.0,
    noise: float = 0.0,
    history: float = 0.0,
    time: float | None = None,
) -> AffineStep:
    """An AffineStep from coefficients of x, x0 and eps, the form in which solvers are written."""
    p, q = denoised_coefficients(prediction, abar)
    # Where eps is undetermined its coefficient is 0 as well, and it must not be asked for.
    m, n = noise_coefficients(prediction, abar) if of_eps else (0.0, 0.0)
    return AffineStep(
        t=t,
        time=float(t) if time is None else time,
        x=of_x + of_denoised * p + of_eps * m,
        output=of_denoised * q + of_eps * n,
        denoised_x=p,
        denoised_output=q,
        noise=noise,
        history=history,
    )


def _pairs(schedule: Schedule, timesteps: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, abar at t, abar at the next t) of each step; the last next is a clean image."""
    following = [*timesteps[1:], -1]
    return [(t, schedule.abar(t), schedule.abar(n)) for t, n in zip(timesteps, following)]


def _denoising_step(
    t: int, abar: float, abar_next: float, prediction: str, variance: float, time: float
) -> AffineStep:
    """x' = sqrt(abar') x0 + sqrt(1 - abar' - variance) eps + sqrt(variance) noise."""
    return _combine(
        t,
        abar,
        prediction,
        of_denoised=math.sqrt(abar_next),
        of_eps=math.sqrt(max(1.0 - abar_next - variance, 0.0)),
        noise=math.sqrt(variance),
        time=time,
    )


def ddim(
    schedule: Schedule, timesteps: Sequence[int], *, prediction: str, eta: float
) -> list[AffineStep]:
    """DDIM (Song et al. 2021, Eq. 12 and 16); eta = 0 draws no noise, eta = 1 is ancestral."""
    steps = []
    for t, abar, abar_next in _pairs(schedule, timesteps):
        variance = eta**2 * (1.0 - abar_next) / (1.0 - abar) * (1.0 - abar / abar_next)
        steps.append(_denoising_step(t, abar, abar_next, prediction, variance, float(t)))
    return steps


def authors(
    schedule: Schedule, timesteps: Sequence[int], *, prediction: str, eta: float
) -> list[AffineStep]:
    """The published large-image loop.

    It departs from DDIM in two points: the network is told t + 1, and the variance
    eta * beta(t) * (1 - abar') / (1 - abar) has the one-step beta however far the step goes.
    """
    steps = []
    for t, abar, abar_next in _pairs(schedule, timesteps):
        variance = eta * schedule.beta(t) * (1.0 - abar_next) / (1.0 - abar)
        steps.append(_denoising_step(t, abar, abar_next, prediction, variance, t + 1.0))
    return steps


def _half_log_snr(abar: float) -> float:
    if abar == 0.0:
        return -math.inf
    return math.inf if abar == 1.0 else 0.5 * math.log(abar / (1.0 - abar))


def dpmpp_2m(
    schedule: Schedule, timesteps: Sequence[int], *, prediction: str, eta: float
) -> list[AffineStep]:
    """DPM-Solver++ 2M, multistep and midpoint (Lu et al. 2022, algorithm 2).

    The first step has no history and the last goes to a clean image, so both are of first order.
    With zero terminal SNR the first step starts at half-log-SNR minus infinity: its exponential
    is then exactly 0, and the second step's extrapolation weight h / h_before as well.
    """
    if eta != 0.0:
        raise ValueError(
            f"dpmpp_2m: eta is {eta}, but this solver draws no noise; pass eta=0 or solver='ddim'."
        )
    steps: list[AffineStep] = []
    before = None  # half-log-SNR of the step before
    for t, abar, abar_next in _pairs(schedule, timesteps):
        here, after = _half_log_snr(abar), _half_log_snr(abar_next)
        decay = math.sqrt((1.0 - abar_next) * abar / ((1.0 - abar) * abar_next))  # exp(-h)
        weight = math.sqrt(abar_next) * (1.0 - decay)
        extrapolate = 0.0
        if before is not None and abar_next < 1.0:
            extrapolate = 0.5 * (after - here) / (here - before)
        steps.append(
            _combine(
                t,
                abar,
                prediction,
                of_x=math.sqrt((1.0 - abar_next) / (1.0 - abar)),
                of_denoised=weight * (1.0 + extrapolate),
                history=-weight * extrapolate,
            )
        )
        before = here
    return steps


SOLVERS: dict[str, Solver] = {"ddim": ddim, "dpmpp_2m": dpmpp_2m, "authors": authors}


def get_solver(name: str) -> Solver:
    """The solver called `name`."""
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}; expected one of {', '.join(SOLVERS)}.")
    return SOLVERS[name]


def denoised(
    step: AffineStep,
    x: Tensor,  # [..., H, W] fp32
    output: Tensor,  # [..., H, W] fp32
) -> Tensor:
    """The denoised canvas (x0) that the model output implies."""
    return step.denoised_x * x + step.denoised_output * output


def apply_step(
    step: AffineStep,
    x: Tensor,  # [..., H, W] fp32
    output: Tensor,  # [..., H, W] fp32
    *,
    noise: Tensor | None = None,  # [..., H, W] fp32; needed where step.noise is not 0
    history: Tensor | None = None,  # [..., H, W] fp32; needed where step.history is not 0
) -> Tensor:
    """The canvas after one step."""
    result = step.x * x + step.output * output
    if step.history:
        if history is None:
            raise ValueError(
                "apply_step: history is None, but this step needs the denoised canvas of the "
                "step before; pass it."
            )
        result = result + step.history * history
    if step.noise:
        if noise is None:
            raise ValueError("apply_step: noise is None, but this step draws noise; pass it.")
        result = result + step.noise * noise
    return result
