# SPDX-License-Identifier: Apache-2.0
"""Operators: each file holds one, with its equation, reference, checks, gradient and dispatch."""

from .gather_windows import gather_windows, gather_windows_reference
from .group_norm_silu import (
    GroupNormStatistics,
    group_norm_silu,
    group_norm_silu_reference,
    group_norm_statistics,
)
from .interpolate_grid import interpolate_grid, interpolate_grid_reference
from .philox_normal import (
    philox4x32,
    philox4x32_reference,
    philox_normal,
    philox_normal_reference,
)
from .scatter_mean import CanvasStep, scatter_mean, scatter_mean_reference
from .token_attention import few_tokens, token_attention, token_attention_reference
from .vq_nearest import vq_nearest, vq_nearest_reference
from .window_plan import WindowPlan

__all__ = [
    "CanvasStep",
    "WindowPlan",
    "few_tokens",
    "gather_windows",
    "gather_windows_reference",
    "GroupNormStatistics",
    "group_norm_silu",
    "group_norm_silu_reference",
    "group_norm_statistics",
    "interpolate_grid",
    "interpolate_grid_reference",
    "philox4x32",
    "philox4x32_reference",
    "philox_normal",
    "philox_normal_reference",
    "scatter_mean",
    "scatter_mean_reference",
    "token_attention",
    "token_attention_reference",
    "vq_nearest",
    "vq_nearest_reference",
]
