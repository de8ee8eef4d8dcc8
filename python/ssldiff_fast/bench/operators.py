# SPDX-License-Identifier: Apache-2.0
"""The operators that have a benchmark."""

from __future__ import annotations

from collections.abc import Callable

from . import (
    gather_windows,
    interpolate_grid,
    philox_normal,
    scatter_mean,
    token_attention,
    vq_nearest,
)
from .case import Case

# Each makes its cases, inputs and all, on a device: "cpu" or "cuda".
OPERATORS: dict[str, Callable[[str], list[Case]]] = {
    "gather_windows": gather_windows.cases,
    "interpolate_grid": interpolate_grid.cases,
    "philox_normal": philox_normal.cases,
    "token_attention": token_attention.cases,
    "scatter_mean": scatter_mean.cases,
    "vq_nearest": vq_nearest.cases,
}


def cases(operator: str, device: str) -> list[Case]:
    """The benchmark's cases of an operator: what `ssldiff bench` times.

    Raises:
        ValueError: an operator without a benchmark.
    """
    if operator not in OPERATORS:
        raise ValueError(
            f"bench: the operator is {operator!r}, but it must be one of {', '.join(OPERATORS)}."
        )
    return OPERATORS[operator](device)
