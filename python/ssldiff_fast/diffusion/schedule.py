# SPDX-License-Identifier: Apache-2.0
"""Noise schedules: how much of the image is left at each training timestep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

SPACINGS = ("trailing", "leading")


def _scaled_linear(schedule: Schedule) -> Tensor:
    # Latent diffusion's own schedule: the square root of beta is what grows linearly.
    start, end = math.sqrt(schedule.beta_start), math.sqrt(schedule.beta_end)
    ramp = torch.linspace(start, end, schedule.num_train_timesteps, dtype=torch.float64)
    return torch.cumprod(1.0 - ramp**2, dim=0)


def _linear(schedule: Schedule) -> Tensor:
    start, end = schedule.beta_start, schedule.beta_end
    ramp = torch.linspace(start, end, schedule.num_train_timesteps, dtype=torch.float64)
    return torch.cumprod(1.0 - ramp, dim=0)


def _cosine(schedule: Schedule) -> Tensor:
    # Nichol & Dhariwal 2021, Eq. 17, with their bound of 0.999 on a single beta.
    steps = torch.arange(schedule.num_train_timesteps + 1, dtype=torch.float64)
    angle = (steps / schedule.num_train_timesteps + 0.008) / 1.008 * math.pi / 2
    curve = torch.cos(angle) ** 2
    betas = (1.0 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return torch.cumprod(1.0 - betas, dim=0)


BETAS: dict[str, Callable[[Schedule], Tensor]] = {
    "scaled_linear": _scaled_linear,
    "linear": _linear,
    "cosine": _cosine,
}


def _rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    # Lin et al. 2024, algorithm 1: shift sqrt(abar) so that it ends at exactly 0, keep its start.
    root = alphas_cumprod.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return root**2


@dataclass(frozen=True)
class Schedule:
    """The cumulative signal level of every training timestep.

    Two schedules are equal when their five settings are; `alphas_cumprod` follows from them.

    Args:
        betas: "scaled_linear" (latent diffusion), "linear" or "cosine".
        beta_start: First one-step noise variance; "cosine" does not use it.
        beta_end: Last one-step noise variance; "cosine" does not use it.
        num_train_timesteps: Number of training timesteps.
        zero_terminal_snr: Rescale so that the last timestep is pure noise (Lin et al. 2024).
    """

    betas: str = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)  # [steps] fp64

    def __post_init__(self) -> None:
        if self.betas not in BETAS:
            known = ", ".join(BETAS)
            raise ValueError(f"Schedule: betas is {self.betas!r}; expected one of {known}.")
        if self.num_train_timesteps < 2:
            raise ValueError(
                f"Schedule: num_train_timesteps is {self.num_train_timesteps}; expected at least 2."
            )
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ValueError(
                f"Schedule: beta_start and beta_end are {self.beta_start} and {self.beta_end}; "
                "expected 0 < beta_start <= beta_end < 1."
            )
        alphas_cumprod = BETAS[self.betas](self)
        if self.zero_terminal_snr:
            alphas_cumprod = _rescale_to_zero_terminal_snr(alphas_cumprod)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Make a schedule from the "schedule" part of a model's config.json."""
        known = {entry.name for entry in fields(cls) if entry.init}
        unknown = sorted(set(config) - known)
        if unknown:
            raise ValueError(
                f"Schedule.from_config: unknown setting {unknown[0]!r}; "
                f"expected some of {', '.join(sorted(known))}."
            )
        return cls(**config)

    def to_config(self) -> dict[str, Any]:
        """The settings, as `from_config` takes them."""
        config = asdict(self)
        del config["alphas_cumprod"]
        return config

    def abar(self, t: int) -> float:
        """alpha-bar at schedule index `t`; below the first index it is 1 (a clean image)."""
        return 1.0 if t < 0 else float(self.alphas_cumprod[t])

    def beta(self, t: int) -> float:
        """The one-step noise variance at schedule index `t`."""
        return 1.0 - self.abar(t) / self.abar(t - 1)

    def signal_and_noise(
        self,
        t: Tensor,  # [N] int64
        like: Tensor,  # [N, ...] fp32 | bf16 | fp16 | fp64
    ) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) of each `t`, shaped to multiply `like`."""
        abar = self.alphas_cumprod.to(t.device)[t]
        shape = [-1] + [1] * (like.ndim - 1)
        signal, noise = abar.sqrt().view(shape), (1.0 - abar).sqrt().view(shape)
        return signal.to(like), noise.to(like)

    def add_noise(
        self,
        x0: Tensor,  # [N, ...] fp32
        noise: Tensor,  # [N, ...] fp32
        t: Tensor,  # [N] int64
    ) -> Tensor:
        """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise."""
        signal, sigma = self.signal_and_noise(t, x0)
        return signal * x0 + sigma * noise

    def velocity(
        self,
        x0: Tensor,  # [N, ...] fp32
        noise: Tensor,  # [N, ...] fp32
        t: Tensor,  # [N] int64
    ) -> Tensor:
        """v = sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans & Ho 2022)."""
        signal, sigma = self.signal_and_noise(t, x0)
        return signal * noise - sigma * x0

    def snr(self, t: Tensor) -> Tensor:
        """abar / (1 - abar) of each `t`, in float64; 0 where the schedule ends in pure noise."""
        abar = self.alphas_cumprod.to(t.device)[t]
        return abar / (1.0 - abar)

    def timesteps(self, steps: int, spacing: str = "trailing") -> list[int]:
        """Schedule indices from noisy to clean, one a sampling step.

        "trailing" starts at the last index (needed with zero terminal SNR) and is what the
        published large-image loop does; "leading" ends at index 0 (Lin et al. 2024, table 2).
        """
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(
                f"timesteps: steps is {steps}; expected 1 to {self.num_train_timesteps}."
            )
        if spacing not in SPACINGS:
            raise ValueError(
                f"timesteps: spacing is {spacing!r}; expected one of {', '.join(SPACINGS)}."
            )
        if spacing == "leading":
            gap = self.num_train_timesteps // steps
            return [gap * step for step in reversed(range(steps))]
        gap_exact = self.num_train_timesteps / steps
        return [round(self.num_train_timesteps - step * gap_exact) - 1 for step in range(steps)]
