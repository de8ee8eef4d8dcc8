# SPDX-License-Identifier: Apache-2.0
"""interpolate_grid against its reference, its gradient, and what it says to bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from operator_cases import GRIDS, assert_close, grid_points
from ssldiff_fast import _C
from ssldiff_fast.ops import interpolate_grid, interpolate_grid_reference

MODES = ["bilinear", "slerp", "nearest"]
DTYPES = [torch.float32, torch.float64]
ALL = [pytest.param(shape, id=name) for name, shape in GRIDS.items()]


def case(shape: tuple[int, ...], *, masked: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    valid = torch.rand(shape[:2]) < 0.6 if masked else None
    return torch.randn(shape), grid_points(shape), valid


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ALL)
def test_it_agrees_with_the_reference_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype, mode: str, masked: bool
) -> None:
    cells, points, valid = case(shape, masked=masked)
    out = interpolate_grid(cells.to(dtype), points, mode=mode, valid=valid)
    assert out.dtype == dtype
    expected = interpolate_grid_reference(cells.double(), points, mode=mode, valid=valid)
    assert_close(out, expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_layout_gives_the_same_bits(mode: str) -> None:
    cells, points, valid = case(GRIDS["odd"], masked=True)
    assert valid is not None
    expected = interpolate_grid(cells, points, mode=mode, valid=valid)
    flipped = cells.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    sliced = cells.repeat(1, 1, 1, 2)[..., :37]
    mask, places = valid.t().contiguous().t(), points.t().contiguous().t()
    for strided in (flipped, sliced):
        assert not strided.is_contiguous()
        assert torch.equal(interpolate_grid(strided, places, mode=mode, valid=mask), expected)


@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("mode", MODES)
def test_every_instruction_set_gives_the_same_bits(mode: str, path: str) -> None:
    cells, points, valid = case(GRIDS["wide"], masked=True)
    _C.set_cpu_path("portable")
    try:
        expected = interpolate_grid(cells, points, mode=mode, valid=valid)
        try:
            _C.set_cpu_path(path)
        except ValueError:
            pytest.skip(f"this processor cannot run {path}")
        assert torch.equal(interpolate_grid(cells, points, mode=mode, valid=valid), expected)
    finally:
        _C.set_cpu_path("best")


def test_every_thread_count_gives_the_same_bits() -> None:
    threads = torch.get_num_threads()
    cells = torch.randn(3, 4, 2, 500)
    points = torch.rand(100, 2, dtype=torch.float64) * 3
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(interpolate_grid(cells, points, mode="slerp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_bilinear_is_grid_sample() -> None:
    cells = torch.randn(3, 4, 2, 5)
    points = torch.rand(20, 2, dtype=torch.float64) * torch.tensor([2.0, 3.0])
    as_images = cells.permute(2, 3, 0, 1)  # [T, D, R, K]
    at = (points / torch.tensor([2.0, 3.0]) * 2 - 1).flip(1).float().expand(2, 1, 20, 2)
    expected = torch.nn.functional.grid_sample(as_images, at, align_corners=True)
    # Coordinates in float32 there, in float64 here.
    torch.testing.assert_close(
        interpolate_grid(cells, points), expected[:, :, 0].permute(2, 0, 1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
def test_points_beyond_the_outer_cells_replicate_them(mode: str) -> None:
    cells = torch.randn(2, 3, 1, 4)
    points = torch.tensor([[-1.0, -0.5], [5.0, 9.0], [-torch.inf, torch.inf]], dtype=torch.float64)
    outside = interpolate_grid(cells, points, mode=mode)
    assert torch.equal(outside, torch.stack((cells[0, 0], cells[-1, -1], cells[0, -1])))


@pytest.mark.parametrize("function", [interpolate_grid, interpolate_grid_reference])
@pytest.mark.parametrize("mode", MODES)
def test_a_point_that_is_nan_counts_as_zero(mode: str, function: Any) -> None:
    cells = torch.randn(2, 3, 1, 4)
    points = torch.tensor([[torch.nan, torch.nan]], dtype=torch.float64)
    assert torch.equal(function(cells, points, mode=mode), cells[:1, 0])


@pytest.mark.parametrize("function", [interpolate_grid, interpolate_grid_reference])
@pytest.mark.parametrize("mode", MODES)
def test_a_nan_reaches_only_points_nearer_than_a_cell(mode: str, function: Any) -> None:
    cells = torch.randn(1, 4, 1, 3)
    cells[0, 1] = torch.nan
    points = torch.tensor([[0, 0], [0, 0.75], [0, 1], [0, 2], [0, 2.5]], dtype=torch.float64)
    found = function(cells, points, mode=mode).isnan().flatten(1).any(1)
    assert found.tolist() == [False, True, True, False, False]


def test_slerp_keeps_the_length_where_bilinear_shortens() -> None:
    cells = torch.eye(2)[None, :, None]
    middle = torch.tensor([[0.0, 0.5]], dtype=torch.float64)
    assert float(interpolate_grid(cells, middle, mode="slerp").norm()) == pytest.approx(1.0)
    assert float(interpolate_grid(cells, middle).norm()) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("tilt", [0.02, 0.04, 0.3])
def test_slerp_is_exact_between_vectors_nearly_in_line(sign: float, tilt: float) -> None:
    # 0.02 lies beyond |cos| = 0.9995, where the line is straight; 0.04 just within.
    ends = torch.tensor([[1.0, 0.0, 0.0], [sign * 1.0, tilt, 0.0]])
    cells = torch.stack((ends, ends.roll(1, 1) * 2))[:, :, None]
    points = torch.rand(50, 2, dtype=torch.float64)
    expected = interpolate_grid_reference(cells.double(), points, mode="slerp")
    # The two factors reach 1 / sin(0.04) = 25 and nearly cancel: 25 roundings of 6e-8.
    torch.testing.assert_close(
        interpolate_grid(cells, points, mode="slerp").double(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("mode", ["bilinear", "slerp"])
def test_an_empty_cell_is_approached_in_a_straight_line(mode: str) -> None:
    cells = torch.zeros(1, 2, 1, 3)
    cells[0, 0] = 2.0
    quarter = torch.tensor([[0.0, 0.25]], dtype=torch.float64)
    assert torch.equal(interpolate_grid(cells, quarter, mode=mode), torch.full((1, 1, 3), 1.5))


def test_bilinear_weights_are_renormalised_over_the_valid_cells() -> None:
    cells = torch.randn(2, 2, 1, 4)
    valid = torch.tensor([[True, False], [True, True]])
    middle = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    expected = (cells[0, 0] + cells[1, 0] + cells[1, 1]) / 3
    torch.testing.assert_close(interpolate_grid(cells, middle, valid=valid)[0], expected)


def test_nearest_takes_the_first_of_equals_and_looks_among_the_valid() -> None:
    cells = torch.arange(4.0).view(2, 2, 1, 1)
    points = torch.tensor([[0.5, 0.5], [0.4, 0.9], [1.0, 0.5]], dtype=torch.float64)
    assert interpolate_grid(cells, points, mode="nearest").flatten().tolist() == [0, 1, 2]
    valid = torch.tensor([[False, False], [True, True]])
    out = interpolate_grid(cells, points, mode="nearest", valid=valid)
    assert out.flatten().tolist() == [2, 3, 2]


@pytest.mark.parametrize("mode", MODES)
def test_cells_that_are_not_valid_may_hold_anything(mode: str) -> None:
    cells, points, valid = case(GRIDS["odd"], masked=True)
    assert valid is not None
    expected = interpolate_grid(cells, points, mode=mode, valid=valid)
    cells[~valid] = torch.nan
    assert torch.equal(interpolate_grid(cells, points, mode=mode, valid=valid), expected)
    nothing = interpolate_grid(cells, points, mode=mode, valid=torch.zeros_like(valid))
    assert not bool(nothing.any())


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_passes(mode: str, masked: bool) -> None:
    cells, points, valid = case((3, 4, 2, 3), masked=masked)
    cells = cells.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: interpolate_grid(x, points, mode=mode, valid=valid), cells
    )


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["odd", "one-row", "one-cell"])
def test_the_gradient_is_that_of_the_reference(name: str, mode: str, masked: bool) -> None:
    cells, points, valid = case(GRIDS[name], masked=masked)
    seed = torch.randn(len(points), *cells.shape[2:])
    grads = []
    for function, dtype in (
        (interpolate_grid, torch.float32),
        (interpolate_grid, torch.float32),
        (interpolate_grid_reference, torch.float64),
    ):
        x = cells.to(dtype, copy=True).requires_grad_()
        (function(x, points, mode=mode, valid=valid) * seed).sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    # A cell sums up to as many terms as there are points, each rounded by 6e-8.
    torch.testing.assert_close(grads[0].double(), grads[2], rtol=1e-5, atol=2e-5)


def test_without_points_the_gradient_is_zero() -> None:
    cells = torch.randn(2, 3, 1, 4, requires_grad=True)
    out = interpolate_grid(cells, torch.zeros(0, 2, dtype=torch.float64))
    assert out.shape == (0, 1, 4)
    out.sum().backward()
    assert torch.equal(cells.grad, torch.zeros(2, 3, 1, 4))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck_passes(mode: str, grad: bool) -> None:
    cells, points, valid = case((3, 4, 2, 5), masked=True)
    arguments = (cells.requires_grad_(grad), points, valid if grad else None, mode)
    torch.library.opcheck(torch.ops.ssldiff.interpolate_grid.default, arguments)


def test_it_stays_one_node_under_compile() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    cells, points, valid = case(GRIDS["odd"], masked=True)
    compiled = torch.compile(
        lambda x: interpolate_grid(2 * x, points, mode="slerp", valid=valid) + 1,
        fullgraph=True,
        backend=backend,
    )
    expected = interpolate_grid(2 * cells, points, mode="slerp", valid=valid) + 1
    assert torch.equal(compiled(cells), expected)
    nodes = [n for g in graphs for n in g.graph.nodes if "interpolate_grid" in str(n.target)]
    assert len(nodes) == 1


MASK = torch.ones(2, 3, dtype=torch.bool)
GOOD = {"grid": torch.zeros(2, 3, 1, 4), "points": torch.zeros(5, 2, dtype=torch.float64)}
BAD = {
    "no tensor": ({"grid": [1.0]}, TypeError, "grid must be a torch.Tensor, but a list"),
    "rank": ({"grid": torch.zeros(2, 3, 4)}, ValueError, r"grid has shape \[2, 3, 4\], but \[R,"),
    "dtype": ({"grid": GOOD["grid"].half()}, TypeError, "grid is float16, but float32 or float64"),
    "no rows": ({"grid": torch.zeros(0, 3, 1, 4)}, ValueError, "but no size may be 0"),
    "no width": ({"grid": torch.zeros(2, 3, 1, 0)}, ValueError, "but no size may be 0"),
    "points": ({"points": torch.zeros(5, 3)}, ValueError, r"points has shape \[5, 3\], but \[N, 2"),
    "points in float32": ({"points": torch.zeros(5, 2)}, TypeError, "points is float32, but"),
    "mode": ({"mode": "cubic"}, ValueError, "mode is 'cubic', but it must be one of bilinear,"),
    "valid": ({"valid": MASK.t()}, ValueError, r"valid has shape \[3, 2\], but \[R, K\] with R"),
    "valid as numbers": ({"valid": MASK.long()}, TypeError, "valid is int64, but bool"),
    "device": (
        {"points": GOOD["points"].to("meta")},
        ValueError,
        "points is on meta, but grid is on cpu; move both",
    ),
    "device of valid": ({"valid": MASK.to("meta")}, ValueError, "valid is on meta, but grid is on"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("function", [interpolate_grid, interpolate_grid_reference])
def test_bad_input_is_one_clear_sentence(
    function: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        function(**{**GOOD, **change})
    assert str(caught.value).startswith("interpolate_grid: ")
    assert "\n" not in str(caught.value)


RAW_BAD = {
    "dtype": (0, torch.zeros(2, 3, 1, 4).half(), "grid must be float32 or float64"),
    "rank": (0, torch.zeros(2, 3, 4), r"grid must be \[R, K, T, D\]"),
    "empty": (0, torch.zeros(2, 0, 1, 4), "with no size 0"),
    "points": (1, torch.zeros(5, 2), "points must be a float64 tensor"),
    "columns": (1, torch.zeros(5, 3, dtype=torch.float64), "points must be a float64 tensor"),
    "valid": (2, MASK.t(), "valid must be a bool tensor"),
    "mode": (3, "cubic", "mode is cubic, but it must be"),
}


@pytest.mark.parametrize(("position", "value", "message"), RAW_BAD.values(), ids=RAW_BAD.keys())
def test_the_raw_operator_checks_for_itself(position: int, value: Any, message: str) -> None:
    arguments: list[Any] = [GOOD["grid"], GOOD["points"], None, "bilinear"]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssldiff.interpolate_grid(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ALL)
def test_on_a_gpu_it_agrees_with_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, mode: str
) -> None:
    for masked in (False, True):
        cells, points, valid = case(shape, masked=masked)
        there = cells.to("cuda", dtype).requires_grad_()
        mask = None if valid is None else valid.cuda()
        out = interpolate_grid(there, points.cuda(), mode=mode, valid=mask)
        expected = interpolate_grid_reference(cells.double(), points, mode=mode, valid=valid)
        assert_close(out.detach().cpu(), expected)
        (grad,) = torch.autograd.grad(out.sum(), there, retain_graph=True)
        assert torch.equal(grad, torch.autograd.grad(out.sum(), there)[0])
