# SPDX-License-Identifier: Apache-2.0
"""What scatter_mean says to bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from operator_cases import PLANS
from ssldiff_fast.ops import CanvasStep, WindowPlan, scatter_mean
from ssldiff_fast.ops import scatter_mean_reference as reference

ODD = PLANS["odd-overlap"]
BAND = torch.zeros(3, 19, 23)
STEP = CanvasStep(BAND, x=1.0, output=1.0)
HALF = torch.arange(0, 20, 2)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"windows": [1.0]}, TypeError, r"windows must be a torch.Tensor, but a list"),
    "rank": ({"windows": torch.zeros(20, 7, 5)}, ValueError, r"shape \[20, 7, 5\], but \[M, C"),
    "dtype": ({"windows": torch.zeros(20, 3, 7, 5).long()}, TypeError, r"windows is int64, but"),
    "count": ({"windows": torch.zeros(19, 3, 7, 5)}, ValueError, r"\[M, C, h, w\] with M = 20"),
    "size": ({"windows": torch.zeros(20, 3, 7, 6)}, ValueError, r"h = 7, w = 5 was expected"),
    "no plan": ({"plan": (0, 3)}, TypeError, r"plan is a tuple, but a WindowPlan was expected"),
    "index dtype": ({"index": torch.arange(20).int()}, TypeError, "index is int32"),
    "index rank": ({"index": torch.zeros(2, 10).long()}, ValueError, r"index has shape \[2, 10\]"),
    "index count": ({"index": torch.arange(19)}, ValueError, r"\[M, C, h, w\] with M = 19"),
    "index beyond": (
        {"index": torch.arange(1, 21)},
        ValueError,
        "index holds 20, but the plan's windows are numbered from 0 to 19",
    ),
    "index below": ({"index": torch.arange(-1, 19)}, ValueError, "index holds -1, but"),
    "index descends": (
        {"index": torch.arange(19, -1, -1)},
        ValueError,
        "index holds 18 after 19, but .* must ascend",
    ),
    "uncovered": (
        {"index": HALF, "windows": torch.zeros(10, 3, 7, 5)},
        ValueError,
        r"index names no window that covers the pixel \(0, 5\); pass more windows, or a backg",
    ),
    "no windows": (
        {"index": HALF[:0], "windows": torch.zeros(0, 3, 7, 5)},
        ValueError,
        r"covers the pixel \(0, 0\)",
    ),
    "rows": ({"rows": (3, 20)}, ValueError, r"rows is \(3, 20\), but canvas rows run from 0 to 19"),
    "rows descend": ({"rows": (5, 3)}, ValueError, r"rows is \(5, 3\)"),
    "background shape": (
        {"background": BAND, "rows": (0, 4)},
        ValueError,
        r"background has shape \[3, 19, 23\], but \[C, rows, W\] with C = 3, rows = 4, W = 23",
    ),
    "background dtype": ({"background": BAND.double()}, TypeError, "background is float64"),
    "scale alone": (
        {"guidance_scale": 2.0},
        ValueError,
        "guidance_scale is 2.0, but uncond is None",
    ),
    "scale nan": (
        {"uncond": ODD.windows(), "guidance_scale": float("nan")},
        ValueError,
        "guidance_scale is nan, but it must be a finite number",
    ),
    "scales": (
        {"uncond": ODD.windows(), "guidance_scale": torch.ones(19)},
        ValueError,
        r"guidance_scale has shape \[19\], but \[M\] with M = 20",
    ),
    "pixels": (
        {"uncond": ODD.windows(), "guidance_scale": torch.ones(19, 22)},
        ValueError,
        r"guidance_scale has shape \[19, 22\], but \[rows, W\] with rows = 19, W = 23",
    ),
    "scale kind": (
        {"uncond": ODD.windows(), "guidance_scale": torch.ones(20).long()},
        TypeError,
        "guidance_scale is int64",
    ),
    "uncond shape": ({"uncond": torch.zeros(20, 3, 7, 4)}, ValueError, "uncond has shape"),
    "uncond dtype": ({"uncond": ODD.windows().half()}, TypeError, "uncond is float16"),
    "canvas": (
        {"step": replace(STEP, canvas=BAND[:, 1:])},
        ValueError,
        r"step.canvas has shape \[3, 18, 23\]",
    ),
    "coefficient": (
        {"step": replace(STEP, x=float("inf"))},
        ValueError,
        "step.x is inf, but it must be a finite number",
    ),
    "history": (
        {"step": replace(STEP, history=0.5)},
        ValueError,
        "step.previous is None, but step.history is 0.5",
    ),
    "seed": ({"step": replace(STEP, seed=2**64)}, ValueError, "seed is 18446744073709551616"),
    "step": ({"step": replace(STEP, step=2**32)}, ValueError, "step.step is 4294967296, but"),
    "step kind": ({"step": replace(STEP, step=0.5)}, TypeError, "step.step is 0.5, but a whole"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("function", [scatter_mean, reference])
def test_bad_input_is_one_clear_sentence(
    function: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"windows": ODD.windows(), "plan": ODD.plan, **change}
    with pytest.raises(error, match=message) as caught:
        function(**arguments)
    assert str(caught.value).startswith("scatter_mean: ")
    assert "\n" not in str(caught.value)


def test_gradients_that_do_not_flow_are_refused() -> None:
    windows = ODD.windows()
    scale = torch.ones(20, requires_grad=True)
    with pytest.raises(ValueError, match="guidance_scale requires a gradient, but none flows"):
        scatter_mean(windows, ODD.plan, uncond=windows, guidance_scale=scale)
    background = BAND.clone().requires_grad_()
    with pytest.raises(ValueError, match="background requires a gradient, but none flows"):
        scatter_mean(windows, ODD.plan, background=background)


def test_zero_weights_do_not_cover() -> None:
    plan = WindowPlan(4, 6, (4, 4), (0,), (0, 1, 2), (1.0,) * 4, (1.0, 0.0, 1.0, 1.0))
    assert torch.equal(scatter_mean(torch.ones(3, 1, 4, 4), plan), torch.ones(1, 4, 6))
    with pytest.raises(ValueError, match=r"covers the pixel \(0, 1\)"):
        scatter_mean(torch.ones(2, 1, 4, 4), plan, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="weight_x sums to zero at position 5"):
        replace(plan, weight_x=(1.0, 1.0, 1.0, 0.0))


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused() -> None:
    windows = ODD.windows().cuda()
    with pytest.raises(ValueError, match="background is on cpu, but windows is on cuda"):
        scatter_mean(windows, ODD.plan, background=BAND)
    with pytest.raises(ValueError, match="uncond is on cpu, but windows is on cuda"):
        scatter_mean(windows, ODD.plan, uncond=windows.cpu())
    with pytest.raises(ValueError, match=r"index is on cuda:0, but .* pass index.cpu\(\)"):
        scatter_mean(windows, ODD.plan, torch.arange(20).cuda())
