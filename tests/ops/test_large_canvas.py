# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic beyond 2^31 elements, on a GPU with the memory for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from operator_cases import raw_plan
from ssldiff_fast.ops import WindowPlan, scatter_mean

WINDOW, LATTICE = (1024, 1025), (32, 64)  # disjoint windows, so the mean is the window itself
GIGABYTES = 24


def _triton(windows: Tensor, plan: WindowPlan) -> Tensor:
    from ssldiff_fast.kernels.scatter_mean import scatter_mean as kernel

    return kernel(windows, *[None] * 4, *raw_plan(plan), 1.0, True)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [scatter_mean, _triton])
def test_a_canvas_beyond_32_bits_is_gathered_from_the_right_places(
    function: Callable[..., Tensor],
) -> None:
    if torch.cuda.mem_get_info()[1] < GIGABYTES * 1e9:
        pytest.skip(f"needs a GPU with {GIGABYTES} GB")
    (h, w), (rows, columns) = WINDOW, LATTICE
    windows = torch.randn(rows * columns, 1, h, w, device="cuda", dtype=torch.bfloat16)
    canvas = function(windows, WindowPlan.regular(h * rows, w * columns, WINDOW, WINDOW))
    assert canvas.numel() > 2**31
    assert windows.numel() > 2**31
    for row, expected in enumerate(windows.view(rows, columns, h, w)):
        found = canvas[0, row * h : (row + 1) * h].view(h, columns, w).transpose(0, 1)
        assert torch.equal(found, expected.float())
