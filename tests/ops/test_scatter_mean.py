# SPDX-License-Identifier: Apache-2.0
"""scatter_mean against its reference, and what it says to bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from operator_cases import PLANS, Case, assert_close, raw_plan, window_plan
from ssldiff_fast import _C
from ssldiff_fast.ops import scatter_mean, scatter_mean_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ALL = [pytest.param(case, id=name) for name, case in PLANS.items()]
ODD = PLANS["odd-overlap"]


def _layout(windows: Tensor, layout: str) -> Tensor:
    if layout == "channels-last":
        return windows.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        padded = torch.full((*windows.shape[:2], windows.shape[2] + 2, windows.shape[3] + 3), -9.0)
        padded = padded.to(windows.dtype)
        padded[:, :, 1:-1, 1:-2] = windows
        return padded[:, :, 1:-1, 1:-2]
    if layout == "transposed":
        return windows.transpose(2, 3).contiguous().transpose(2, 3)
    return windows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL)
def test_it_agrees_with_the_reference_in_float64(case: Case, dtype: torch.dtype) -> None:
    windows = case.windows(dtype)
    out = scatter_mean(windows, case.plan)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(out, scatter_mean_reference(windows.double(), case.plan))


@pytest.mark.parametrize("layout", ["channels-last", "sliced", "transposed"])
@pytest.mark.parametrize("case", ALL)
def test_every_layout_gives_the_same_bits(case: Case, layout: str) -> None:
    windows = case.windows()
    expected = scatter_mean(windows, case.plan)
    assert torch.equal(scatter_mean(_layout(windows, layout), case.plan), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(cpu_path: str, dtype: torch.dtype) -> None:
    for case in PLANS.values():
        windows = case.windows(dtype)
        _C.set_cpu_path("portable")
        expected = scatter_mean(windows, case.plan)
        _C.set_cpu_path(cpu_path)
        assert torch.equal(scatter_mean(windows, case.plan), expected)


def test_every_thread_count_gives_the_same_bits() -> None:
    threads = torch.get_num_threads()
    windows = PLANS["rows-past-a-tile"].windows()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(scatter_mean(windows, PLANS["rows-past-a-tile"].plan))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_float16_values_that_are_hard_to_widen_come_out_exactly() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    windows = bits.view(torch.float16).view(1, 1, 256, 256)
    out = scatter_mean(windows, window_plan((256, 256), (256, 256), (0,), (0,)))
    torch.testing.assert_close(out, windows[0].float(), rtol=0, atol=0, equal_nan=True)


def test_a_nan_reaches_only_the_pixels_of_its_window() -> None:
    case = PLANS["disjoint"]
    windows = case.windows()
    windows[0] = torch.nan
    out = scatter_mean(windows, case.plan)
    assert out[:, :4, :8].isnan().all()
    assert out.isnan().sum() == case.channels * 4 * 8


@pytest.mark.parametrize("name", ["odd-overlap", "disjoint", "width-one", "one-pixel", "wrapped"])
def test_the_gradient_is_that_of_the_reference(name: str) -> None:
    case = PLANS[name]
    windows = case.windows(torch.float64).requires_grad_()
    expected = windows.detach().clone().requires_grad_()
    seed = torch.randn(case.channels, case.plan.height, case.plan.width, dtype=torch.float64)
    (scatter_mean(windows, case.plan) * seed).sum().backward()
    (scatter_mean_reference(expected, case.plan) * seed).sum().backward()
    assert windows.grad is not None
    assert expected.grad is not None
    assert_close(windows.grad, expected.grad)


def test_gradcheck_passes() -> None:
    case = Case(window_plan((3, 2), (5, 4), (0, 1, 2), (0, 2), hann=True), channels=2)
    windows = case.windows(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: scatter_mean(x, case.plan), windows)
    assert torch.autograd.gradgradcheck(lambda x: scatter_mean(x, case.plan), windows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_has_the_dtype_of_the_windows(dtype: torch.dtype) -> None:
    windows = ODD.windows(dtype).requires_grad_()
    scatter_mean(windows, ODD.plan).sum().backward()
    assert windows.grad is not None
    assert windows.grad.dtype == dtype


def test_it_stays_one_node_under_compile() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    windows = ODD.windows()
    compiled = torch.compile(
        lambda x: scatter_mean(2 * x, ODD.plan) + 1, fullgraph=True, backend=backend
    )
    expected = scatter_mean(2 * windows, ODD.plan) + 1
    assert torch.equal(compiled(windows), expected)
    nodes = [n for g in graphs for n in g.graph.nodes if "scatter_mean" in str(n.target)]
    assert len(nodes) == 1


RAW_BAD = {
    "rank": (0, torch.zeros(20, 7, 5), "must have 4 dimensions"),
    "dtype": (0, torch.zeros(20, 3, 7, 5, dtype=torch.int64), "windows must be float32"),
    "count": (0, torch.zeros(19, 3, 7, 5), "holds 19 windows"),
    "empty window": (0, torch.zeros(20, 3, 0, 5), "from 1 to the size of the canvas"),
    "index": (1, torch.arange(20).int(), "index must be a contiguous int64 tensor"),
    "index beyond": (1, torch.arange(1, 21), "index holds 20, but the plan has 20"),
    "index descends": (1, torch.arange(20).flip(0), "index must ascend, but holds 18 after 19"),
    "uncond": (2, torch.zeros(20, 3, 7, 4), "uncond must have the shape"),
    "scale alone": (3, torch.zeros(20), "must be .M. or .rows, W., beside uncond"),
    "background": (4, torch.zeros(3, 18, 23), "background must be .C, rows, W.*3, 19, 23"),
    "origin outside": (5, [0, 3, 7, 13], "origins_y must ascend"),
    "descends": (6, [0, 4, 3, 13, 18], "origins_x must ascend"),
    "no origins": (6, [], "there must be windows along x"),
    "weight": (7, [1.0] * 6, "weight_y and weight_x must have 7 and 5"),
    "rows": (9, [19, 23, 0, 0, 3, 20], "rows must lie between 0 and 19"),
    "geometry": (9, [19, 23], "geometry must be height, width"),
}


@pytest.mark.parametrize(("position", "value", "message"), RAW_BAD.values(), ids=RAW_BAD.keys())
def test_the_raw_operator_checks_for_itself(position: int, value: Any, message: str) -> None:
    arguments = [ODD.windows(), *[None] * 4, *raw_plan(ODD.plan), 1.0, True]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssldiff.scatter_mean(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced", "transposed"])
@pytest.mark.parametrize("case", ALL)
def test_on_a_gpu_it_agrees_with_the_reference(case: Case, layout: str, dtype: torch.dtype) -> None:
    windows = _layout(case.windows(dtype), layout)
    out = scatter_mean(windows.cuda(), case.plan)
    assert_close(out.cpu(), scatter_mean_reference(windows.double(), case.plan))
    assert torch.equal(out, scatter_mean(windows.cuda(), case.plan))
