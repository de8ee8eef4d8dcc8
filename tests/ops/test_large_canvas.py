# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic beyond 2^31 elements: a band of a huge canvas on the CPU, and all of it on a GPU
with the memory for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from operator_cases import raw_plan
from ssldiff_fast.ops import WindowPlan, gather_windows, scatter_mean

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


def test_a_band_far_down_a_huge_canvas_is_that_of_its_windows() -> None:
    # 2^32 pixels of one channel, of which only the last windows are there.
    plan = WindowPlan.regular(2**23, 512, (4096, 256), (4096, 256))
    index = torch.arange(len(plan) - 2, len(plan))
    windows = torch.randn(2, 1, 4096, 256)
    band = (plan.height - 9, plan.height - 2)
    out = scatter_mean(windows, plan, index, rows=band)
    expected = torch.cat(windows[:, :, -9:-2].unbind(), 2)
    assert torch.equal(out, expected)
    given = torch.cat(windows.unbind(), 2)
    first = plan.height - 4096
    assert torch.equal(gather_windows(given, plan, index, first_row=first), windows)
