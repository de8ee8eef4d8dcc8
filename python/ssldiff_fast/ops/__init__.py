# SPDX-License-Identifier: Apache-2.0
"""Operators: each file holds one, with its equation, reference, checks, gradient and dispatch."""

from .scatter_mean import scatter_mean, scatter_mean_reference
from .vq_nearest import vq_nearest, vq_nearest_reference

__all__ = ["scatter_mean", "scatter_mean_reference", "vq_nearest", "vq_nearest_reference"]
