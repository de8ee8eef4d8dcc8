# SPDX-License-Identifier: Apache-2.0
"""group_norm_silu against its reference, its gradients, and what it says to bad input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from operator_cases import MAPS, RTOL_ATOL, map_parameters
from ssldiff_fast import _C
from ssldiff_fast.ops import (
    GroupNormStatistics,
    group_norm_silu,
    group_norm_silu_reference,
    group_norm_statistics,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# What rounding to 16 bits leaves: assert_close's own.
TOLERANCES = {**RTOL_ATOL, torch.bfloat16: (1.6e-2, 1e-5), torch.float16: (1e-3, 1e-5)}
ALL = [pytest.param(*case, id=name) for name, case in MAPS.items()]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """New memory holds NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in every order of memory."""
    last = x.transpose(1, -1).clone(memory_format=torch.contiguous_format).transpose(1, -1)
    wide = torch.cat((x, x), dim=1)[:, : x.shape[1]]
    odd = x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    cropped = F.pad(last, (1, 1))[..., 1:-1]
    return {"plain": x, "last": last, "wide": wide, "odd": odd, "cropped": cropped}


def gradients(function: Any, x: Tensor, groups: int, seed: Tensor, **others: Any) -> list[Tensor]:
    """The result, then the gradients of x and of every tensor among the others."""
    x = x.clone().requires_grad_()
    others = {
        k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in others.items()
    }
    out = function(x, groups, **others)
    leaves = [x, *(v for v in others.values() if isinstance(v, Tensor))]
    return [out.detach(), *torch.autograd.grad(out, leaves, seed)]


@pytest.mark.parametrize("bare", [False, True], ids=["full", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), ALL)
def test_result_and_gradients_are_those_of_the_reference_in_float64(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, bare: bool
) -> None:
    x, seed = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    parameters = {} if bare else {k: v.to(dtype) for k, v in map_parameters(shape).items()}
    wide = {k: v.double() for k, v in parameters.items()}
    expected = gradients(
        group_norm_silu_reference, x.double(), groups, seed.double(), silu=not bare, **wide
    )
    rtol, atol = TOLERANCES[dtype]
    for maps in layouts(x).values():
        made = gradients(group_norm_silu, maps, groups, seed, silu=not bare, **parameters)
        assert made[0].dtype == made[1].dtype == dtype
        torch.testing.assert_close(made[0].double(), expected[0], rtol=rtol, atol=atol)
        for grad, wanted in zip(made[1:], expected[1:]):
            # Sums of as many terms as a sample has, which partly cancel.
            scale = 1 + x.numel() ** 0.5
            torch.testing.assert_close(grad.double(), wanted, rtol=rtol, atol=4e-7 * scale + atol)


def test_the_result_is_laid_out_like_the_input() -> None:
    for name, maps in layouts(torch.randn(2, 64, 6, 5)).items():
        out = group_norm_silu(maps, 32)
        assert out.stride() == torch.empty_like(maps).stride(), name


@pytest.mark.parametrize("layout", ["plain", "last"])
def test_it_is_torchs_group_norm_then_silu(layout: str) -> None:
    x = layouts(torch.randn(3, 64, 9, 7))[layout]
    weight, bias = torch.randn(64), torch.randn(64)
    expected = F.silu(F.group_norm(x, 32, weight, bias, 1e-6))
    out = group_norm_silu(x, 32, weight=weight, bias=bias, eps=1e-6)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", ["plain", "last"])
def test_a_mean_ten_thousand_times_the_deviation_does_not_cancel(layout: str) -> None:
    x = layouts(torch.randn(2, 64, 40, 33) + 1e4)[layout]
    expected = group_norm_silu_reference(x.double(), 32)
    # x itself is a multiple of 1e-3; the reference sees the same rounded values.
    torch.testing.assert_close(group_norm_silu(x, 32).double(), expected, rtol=1e-5, atol=1e-5)
    found = group_norm_statistics(x, 32)
    variance = x.double().unflatten(1, (32, -1)).flatten(2).var(2, correction=0)
    torch.testing.assert_close(found.variance.double(), variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["plain", "last"])
def test_one_huge_value_does_not_spoil_the_statistics(layout: str) -> None:
    x = torch.randn(1, 8, 50, 50)
    x[0, :, 0, 0] = 1e6
    found = group_norm_statistics(layouts(x)[layout], 2)
    grouped = x.double().unflatten(1, (2, -1)).flatten(2)
    torch.testing.assert_close(found.mean.double(), grouped.mean(2), rtol=1e-6, atol=1e-6)
    wanted = grouped.var(2, correction=0)
    torch.testing.assert_close(found.variance.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["plain", "last", "cropped"])
def test_tiles_with_combined_statistics_are_the_whole_image(layout: str) -> None:
    x = layouts(torch.randn(2, 64, 24, 20) * 3 + torch.linspace(-5, 5, 20))[layout]
    tiles = [x[..., :7], x[..., 7:15], x[..., 15:]]
    parts = [group_norm_statistics(tile, 32) for tile in tiles]
    together = GroupNormStatistics.combine(parts)
    assert together.count == 2 * 24 * 20
    out = torch.cat([group_norm_silu(tile, 32, statistics=together) for tile in tiles], dim=3)
    torch.testing.assert_close(out, group_norm_silu(x, 32), rtol=1e-5, atol=1e-5)
    # The mean of the variances is another number.
    naive = torch.stack([part.variance for part in parts]).mean(0)
    assert float((naive / together.variance).max()) < 0.9


def test_statistics_of_one_sample_serve_all() -> None:
    x, fixed = torch.randn(5, 8, 6, 6), (torch.randn(1, 2), torch.rand(1, 2) + 0.5)
    statistics = GroupNormStatistics.from_variance(*fixed)
    out = group_norm_silu(x, 2, statistics=statistics)
    expected = group_norm_silu_reference(x, 2, statistics=statistics)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", ["plain", "last"])
@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
def test_gradcheck_passes(layout: str, given: bool, silu: bool) -> None:
    shape = (2, 6, 3, 4)
    x = layouts(torch.randn(shape, dtype=torch.float64))[layout].requires_grad_()
    parameters = {k: v.double().requires_grad_() for k, v in map_parameters(shape).items()}
    fixed = torch.randn(2, 3, dtype=torch.float64)
    statistics = GroupNormStatistics.from_variance(fixed, fixed**2 + 1) if given else None

    def function(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values))
        return group_norm_silu(x, 3, statistics=statistics, silu=silu, **named)

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    path: str, dtype: torch.dtype
) -> None:
    shape, threads = (3, 96, 40, 50), torch.get_num_threads()
    parameters, seed = map_parameters(shape), torch.randn(shape).to(dtype)
    for maps in list(layouts(torch.randn(shape).to(dtype)).values())[:2]:
        results = []
        try:
            for which, count in (("portable", 1), (path, 1), (path, 2), (path, 3)):
                try:
                    _C.set_cpu_path(which)
                except ValueError:
                    pytest.skip(f"this processor cannot run {which}")
                torch.set_num_threads(count)
                results.append(gradients(group_norm_silu, maps, 32, seed, **parameters))
        finally:
            _C.set_cpu_path("best")
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_is_right_from_one_end_to_the_other(dtype: torch.dtype) -> None:
    ends = torch.tensor([-3e4, -200.0, -88.0, -87.0, -86.0, 0.0, 1e-4, 86.0, 88.0, 3e4])
    x = torch.cat((torch.linspace(-30, 30, 4086), ends)).to(dtype)
    statistics = GroupNormStatistics.from_variance(*(f(1, 1) for f in (torch.zeros, torch.ones)))
    if dtype == torch.float64:
        statistics = GroupNormStatistics.from_variance(
            statistics.mean.double(), statistics.m2.double()
        )
    out = group_norm_silu(x[None, None], 1, statistics=statistics, eps=0.0)[0, 0]
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(out.double(), F.silu(x.double()), rtol=rtol, atol=min(atol, 1e-7))


def test_nan_and_infinity_stay_in_their_sample_and_group() -> None:
    x = torch.randn(2, 4, 5, 5)
    x[0, 0, 0, 0], x[1, 3, 2, 2] = torch.nan, torch.inf
    for maps in (x, layouts(x)["last"]):
        bad = group_norm_silu(maps, 2).isnan().flatten(2).any(2)
        assert bad.tolist() == [[True, True, False, False], [False, False, True, True]]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_opcheck_passes(grad: bool, bare: bool) -> None:
    shape = (2, 6, 3, 4)
    for maps in layouts(torch.randn(shape)).values():
        x = maps.detach().clone().requires_grad_(grad)
        parameters = [p.requires_grad_(grad) for p in map_parameters(shape).values()]
        arguments = [None] * 5 if bare else parameters
        torch.library.opcheck(
            torch.ops.ssldiff.group_norm_silu.default,
            (x, 3, *arguments, None, None, 1e-5, True),
        )
    x = maps.detach()
    torch.library.opcheck(torch.ops.ssldiff.group_norm_statistics.default, (x, 3))
    saved = [p.detach() for p in parameters]
    fixed = torch.rand(2, 3)
    torch.library.opcheck(
        torch.ops.ssldiff.group_norm_silu_backward.default,
        (x, x, 3, *saved, fixed, fixed, False, True),
    )


def test_it_stays_one_node_under_compile() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    x, weight = torch.randn(2, 8, 5, 5), torch.randn(8)
    compiled = torch.compile(
        lambda x: group_norm_silu(2 * x, 4, weight=weight) + 1, fullgraph=True, backend=backend
    )
    assert torch.equal(compiled(x), group_norm_silu(2 * x, 4, weight=weight) + 1)
    nodes = [n for g in graphs for n in g.graph.nodes if "group_norm_silu" in str(n.target)]
    assert len(nodes) == 1


STATISTICS = GroupNormStatistics.from_variance(torch.zeros(2, 4), torch.ones(2, 4))
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, but a list"),
    "rank": ({"x": torch.zeros(8)}, ValueError, r"x has shape \[8\], but \[N, C, ...\]"),
    "dtype": ({"x": torch.zeros(2, 8, 3).int()}, TypeError, "x is int32, but float32 or"),
    "groups": ({"groups": 3}, ValueError, "groups is 3, but it must divide the 8 channels"),
    "no groups": ({"groups": 0}, ValueError, "groups is 0, but it must be above zero"),
    "half a group": ({"groups": 2.5}, TypeError, "groups is 2.5, but it must be a whole number"),
    "weight": ({"weight": torch.ones(7)}, ValueError, r"weight has shape \[7\], but \[C\] with"),
    "bias": ({"bias": torch.ones(8).double()}, TypeError, "bias is float64, but float32 or"),
    "add": ({"add": torch.ones(8)}, ValueError, r"add has shape \[8\], but \[N, C\]"),
    "scale": ({"scale": torch.ones(3, 8)}, ValueError, r"scale has shape \[3, 8\], but \[N, C\]"),
    "shift": ({"shift": 1.0}, TypeError, "shift must be a torch.Tensor, but a float"),
    "device": ({"bias": torch.ones(8, device="meta")}, ValueError, "bias is on meta, but x is on"),
    "eps": ({"eps": -1.0}, ValueError, "eps is -1.0, but it must not be below zero"),
    "statistics": ({"statistics": (1, 2)}, TypeError, "statistics is a tuple, but GroupNorm"),
    "groups of statistics": (
        {"statistics": GroupNormStatistics.from_variance(torch.zeros(2, 2), torch.ones(2, 2))},
        ValueError,
        r"statistics.mean has shape \[2, 2\], but \[_, G\] with G = 4",
    ),
    "samples of statistics": (
        {"statistics": GroupNormStatistics.from_variance(torch.zeros(3, 4), torch.ones(3, 4))},
        ValueError,
        "statistics.mean is of 3 samples, but 1 or the 2 of x",
    ),
    "statistics that learn": (
        {
            "statistics": GroupNormStatistics(
                torch.zeros(2, 4, requires_grad=True), STATISTICS.m2, 1
            )
        },
        ValueError,
        "statistics.mean wants a gradient, but given statistics are constants; detach them",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("function", [group_norm_silu, group_norm_silu_reference])
def test_bad_input_is_one_clear_sentence(
    function: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"x": torch.zeros(2, 8, 5), "groups": 4, **change}
    with pytest.raises(error, match=message) as caught:
        function(**arguments)
    assert str(caught.value).startswith("group_norm_silu: ")
    assert "\n" not in str(caught.value)


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 8, 0\], but one position at least"):
        group_norm_statistics(torch.zeros(2, 8, 0), 4)
    with pytest.raises(ValueError, match="parts is empty; give one part at least"):
        GroupNormStatistics.combine([])


RAW_BAD = {
    "dtype": (0, torch.zeros(2, 8, 3).int(), "x must be a floating-point tensor"),
    "groups": (1, 3, "groups is 3, but it must divide the 8 channels"),
    "weight": (2, torch.zeros(7), r"weight and bias must be floating-point tensors \[C\]"),
    "add": (4, torch.zeros(1, 8), r"add, scale and shift must be floating-point tensors \[N, C\]"),
    "mean alone": (7, torch.zeros(2, 4), "mean and rstd must both be given"),
}


@pytest.mark.parametrize(("position", "value", "message"), RAW_BAD.values(), ids=RAW_BAD.keys())
def test_the_raw_operator_checks_for_itself(position: int, value: Any, message: str) -> None:
    arguments: list[Any] = [torch.zeros(2, 8, 3), 4, *[None] * 7, 1e-5, True]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssldiff.group_norm_silu(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "groups"), ALL)
def test_on_a_gpu_result_and_gradients_are_those_of_the_cpu(
    shape: tuple[int, ...], groups: int
) -> None:
    x, seed, parameters = torch.randn(shape), torch.randn(shape), map_parameters(shape)
    there = {k: v.cuda() for k, v in parameters.items()}
    for maps in layouts(x).values():
        expected = gradients(group_norm_silu, maps, groups, seed, **parameters)
        made = gradients(group_norm_silu, maps.cuda(), groups, seed.cuda(), **there)
        again = gradients(group_norm_silu, maps.cuda(), groups, seed.cuda(), **there)
        assert all(torch.equal(a, b) for a, b in zip(made, again))
        for grad, wanted in zip(made, expected):
            torch.testing.assert_close(grad.cpu(), wanted, rtol=1e-5, atol=1e-4)
