# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance."""

from __future__ import annotations

from torch import Tensor


def guide(
    cond: Tensor,  # [..., C, h, w] fp32
    uncond: Tensor,  # [..., C, h, w] fp32
    scale: float,
) -> Tensor:
    """uncond + scale (cond - uncond); scale 1 is no guidance (Ho & Salimans 2022).

    The published notebook's weight w is scale - 1.
    """
    return uncond + scale * (cond - uncond)
