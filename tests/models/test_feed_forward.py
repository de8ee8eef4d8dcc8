# SPDX-License-Identifier: Apache-2.0
"""The feed-forward as one operator against its layers in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_inputs import relative_error
from ssldiff_fast import _C
from ssldiff_fast.models import feed_forward as module
from ssldiff_fast.models.feed_forward import FeedForward, is_fused

SHAPES = {
    "one-row": (1, 1, 8),
    "odd-rows": (1, 13, 32),
    "two-blocks-and-a-width-of-no-panel": (3, 19, 40),
    "wide": (1, 70, 160),
}


def exact(ff: FeedForward, x: Tensor) -> Tensor:
    proj, back = ff.net[0].proj, ff.net[2]
    assert isinstance(proj, nn.Linear)
    assert isinstance(back, nn.Linear)
    values, gates = F.linear(x.double(), proj.weight.double(), proj.bias.double()).chunk(2, -1)
    return F.linear(values * F.gelu(gates), back.weight.double(), back.bias.double())


@pytest.fixture(params=["portable", "avx2", "avx512"])
def cpu_path(request: Any) -> Any:
    try:
        _C.set_cpu_path(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_cpu_path("best")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_it_is_its_layers(cpu_path: str, shape: tuple[int, int, int]) -> None:
    x, add, ff = torch.randn(shape), torch.randn(shape), FeedForward(shape[-1])
    expected = exact(ff, x)
    assert is_fused(ff, x, add) == (cpu_path != "portable")
    assert relative_error(module.fused(ff, x).double(), expected) < 1e-6
    assert relative_error(module.fused(ff, x, add=add).double(), expected + add) < 1e-6


@torch.no_grad()
def test_neither_threads_nor_the_rows_beside_it_change_a_bit() -> None:
    x, ff = torch.randn(2, 61, 48), FeedForward(48)
    expected = module.fused(ff, x)
    assert torch.equal(module.fused(ff, x[1:, 17:40].contiguous()), expected[1:, 17:40])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(module.fused(ff, x), expected)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_changed_weights_are_packed_anew() -> None:
    x, ff = torch.randn(1, 5, 32), FeedForward(32)
    ff(x)
    for parameter in ff.parameters():
        parameter.mul_(1.5)
        assert relative_error(ff(x).double(), exact(ff, x)) < 1e-6
    ff.load_state_dict(FeedForward(32).state_dict())
    assert relative_error(ff(x).double(), exact(ff, x)) < 1e-6
    ff.to(torch.bfloat16).to(torch.float32)
    assert relative_error(ff(x).double(), exact(ff, x)) < 1e-6


def test_everything_else_goes_by_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fused = module.fused
    monkeypatch.setattr(module, "fused", lambda *a, **o: calls.append("fused") or fused(*a, **o))
    x, ff = torch.randn(2, 5, 32, requires_grad=True), FeedForward(32)
    ff(x, add=x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        strided = ff(x[:, ::2], add=x[:, ::2])
        with torch.autocast("cpu", torch.bfloat16):
            ff(x)
        half = copy.deepcopy(ff).to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16
        ff.net[1] = nn.Dropout(0.5)
        ff.train()(x)
        assert calls == []
        out = ff.eval()(x, add=x)
    assert calls == ["fused"]
    torch.testing.assert_close(strided, out[:, ::2])


def arguments(**change: Any) -> tuple[Any, ...]:
    ff = FeedForward(8)
    proj, back = ff.net[0].proj, ff.net[2]
    assert isinstance(proj, nn.Linear)
    assert isinstance(back, nn.Linear)
    inward, bias, outward = module._pack(proj.weight, proj.bias, back.weight)
    given: dict[str, Any] = {
        "x": torch.randn(3, 8),
        "inward": inward,
        "bias": bias,
        "outward": outward,
        "outward_bias": back.bias.detach(),
        "add": torch.randn(3, 8),
    }
    return tuple({**given, **change}.values())


def test_the_operator_passes_opcheck() -> None:
    checks = ("test_schema", "test_faketensor")
    for change in ({}, {"add": None}, {"x": torch.zeros(0, 8), "add": None}):
        operator = torch.ops.ssldiff.feed_forward
        torch.library.opcheck(operator, arguments(**change), test_utils=checks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 3, 8)}, "x must be"),
        ({"x": torch.zeros(3, 8).double()}, "x must be"),
        ({"x": torch.zeros(8, 3).mT}, "x must be"),
        ({"x": torch.zeros(3, 7)}, "inward must be"),
        ({"inward": torch.zeros(1, 8, 32)}, "inward must be"),
        ({"bias": torch.zeros(63)}, "inward must be"),
        ({"outward": torch.zeros(1, 33, 32)}, "outward must be"),
        ({"outward_bias": torch.zeros(33)}, "outward must be"),
        ({"add": torch.zeros(2, 8)}, "add must be"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_raw_operator_checks_for_itself(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        torch.ops.ssldiff.feed_forward(*arguments(**change))
