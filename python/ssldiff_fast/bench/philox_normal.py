# SPDX-License-Identifier: Apache-2.0
"""philox_normal beside `randn`, whose numbers depend on all that were drawn before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import philox_normal, philox_normal_reference
from .case import Case

CHANNELS = 3
SIZES = {"cpu": 1024, "cuda": 8192}
# Ten rounds of two products and four exclusive ors, and the 45 steps of Box-Muller.
OPERATIONS = 10 * (2 + 4) + 45
CHECKED_ROWS = 16


def candidates(size: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Ours and the baseline: the noise of a square canvas."""

    def ours() -> Tensor:
        return philox_normal(0, CHANNELS, (0, size), size, device=device)

    def randn() -> Tensor:
        return torch.randn(CHANNELS, size, size, device=device)

    return {"philox_normal": ours, "randn": randn}


def case(device: str, size: int | None = None) -> Case:
    """The noise of one step of a canvas."""
    size = size or SIZES[device]
    functions = candidates(size, device)

    def check() -> None:
        rows = min(size, CHECKED_ROWS)
        expected = philox_normal_reference(0, CHANNELS, (0, rows), size, device=device)
        torch.testing.assert_close(functions["philox_normal"]()[:, :rows], expected)

    count = CHANNELS * size * size
    return Case(
        operator="philox_normal",
        label="",
        device=device,
        functions=functions,
        check=check,
        shape={"noise": [CHANNELS, size, size]},
        dtype=torch.float32,
        moved=4 * count,
        operations=OPERATIONS * count,
        aims={"randn": 1},
    )


def cases(device: str) -> list[Case]:
    """The noise of a canvas larger than a processor's inner caches."""
    return [case(device)]
