# SPDX-License-Identifier: Apache-2.0
"""scatter_mean beside the published loop and `fold`, of windows that cover a square canvas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _C
from ..ops import WindowPlan, scatter_mean, scatter_mean_reference
from .case import Case

CHANNELS, WINDOW, STRIDE = 3, 64, 16
# A GPU's canvas is larger, so that the windows do not fit into its caches.
SIZES = {"cpu": 512, "cuda": 2048}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}
# assert_close's own for float32 results; inputs are rounded to their dtype first.
RTOL, ATOL = 1.3e-6, 1e-5


def candidates(windows: Tensor, plan: WindowPlan) -> dict[str, Callable[[], Tensor]]:
    """Ours by every backend that runs on this device, and the baselines."""
    size = plan.height

    def ours() -> Tensor:
        return scatter_mean(windows, plan)

    def triton() -> Tensor:
        from ..kernels.scatter_mean import scatter_mean as kernel

        origins, ones = list(plan.origins_y), [1.0] * WINDOW
        geometry = [size, size, 0, 0, 0, size]
        return kernel(windows, *[None] * 4, origins, origins, ones, ones, geometry, 1.0, True)

    def loop() -> Tensor:  # as the published notebook accumulates
        total = torch.zeros(CHANNELS, size, size, device=windows.device)
        count = torch.zeros(CHANNELS, size, size, device=windows.device)
        for window, (y, x) in zip(windows, plan.origins.tolist()):
            total[:, y : y + WINDOW, x : x + WINDOW] += window
            count[:, y : y + WINDOW, x : x + WINDOW] += 1
        return total / count

    def fold() -> Tensor:
        columns = windows.float().flatten(1).t()[None]
        total = torch.nn.functional.fold(columns, size, WINDOW, stride=STRIDE)
        shares = torch.nn.functional.fold(torch.ones_like(columns), size, WINDOW, stride=STRIDE)
        return (total / shares)[0]

    functions = {"scatter_mean": ours}
    if windows.device.type == "cuda" and _C.CUDA_PROBLEM is None:
        functions["Triton"] = triton  # beside CUDA C++, which is what scatter_mean runs
    return {**functions, "published loop": loop, "fold": fold}


def case(device: str, dtype: torch.dtype, size: int | None = None) -> Case:
    """A canvas with stride 16: a pixel's mean is over 16 windows."""
    size = size or SIZES[device]
    plan = WindowPlan.regular(size, size, (WINDOW, WINDOW), STRIDE)
    windows = torch.randn(len(plan), CHANNELS, WINDOW, WINDOW, device=device).to(dtype)
    functions = candidates(windows, plan)

    def check() -> None:
        expected = scatter_mean_reference(windows.double(), plan).float()
        for function in functions.values():
            torch.testing.assert_close(function(), expected, rtol=RTOL, atol=ATOL)

    pixels = CHANNELS * size * size
    return Case(
        operator="scatter_mean",
        label=str(dtype).removeprefix("torch."),
        device=device,
        functions=functions,
        check=check,
        shape={"windows": list(windows.shape), "canvas": [CHANNELS, size, size]},
        dtype=dtype,
        moved=windows.nbytes + 4 * pixels,
        operations=2 * windows.numel() + pixels,  # a product and a sum, and the normaliser
        aims={"published loop": 8, "fold": 20} if dtype == torch.float32 else {},
        share_aim=0.8,
    )


def cases(device: str) -> list[Case]:
    """Float32 and, on a GPU, what networks there make."""
    return [case(device, dtype) for dtype in DTYPES[device]]
