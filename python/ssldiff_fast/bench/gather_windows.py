# SPDX-License-Identifier: Apache-2.0
"""gather_windows beside slices that are stacked and cast, and beside `unfold`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import WindowPlan, gather_windows, gather_windows_reference
from .case import Case

CHANNELS, WINDOW = 3, 64
# Disjoint windows, so that the canvas is read once; more than the caches hold.
SIZES = {"cpu": 2048, "cuda": 8192}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def candidates(canvas: Tensor, layout: torch.memory_format) -> dict[str, Callable[[], Tensor]]:
    """Ours and the baselines: all windows of the canvas [C, H, W], as bfloat16."""
    size = canvas.shape[1]
    plan = WindowPlan.regular(size, size, (WINDOW, WINDOW), WINDOW)
    index, places = torch.arange(len(plan)), plan.origins.tolist()

    def ours() -> Tensor:
        return gather_windows(canvas, plan, index, dtype=torch.bfloat16, memory_format=layout)

    def stack() -> Tensor:
        crops = torch.stack([canvas[:, y : y + WINDOW, x : x + WINDOW] for y, x in places])
        return crops.to(torch.bfloat16, memory_format=layout)

    def unfold() -> Tensor:
        crops = canvas.unfold(1, WINDOW, WINDOW).unfold(2, WINDOW, WINDOW)
        crops = crops.permute(1, 2, 0, 3, 4).reshape(-1, CHANNELS, WINDOW, WINDOW)
        return crops.to(torch.bfloat16, memory_format=layout)

    return {"gather_windows": ours, "stack of slices": stack, "unfold": unfold}


def case(device: str, label: str, size: int | None = None) -> Case:
    """The windows of a canvas in one layout."""
    size = size or SIZES[device]
    canvas = torch.randn(CHANNELS, size, size, device=device)
    layout = LAYOUTS[label]
    functions = candidates(canvas, layout)

    def check() -> None:
        plan = WindowPlan.regular(size, size, (WINDOW, WINDOW), WINDOW)
        expected = gather_windows_reference(
            canvas, plan, torch.arange(len(plan)), dtype=torch.bfloat16, memory_format=layout
        )
        for function in functions.values():
            torch.testing.assert_close(function(), expected, rtol=0, atol=0)

    count = canvas.numel()
    return Case(
        operator="gather_windows",
        label=label,
        device=device,
        functions=functions,
        check=check,
        shape={"canvas": list(canvas.shape)},
        dtype=torch.float32,
        moved=6 * count,  # float32 read, bfloat16 written
        operations=count,
        aims={},
        share_aim=0.8,
        cuda_sources=False,
    )


def cases(device: str) -> list[Case]:
    """Both layouts that networks take."""
    return [case(device, label) for label in LAYOUTS]
