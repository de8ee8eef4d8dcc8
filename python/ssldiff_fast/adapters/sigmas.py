# SPDX-License-Identifier: Apache-2.0
"""Noise levels sigma = sqrt((1 - abar) / abar), by which k-diffusion counts, and timesteps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast.diffusion.schedule import Schedule


class Sigmas:
    """The noise levels of a schedule, and the timesteps between them.

    Between two timesteps log(sigma) is linear in t (Karras et al. 2022, as k-diffusion has it).

    Args:
        schedule: a `Schedule`, a scheduler of diffusers (its `alphas_cumprod`), or alphas_cumprod
            [steps] themselves.
        call: the function that users called, for messages.
    """

    def __init__(self, schedule: Schedule | Tensor | Any, *, call: str) -> None:
        alphas = getattr(schedule, "alphas_cumprod", schedule)
        if not isinstance(alphas, Tensor) or alphas.ndim != 1 or len(alphas) < 2:
            raise TypeError(
                f"{call}: schedule is a {type(schedule).__name__}, but a Schedule, a scheduler of "
                "diffusers with alphas_cumprod, or alphas_cumprod themselves [steps] was expected."
            )
        abar = alphas.detach().to("cpu", torch.float64)
        # A schedule that ends in pure noise has no finite sigma there.
        abar = abar[abar > 0.0]
        self.log_sigmas = ((1.0 - abar) / abar).log() / 2
        if not bool((self.log_sigmas.diff() > 0).all()):
            raise ValueError(
                f"{call}: the schedule's alphas_cumprod do not fall from step to step, so a sigma "
                "has no timestep; check the schedule."
            )
        self.call = call

    def __len__(self) -> int:
        return len(self.log_sigmas)

    def at(self, t: float) -> float:
        """sigma of timestep `t`, which need not be whole."""
        if not 0 <= t <= len(self) - 1:
            raise ValueError(
                f"{self.call}: t is {t:g}, but this schedule has finite noise from 0 to "
                f"{len(self) - 1}."
            )
        low = int(t)
        high, share = min(low + 1, len(self) - 1), t - low
        return math.exp((1 - share) * self.log_sigmas[low] + share * self.log_sigmas[high])

    def time(self, sigma: float) -> float:
        """The timestep of `sigma`; beyond either end of the schedule, that end."""
        log_sigma = math.log(max(sigma, 1e-300))
        high = int(torch.searchsorted(self.log_sigmas, log_sigma))
        if high == 0 or high == len(self):
            return float(min(high, len(self) - 1))
        low = high - 1
        span = float(self.log_sigmas[high] - self.log_sigmas[low])
        return low + (log_sigma - float(self.log_sigmas[low])) / span
