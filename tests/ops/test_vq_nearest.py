# SPDX-License-Identifier: Apache-2.0
"""vq_nearest against its reference, and what it says to bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from operator_cases import assert_close
from ssldiff_fast import _C
from ssldiff_fast.ops import vq_nearest, vq_nearest_reference

SHAPES = {  # M, K, D
    "one": (1, 1, 1),
    "odd": (19, 7, 3),
    "a-block": (64, 33, 3),
    "past-a-block": (65, 256, 3),
    "width-four": (31, 100, 4),
    "width-two": (31, 100, 2),
    "wide": (17, 50, 37),
    "no-vectors": (0, 5, 3),
    "several-blocks": (1000, 257, 3),
}
ALL = [pytest.param(shape, id=name) for name, shape in SHAPES.items()]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("shape", ALL)
def test_it_finds_what_the_reference_finds(
    shape: tuple[int, int, int], path: str, dtype: torch.dtype
) -> None:
    m, k, d = shape
    # Multiples of 1/8: distances are exact in both, so that ties are ties and nothing is near one.
    z = (torch.randn(m, d) * 8).round().to(dtype) / 8
    codes = (torch.randn(k, d) * 8).round().to(dtype) / 8
    try:
        _C.set_cpu_path(path)
    except ValueError:
        pytest.skip(f"this processor cannot run {path}")
    try:
        vectors, indices = vq_nearest(z, codes)
    finally:
        _C.set_cpu_path("best")
    expected_vectors, expected_indices = vq_nearest_reference(z, codes)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(vectors, expected_vectors)


def test_random_vectors_find_a_code_at_the_smallest_distance() -> None:
    z, codes = torch.randn(500, 3), torch.randn(300, 3)
    vectors, indices = vq_nearest(z, codes)
    assert torch.equal(vectors, codes[indices])
    distances = (z.double()[:, None] - codes.double()).square().sum(-1)
    found = distances.gather(1, indices[:, None])[:, 0]
    assert_close(found, distances.min(1).values)


def test_ties_go_to_the_lowest_index() -> None:
    codes = torch.tensor([[5.0, 0, 0], [1, 0, 0], [-1, 0, 0], [1, 0, 0]])
    z = torch.tensor([[0.0, 0, 0], [1, 0, 0], [-3, 0, 0]])
    assert vq_nearest(z, codes)[1].tolist() == [1, 1, 2]


def test_nan_never_wins() -> None:
    nan = torch.nan
    codes = torch.tensor([[nan, 0, 0], [4.0, 0, 0]])
    z = torch.tensor([[0.0, 0, 0], [nan, 0, 0]])
    for function in (vq_nearest, vq_nearest_reference):
        assert function(z, codes)[1].tolist() == [1, 0]


def test_strided_inputs_give_the_same_bits() -> None:
    z, codes = torch.randn(3, 50), torch.randn(40, 6)
    expected = vq_nearest(z.t().contiguous(), codes[:, ::2].contiguous())
    for got, wanted in zip(vq_nearest(z.t(), codes[:, ::2]), expected):
        assert torch.equal(got, wanted)


def test_the_gradient_passes_straight_through_to_z() -> None:
    z = torch.randn(20, 3, requires_grad=True)
    codes = torch.randn(9, 3, requires_grad=True)
    seed = torch.randn(20, 3)
    for function in (vq_nearest, vq_nearest_reference):
        z.grad = None
        vectors, indices = function(z, codes)
        assert not indices.requires_grad
        (vectors * seed).sum().backward()
        assert torch.equal(z.grad, seed)
        assert codes.grad is None


def test_opcheck_passes() -> None:
    arguments = (torch.randn(20, 3), torch.randn(9, 3))
    torch.library.opcheck(torch.ops.ssldiff.vq_nearest.default, arguments)
    # A gradient that passes straight through is none of the function's own, so there is no
    # gradcheck, and the check of autograd through AOT compares it with itself.
    arguments[0].requires_grad_()
    torch.library.opcheck(torch.ops.ssldiff.vq_nearest.default, arguments)


def test_it_stays_one_node_under_compile() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    z, codes = torch.randn(20, 3), torch.randn(9, 3)
    compiled = torch.compile(lambda x: vq_nearest(x, codes)[1], fullgraph=True, backend=backend)
    assert torch.equal(compiled(z), vq_nearest(z, codes)[1])
    assert sum("vq_nearest" in str(n.target) for g in graphs for n in g.graph.nodes) == 1


BAD = {
    "no tensor": ([1.0], torch.zeros(2, 3), TypeError, "z must be a torch.Tensor"),
    "rank": (torch.zeros(2, 3, 1), torch.zeros(2, 3), ValueError, r"z has shape \[2, 3, 1\], but"),
    "width": (
        torch.zeros(2, 3),
        torch.zeros(2, 4),
        ValueError,
        r"codes has shape \[2, 4\], but \[K, D\] with D = 3 was expected",
    ),
    "half": (torch.zeros(2, 3).half(), torch.zeros(2, 3), TypeError, "z is float16, but float32"),
    "mixed": (torch.zeros(2, 3), torch.zeros(2, 3).double(), TypeError, "codes is float64, but"),
    "empty book": (torch.zeros(2, 3), torch.zeros(0, 3), ValueError, r"codes has shape \[0, 3\]"),
    "no width": (torch.zeros(2, 0), torch.zeros(2, 0), ValueError, r"codes has shape \[2, 0\]"),
    "device": (
        torch.zeros(2, 3),
        torch.zeros(2, 3, device="meta"),
        ValueError,
        "codes is on meta, but z is on cpu",
    ),
}


@pytest.mark.parametrize(("z", "codes", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("function", [vq_nearest, vq_nearest_reference])
def test_bad_input_is_one_clear_sentence(
    function: Any, z: Any, codes: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        function(z, codes)
    assert str(caught.value).startswith("vq_nearest: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("z", "codes", "message"),
    [
        (torch.zeros(2, 3).half(), torch.zeros(2, 3).half(), "both be float32 or both float64"),
        (torch.zeros(2, 3), torch.zeros(2, 4), "with the same D"),
        (torch.zeros(2), torch.zeros(2, 4), "with the same D"),
        (torch.zeros(2, 3), torch.zeros(0, 3), "between 1 and 2"),
    ],
)
def test_the_raw_operator_checks_for_itself(z: Any, codes: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssldiff.vq_nearest(z, codes)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ALL)
def test_on_a_gpu_it_finds_what_the_reference_finds(shape: tuple[int, int, int]) -> None:
    m, k, d = shape
    z = (torch.randn(m, d) * 8).round() / 8
    codes = (torch.randn(k, d) * 8).round() / 8
    _, indices = vq_nearest(z.cuda(), codes.cuda())
    assert torch.equal(indices.cpu(), vq_nearest_reference(z, codes)[1])
