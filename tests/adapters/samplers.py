# SPDX-License-Identifier: Apache-2.0
"""k-diffusion's samplers: the library's own where it is installed, and three of their shape."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import types
from typing import Any

import torch
from torch import Tensor


def k_diffusion_sampling() -> Any:
    """The module `k_diffusion.sampling`, or None where it is not installed.

    The package's own __init__ imports everything that its training needs (wandb, CLIP, ...), so the
    module is imported past it.
    """
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        if spec is None:
            return None
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["k_diffusion"] = package
    try:
        return importlib.import_module("k_diffusion.sampling")
    except ImportError:
        return None


def euler(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None) -> Tensor:
    """Karras et al. 2022, algorithm 2 without churn and correction."""
    for sigma, following in itertools.pairwise(sigmas):
        denoised = model(x, sigma * x.new_ones([x.shape[0]]), **(extra_args or {}))
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def heun(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None) -> Tensor:
    """Karras et al. 2022, algorithm 2 without churn."""
    ones = x.new_ones([x.shape[0]])
    for sigma, following in itertools.pairwise(sigmas):
        slope = (x - model(x, sigma * ones, **(extra_args or {}))) / sigma
        guess = x + slope * (following - sigma)
        if following > 0:
            other = (guess - model(guess, following * ones, **(extra_args or {}))) / following
            guess = x + (slope + other) / 2 * (following - sigma)
        x = guess
    return x


def ancestral(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None) -> Tensor:
    """Euler steps with fresh noise."""
    generator = torch.Generator().manual_seed(0)
    for sigma, following in itertools.pairwise(sigmas):
        denoised = model(x, sigma * x.new_ones([x.shape[0]]), **(extra_args or {}))
        up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
        down = (following**2 - up**2) ** 0.5
        x = x + (x - denoised) / sigma * (down - sigma)
        x = x + torch.randn(x.shape, generator=generator) * up
    return x
