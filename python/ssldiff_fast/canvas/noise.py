# SPDX-License-Identifier: Apache-2.0
"""Noise of the canvas as a function of (seed, channel, y, x, step); see ops.philox_normal."""

from __future__ import annotations

import torch
from torch import Tensor

from ssldiff_fast.ops import philox4x32, philox_normal
from ssldiff_fast.ops.philox_normal import check_seed as check_seed

# Steps of a run count from 1; the noise that a run starts from is that of step 0.
INITIAL_STEP = 0
# The channel whose words choose window offsets: no canvas has so many channels.
_OFFSET_CHANNEL = 0xFFFFFFFF


def canvas_noise(
    seed: int,
    channels: int,
    height: int,
    width: int,
    *,
    step: int = INITIAL_STEP,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise of a whole canvas: [C, H, W] fp32."""
    return philox_normal(seed, channels, (0, height), width, step=step, device=device)


def offset_shares(seed: int) -> tuple[float, float]:
    """Where a run's window lattice starts, as shares of the stride: two numbers in [0, 1)."""
    words = philox4x32(torch.tensor([[_OFFSET_CHANNEL, 0, 0, 0]]), seed)[0]
    return int(words[0]) / 2**32, int(words[1]) / 2**32
