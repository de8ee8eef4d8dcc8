# SPDX-License-Identifier: Apache-2.0
"""gather_windows against its reference, and what it says to bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from operator_cases import PLANS, assert_close
from scatter_cases import GATHERS, Gather
from ssldiff_fast import _C
from ssldiff_fast.ops import WindowPlan, gather_windows, gather_windows_reference, scatter_mean

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
ALL = [pytest.param(case, id=name) for name, case in GATHERS.items()]
ODD = PLANS["odd-overlap"].plan


def run(function: Any, case: Gather, canvas: Tensor, **options: Any) -> Tensor:
    index = torch.tensor(case.index, dtype=torch.int64)
    made: Tensor = function(canvas, case.case.plan, index, first_row=case.first_row, **options)
    return made


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL)
def test_it_is_the_reference(case: Gather, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for source in DTYPES:
        canvas, options = case.canvas(source), {"dtype": dtype, "memory_format": layout}
        made = run(gather_windows, case, canvas, **options)
        expected = run(gather_windows_reference, case, canvas, **options)
        assert made.dtype == dtype
        assert made.numel() == 0 or made.is_contiguous(memory_format=layout)
        assert torch.equal(made, expected)


def hard_values() -> Tensor:  # [4, 256, 256]
    """Every float16, halves between two of them, and what becomes infinite or subnormal."""
    whole = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = whole.float().view(256, 256)
    return torch.stack((values, values * (1 + 2**-11), values * 3e-4, values * 1e33))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("channels", [3, 4])
def test_values_are_cast_as_pytorch_does(
    cpu_path: str, channels: int, layout: torch.memory_format
) -> None:
    values = hard_values()[-channels:]
    plan, index = WindowPlan.regular(256, 256, (256, 256), 256), torch.tensor([0])
    for source in (torch.float32, torch.float16, torch.bfloat16):
        canvas = values.to(source)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            made = gather_windows(canvas, plan, index, dtype=dtype, memory_format=layout)[0]
            expected = canvas.float().to(dtype)
            torch.testing.assert_close(made, expected, rtol=0, atol=0, equal_nan=True)
            _C.set_cpu_path("portable")
            again = gather_windows(canvas, plan, index, dtype=dtype, memory_format=layout)[0]
            _C.set_cpu_path(cpu_path)
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(made.contiguous().view(bits), again.contiguous().view(bits))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", [96, 100])
def test_windows_larger_than_the_caches_are_whole(
    cpu_path: str, window: int, layout: torch.memory_format
) -> None:
    # 100 columns are no whole number of cache lines.
    plan = WindowPlan.regular(992, 1004, (window, window), window // 2, wrap=(True, True))
    canvas, index = torch.randn(3, 992, 1004), torch.arange(len(plan))
    options: dict[str, Any] = {"dtype": torch.bfloat16, "memory_format": layout}
    made = gather_windows(canvas, plan, index, **options)
    assert made.nbytes > 2**23
    assert torch.equal(made, gather_windows_reference(canvas, plan, index, **options))


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_canvases_with_any_strides_are_read(layout: str) -> None:
    case = GATHERS["all"]
    canvas = case.canvas()
    if layout == "sliced":
        padded = torch.full((5, 30, 40), torch.nan)
        padded[1:4, 2:21, 3:26] = canvas
        view = padded[1:4, 2:21, 3:26]
    else:
        view = canvas.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(run(gather_windows, case, view), run(gather_windows, case, canvas))


def test_every_thread_count_and_instruction_set_gives_the_same_bits(cpu_path: str) -> None:
    case, threads = GATHERS["all"], torch.get_num_threads()
    canvas, options = case.canvas(), {"dtype": torch.bfloat16, "memory_format": LAYOUTS[1]}
    found = run(gather_windows, case, canvas, **options)
    try:
        torch.set_num_threads(1)
        _C.set_cpu_path("portable")
        assert torch.equal(run(gather_windows, case, canvas, **options), found)
    finally:
        torch.set_num_threads(threads)


def test_a_small_band_of_a_huge_canvas_is_found() -> None:
    # 2^36 elements along the strides, of which one row exists.
    size, window = 2**18, 1024
    plan = WindowPlan.regular(size, size, (window, window), window)
    canvas = torch.arange(size, dtype=torch.float32).expand(1, window, size)
    out = gather_windows(canvas, plan, torch.tensor([len(plan) - 1]), first_row=size - window)
    assert torch.equal(out[0, 0], torch.arange(size - window, size).float().expand(window, -1))


@pytest.mark.parametrize("name", [name for name in GATHERS if GATHERS[name].index])
def test_the_gradient_is_that_of_the_reference(name: str) -> None:
    case = GATHERS[name]
    canvas = case.canvas(torch.float64).requires_grad_()
    found, expected = (run(f, case, canvas) for f in (gather_windows, gather_windows_reference))
    seed = torch.randn_like(found)
    (grad,) = torch.autograd.grad(found, canvas, seed)
    (wanted,) = torch.autograd.grad(expected, canvas, seed)
    assert_close(grad, wanted)
    (again,) = torch.autograd.grad(run(gather_windows, case, canvas), canvas, seed)
    assert torch.equal(again, grad)


def test_a_canvas_of_which_nothing_is_gathered_has_a_gradient_of_zero() -> None:
    canvas = GATHERS["none"].canvas().requires_grad_()
    (grad,) = torch.autograd.grad(run(gather_windows, GATHERS["none"], canvas).sum(), canvas)
    assert torch.equal(grad, torch.zeros_like(canvas))


def test_the_gradient_has_the_dtype_of_the_canvas() -> None:
    canvas = GATHERS["all"].canvas(torch.bfloat16).requires_grad_()
    made = run(gather_windows, GATHERS["all"], canvas, dtype=torch.float16)
    (grad,) = torch.autograd.grad(made.float().sum(), canvas)
    assert grad.dtype == torch.bfloat16
    assert float(grad.float().min()) >= 1.0


def test_gradcheck_passes() -> None:
    plan = WindowPlan.regular(5, 4, (3, 2), (2, 1), wrap=(True, False))
    index = torch.tensor([4, 0, 4, 7])
    canvas = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_windows(x, plan, index), canvas)
    assert torch.autograd.gradgradcheck(lambda x: gather_windows(x, plan, index), canvas)


def raw(canvas: Tensor, plan: WindowPlan, index: Tensor) -> list[Any]:
    """What the registered operator takes."""
    geometry = [plan.height, plan.width, *map(int, plan.wrap), *plan.window, 0]
    axes = [list(plan.origins_y), list(plan.origins_x)]
    return [canvas, index, *axes, geometry, torch.float16, True]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["odd-overlap", "wrapped"])
def test_opcheck_passes(name: str, grad: bool) -> None:
    plan = PLANS[name].plan
    canvas = torch.randn(3, plan.height, plan.width).requires_grad_(grad)
    arguments = tuple(raw(canvas, plan, torch.tensor([7, 0, 7])))
    torch.library.opcheck(torch.ops.ssldiff.gather_windows.default, arguments)
    windows = torch.randn(3, 3, *plan.window).requires_grad_(grad)
    summed = (windows, arguments[1], *arguments[2:5], plan.height)
    torch.library.opcheck(torch.ops.ssldiff.gather_windows_backward.default, summed)


def test_it_stays_one_node_under_compile() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    case = GATHERS["repeats"]
    canvas = case.canvas()
    index = torch.tensor(case.index)

    def function(x: Tensor, index: Tensor) -> Tensor:
        return gather_windows(2 * x, ODD, index, dtype=torch.bfloat16) + 1

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert torch.equal(compiled(canvas, index), function(canvas, index))
    nodes = [n for g in graphs for n in g.graph.nodes if "gather_windows" in str(n.target)]
    assert len(nodes) == 1


def test_gathering_a_scattered_canvas_of_disjoint_windows_gives_the_windows() -> None:
    case = PLANS["disjoint"]
    windows = case.windows()
    canvas = scatter_mean(windows, case.plan)
    assert torch.equal(gather_windows(canvas, case.plan, torch.arange(len(case.plan))), windows)


CANVAS = torch.zeros(3, 19, 23)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"canvas": [1.0]}, TypeError, "canvas must be a torch.Tensor, but a list"),
    "rank": ({"canvas": CANVAS[0]}, ValueError, r"canvas has shape \[19, 23\], but \[C, n, W\]"),
    "width": ({"canvas": CANVAS[..., 1:]}, ValueError, r"\[C, n, W\] with W = 23 was expected"),
    "dtype": ({"canvas": CANVAS.int()}, TypeError, "canvas is int32"),
    "no plan": ({"plan": 3}, TypeError, "plan is a int, but a WindowPlan was expected"),
    "index": ({"index": torch.arange(3).int()}, TypeError, "index is int32"),
    "beyond": ({"index": torch.tensor([20])}, ValueError, "index holds 20, but the plan's"),
    "below": ({"index": torch.tensor([3, -2])}, ValueError, "index holds -2, but the plan's"),
    "rows": (
        {"canvas": CANVAS[:, :10], "first_row": 4},
        ValueError,
        "a window of the canvas rows 0 to 6, but canvas holds 4 to 13; pass every row",
    ),
    "too many rows": (
        {"canvas": torch.zeros(3, 20, 23)},
        ValueError,
        "canvas holds 20 rows from first_row 0, but the plan's canvas has rows 0 to 18",
    ),
    "first row": ({"first_row": 19}, ValueError, "19 rows from first_row 19"),
    "to dtype": ({"dtype": torch.int8}, TypeError, "dtype is torch.int8, but float32"),
    "layout": ({"memory_format": torch.preserve_format}, ValueError, "is torch.preserve_format"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("function", [gather_windows, gather_windows_reference])
def test_bad_input_is_one_clear_sentence(
    function: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"canvas": CANVAS, "plan": ODD, "index": torch.arange(3), **change}
    with pytest.raises(error, match=message) as caught:
        function(**arguments)
    assert str(caught.value).startswith("gather_windows: ")
    assert "\n" not in str(caught.value)


RAW_BAD = {
    "rank": (0, CANVAS[0], r"canvas must be \[C, rows, 23\]"),
    "dtype": (0, CANVAS.int(), "canvas and dtype must be float32"),
    "to dtype": (5, torch.int32, "canvas and dtype must be float32"),
    "index": (1, torch.arange(3).int(), "index must be a contiguous int64 tensor"),
    "beyond": (1, torch.tensor([20]), "index holds 20, but the plan has 20"),
    "rows": (0, CANVAS[:, :6], "window 0 needs canvas rows 0 to 7, but 0 to 6 were given"),
    "origins": (2, [0, 3, 7, 13], "origins_y must ascend"),
    "geometry": (4, [19, 23], "geometry must be height, width"),
}


@pytest.mark.parametrize(("position", "value", "message"), RAW_BAD.values(), ids=RAW_BAD.keys())
def test_the_raw_operator_checks_for_itself(position: int, value: Any, message: str) -> None:
    arguments = raw(CANVAS, ODD, torch.arange(3))
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssldiff.gather_windows(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL)
def test_on_a_gpu_it_is_the_reference(
    case: Gather, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    canvas = torch.randn_like(case.canvas())
    options = {"dtype": dtype, "memory_format": layout}
    made = run(gather_windows, case, canvas.cuda(), **options)
    assert made.numel() == 0 or made.is_contiguous(memory_format=layout)
    assert torch.equal(made.cpu(), run(gather_windows_reference, case, canvas, **options))
