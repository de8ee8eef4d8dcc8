# SPDX-License-Identifier: Apache-2.0
"""Small denoisers whose right answer is known."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssldiff_fast.canvas.noise import canvas_noise
from ssldiff_fast.diffusion import Schedule


@dataclass
class ColourDenoiser:
    """The exact denoiser of pixels that are normal around the window's embedding.

    Unconditionally the mean is 0. It stands for a network: at high noise it gives the colour that
    the field asks for, at low noise it keeps what is there.
    """

    schedule: Schedule
    window: tuple[int, int] = (8, 8)
    channels: int = 3
    prediction: str = "x0"
    spread: float = 0.3
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    prepared: int = 0

    def prepare(self, cond: Tensor, uncond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.prepared += 1
        return cond, uncond

    def __call__(
        self, x: Tensor, t: float, state: tuple[Tensor, Tensor | None], index: Tensor
    ) -> Tensor:
        self.shapes.append(tuple(x.shape))
        cond, uncond = state
        abar = self.schedule.abar(int(t))
        trust = abar * self.spread**2 / (abar * self.spread**2 + 1 - abar)

        def output(embedding: Tensor) -> Tensor:
            mean = embedding[:, 0, : self.channels, None, None]
            x0 = mean + trust * (x / max(abar, 1e-9) ** 0.5 - mean)
            if self.prediction == "x0":
                return x0
            return (abar**0.5 * x - x0) / (1 - abar) ** 0.5  # v

        outputs = [output(cond[index])]
        if uncond is not None:
            outputs.append(output(uncond.expand(len(index), -1, -1)))
        return torch.stack(outputs)


@dataclass
class ConvDenoiser:
    """A random network with zero padding at window borders, like a U-Net's."""

    window: tuple[int, int] = (8, 8)
    channels: int = 3
    prediction: str = "v"
    kernel: Tensor = field(default_factory=lambda: canvas_noise(1, 9, 3, 3).view(3, 3, 3, 3) / 5)

    def prepare(self, cond: Tensor, uncond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return cond, uncond

    def __call__(
        self, x: Tensor, t: float, state: tuple[Tensor, Tensor | None], index: Tensor
    ) -> Tensor:
        cond, uncond = state
        hidden = torch.nn.functional.conv2d(x, self.kernel, padding=1)
        tokens = [cond[index]] if uncond is None else [cond[index], uncond.expand_as(cond[index])]
        return torch.stack(
            [torch.tanh(hidden + token[:, 0, :3, None, None] + t / 1000) for token in tokens]
        )
