# SPDX-License-Identifier: Apache-2.0
"""token_attention against its reference, and its gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from operator_cases import TOKENS, assert_close, in_float64, token_case
from ssldiff_fast import _C
from ssldiff_fast.ops import few_tokens, token_attention, token_attention_reference
from ssldiff_fast.ops.token_attention import MAX_TOKENS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ALL = [pytest.param(shape, id=name) for name, shape in TOKENS.items()]
SOME = [pytest.param(TOKENS[name], id=name) for name in ("one-token", "heads", "eight-tokens")]


def tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in case.items() if isinstance(value, Tensor)}


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ALL)
def test_it_agrees_with_the_reference_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = token_case(shape, dtype)
    expected = token_attention_reference(**in_float64(case))
    for actual, right in zip(token_attention(**case), expected):
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert_close(actual, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_may_be_float32_beside_a_half(dtype: torch.dtype) -> None:
    case = token_case(TOKENS["heads"])
    case["x"] = case["x"].to(dtype)
    expected = token_attention_reference(**in_float64(case))
    for actual, right in zip(token_attention(**case), expected):
        assert actual.dtype == dtype
        assert_close(actual, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_adds_its_values_to_the_bit(dtype: torch.dtype) -> None:
    case = token_case(TOKENS["one-token"], dtype)
    y, _ = token_attention(**case)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(y, (case["x"].to(exact) + case["values"].to(exact)[:, None]).to(dtype))


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_it_is_multi_head_attention_between_two_layer_norms(tokens: int) -> None:
    # The published order of operations, and the vectors of the docstring, in float64.
    n, length, c, heads, width, context = 2, 6, 10, 3, 4, 7
    x, given = torch.randn(n, length, c).double(), torch.randn(n, tokens, context).double()
    w_q, w_k, w_v, w_o, b_o, *norms = (
        torch.randn(size).double()
        for size in [(12, c), (12, context), (12, context), (c, 12), (c,), (c,), (c,), (c,), (c,)]
    )

    def split(y: Tensor) -> Tensor:
        return y.unflatten(-1, (heads, width)).transpose(1, 2)

    layer_norm = torch.nn.functional.layer_norm
    queries = split(layer_norm(x, (c,), norms[0], norms[1]) @ w_q.T)
    out = torch.nn.functional.scaled_dot_product_attention(
        queries, split(given @ w_k.T), split(given @ w_v.T)
    )
    y = x + out.transpose(1, 2).flatten(2) @ w_o.T + b_o

    if tokens == 1:
        vectors: dict[str, Any] = {"values": (given @ w_v.T @ w_o.T + b_o)[:, 0]}
    else:
        by_head = [
            (w_o[:, rows], w_q[rows], given @ w_k[rows].T, given @ w_v[rows].T)
            for rows in (slice(h * width, (h + 1) * width) for h in range(heads))
        ]
        u = torch.cat([k @ q / math.sqrt(width) for _, q, k, _ in by_head], 1)
        values = torch.cat([v @ o.T + b_o / heads for o, _, _, v in by_head], 1)
        vectors = {"values": values, "keys": norms[0] * u, "offsets": u @ norms[1], "heads": heads}
    made = token_attention(x, norm_weight=norms[2], norm_bias=norms[3], **vectors)
    torch.testing.assert_close(made[0], y)
    torch.testing.assert_close(made[1], layer_norm(y, (c,), norms[2], norms[3]))


def test_without_offsets_they_are_zero() -> None:
    case = token_case(TOKENS["heads"])
    zeros = token_attention(**{**case, "offsets": torch.zeros_like(case["offsets"])})
    for function in (token_attention, token_attention_reference):
        for actual, right in zip(function(**{**case, "offsets": None}), zeros):
            torch.testing.assert_close(actual, right)


def test_logits_far_apart_do_not_overflow() -> None:
    case = token_case(TOKENS["two-tokens"])
    case["offsets"] = torch.tensor([[1e4, -1e4], [-1e30, 1e30]])
    y, z = token_attention(**case)
    expected = case["x"] + torch.stack((case["values"][0, 0], case["values"][1, 1]))[:, None]
    assert torch.equal(y, expected)
    assert bool(z.isfinite().all())


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_large_mean_does_not_cancel(scale: float) -> None:
    case = token_case(TOKENS["two-tokens"])
    case["x"] = (case["x"] + 1000) * scale
    expected = token_attention_reference(**in_float64(case))
    # One rounding of the row, 6e-8 of 1000 deviations, is what float32 can represent.
    torch.testing.assert_close(token_attention(**case)[1].double(), expected[1], rtol=0, atol=2e-3)


def test_a_nan_stays_in_its_row() -> None:
    case = token_case(TOKENS["heads"])
    case["x"][1, 2, 5] = torch.nan
    for made in token_attention(**case):
        rows = made.isnan().any(-1)
        assert rows.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("shape", SOME)
def test_every_layout_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    case = token_case(shape)
    expected = token_attention(**case)
    flipped = {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in tensors(case).items()}
    sliced = {n: torch.cat((t, t), -1)[..., : t.shape[-1]] for n, t in tensors(case).items()}
    every_other = {n: t.repeat_interleave(2, 0)[::2] for n, t in tensors(case).items()}
    for strided in (flipped, sliced, every_other):
        assert any(not tensor.is_contiguous() for tensor in strided.values())
        assert_equal(token_attention(**{**case, **strided}), expected)


def test_feature_maps_in_channels_last_are_read_as_they_are() -> None:
    maps = torch.randn(2, 37, 3, 4).contiguous(memory_format=torch.channels_last)
    x = maps.permute(0, 2, 3, 1).flatten(1, 2)
    assert x.data_ptr() == maps.data_ptr()
    case = token_case((2, 12, 37, 1, 2))
    expected = token_attention(**{**case, "x": x.clone()})
    assert_equal(token_attention(**{**case, "x": x}), expected)


def test_vectors_expanded_over_the_windows_are_as_good_as_copies() -> None:
    case = token_case((3, 4, 40, 2, 2))
    shared = {n: case[n][:1].expand_as(case[n]) for n in ("values", "keys", "offsets")}
    copies = {name: tensor.contiguous() for name, tensor in shared.items()}
    assert_equal(token_attention(**{**case, **shared}), token_attention(**{**case, **copies}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("shape", SOME)
def test_every_instruction_set_gives_the_same_bits(
    shape: tuple[int, ...], path: str, dtype: torch.dtype
) -> None:
    case = token_case(shape, dtype)
    _C.set_cpu_path("portable")
    try:
        expected = token_attention(**case)
        try:
            _C.set_cpu_path(path)
        except ValueError:
            pytest.skip(f"this processor cannot run {path}")
        assert_equal(token_attention(**case), expected)
    finally:
        _C.set_cpu_path("best")


def test_every_thread_count_and_every_batch_gives_the_same_bits() -> None:
    threads = torch.get_num_threads()
    case = token_case((3, 500, 96, 2, 3))
    try:
        torch.set_num_threads(1)
        expected = token_attention(**case)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_equal(token_attention(**case), expected)
    finally:
        torch.set_num_threads(threads)
    windowed = ("x", "values", "keys", "offsets")
    for n in range(3):
        alone = {**case, **{name: case[name][n : n + 1] for name in windowed}}
        assert_equal(token_attention(**alone), tuple(out[n : n + 1] for out in expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SOME)
def test_every_number_of_the_outputs_is_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = token_case(shape, dtype)
    torch.use_deterministic_algorithms(True)  # PyTorch fills new memory with NaN then
    try:
        assert bool(case["x"].new_empty(case["x"].shape).isnan().all())
        made = token_attention(**case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(out.isfinite().all()) for out in made)


@pytest.mark.parametrize("shape", [(2, 3, 5, 1, 1), (2, 3, 5, 1, 2), (2, 3, 4, 2, 3)])
def test_gradcheck_passes(shape: tuple[int, ...]) -> None:
    case = {
        n: v.requires_grad_() if isinstance(v, Tensor) else v
        for n, v in in_float64(token_case(shape)).items()
    }
    names = list(tensors(case))
    assert torch.autograd.gradcheck(
        lambda *values: token_attention(**{**case, **dict(zip(names, values))}),
        [case[name] for name in names],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ALL)
def test_the_gradients_are_those_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = token_case(shape, dtype)
    seeds = [torch.randn(case["x"].shape).to(dtype) for _ in range(2)]
    grads = []
    for function, arguments in (
        (token_attention, case),
        (token_attention, case),
        (token_attention_reference, in_float64(case)),
    ):
        leaves = {n: t.clone().requires_grad_() for n, t in tensors(arguments).items()}
        y, z = function(**{**arguments, **leaves})
        ((y * seeds[0]).sum() + (z * seeds[1]).sum()).backward()
        grads.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.dtype == dtype
        assert torch.equal(grad, grads[1][name]), name
        # Sums of up to a thousand terms, each rounded by 6e-8 in float32; rounded once to bf16.
        rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (1.6e-2, 1e-4)
        torch.testing.assert_close(grad.double(), grads[2][name], rtol=rtol, atol=atol)


def test_either_output_alone_gives_gradients() -> None:
    for used in (0, 1):
        case = in_float64(token_case(TOKENS["heads"]))
        grads = []
        for function in (token_attention, token_attention_reference):
            leaves = {n: t.clone().requires_grad_() for n, t in tensors(case).items()}
            function(**{**case, **leaves})[used].square().sum().backward()
            grads.append({n: leaf.grad for n, leaf in leaves.items()})
        for name, grad in grads[0].items():
            expected = grads[1][name]
            assert grad is not None
            torch.testing.assert_close(
                grad, torch.zeros_like(grad) if expected is None else expected
            )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 1, 1), (2, 3, 4, 2, 3)])
def test_opcheck_passes(shape: tuple[int, ...], grad: bool) -> None:
    case = token_case(shape)
    names = ("x", "values", "norm_weight", "norm_bias", "keys", "offsets")
    values = [case[name].requires_grad_(grad) if name in case else None for name in names]
    torch.library.opcheck(torch.ops.ssldiff.token_attention.default, (*values, case["heads"], 1e-5))


def test_it_stays_one_node_under_compile() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    case = token_case(TOKENS["heads"])
    compiled = torch.compile(
        lambda x: token_attention(**{**case, "x": 2 * x})[1] + 1, fullgraph=True, backend=backend
    )
    expected = token_attention(**{**case, "x": 2 * case["x"]})[1] + 1
    assert torch.equal(compiled(case["x"]), expected)
    nodes = [n for g in graphs for n in g.graph.nodes if "token_attention" in str(n.target)]
    assert len(nodes) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_token_always_pays_and_many_never(device: str) -> None:
    assert few_tokens(32, 8, 1, device)
    assert few_tokens(384, 1, 2, device)
    assert few_tokens(384, 1, MAX_TOKENS, device)
    assert not few_tokens(384, 1, MAX_TOKENS + 1, device)
    assert not few_tokens(384, 8, 77, device)
    assert not few_tokens(32, 8, 4, device)
    assert few_tokens(384, 1, 2, device, torch.bfloat16)
    assert few_tokens(384, 1, 8, device, torch.bfloat16) == (device == "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ALL)
def test_on_a_gpu_it_agrees_with_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = token_case(shape, dtype)
    there = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in case.items()}
    leaves = {n: t.requires_grad_() for n, t in tensors(there).items()}
    made = token_attention(**{**there, **leaves})
    for actual, right in zip(made, token_attention_reference(**in_float64(case))):
        assert_close(actual.detach().cpu(), right)
    total = made[0].sum() + made[1].square().sum()
    first = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    assert_equal(first, torch.autograd.grad(total, list(leaves.values())))


@pytest.mark.gpu
def test_on_a_gpu_a_width_that_does_not_fit_is_an_error() -> None:
    case = {n: v.cuda() for n, v in tensors(token_case((1, 1, 20_000, 1, 1))).items()}
    if _C.CUDA_PROBLEM is not None:
        pytest.skip("Triton has no such limit")
    with pytest.raises(RuntimeError, match="a width of 20000 with 1 vectors takes"):
        token_attention(**case)
