# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions by Winograd's transforms against direct ones in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from golden_inputs import fill, relative_error
from ssldiff_fast import _C
from ssldiff_fast.models import winograd as module
from ssldiff_fast.models.winograd import LEAST_CHANNELS, Conv3x3, serves, winograd

SHAPES = {
    "one-position": (1, 1, 1, 1, 1),
    "odd-sides": (2, 3, 5, 7, 4),
    "one-row": (1, 16, 8, 1, 9),
    "one-column": (1, 8, 16, 9, 1),
    "over-a-block-of-channels": (1, 65, 129, 4, 6),
    "many-maps": (5, 32, 32, 8, 8),
}


def exact(conv: Conv3x3, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    return torch.nn.functional.conv2d(x.double(), conv.weight.double(), bias, padding=1)


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
def test_it_is_the_convolution_as_exactly_as_a_direct_one(
    cpu_path: str, shape: tuple[int, int, int, int, int]
) -> None:
    count, channels, out_channels, height, width = shape
    conv = fill(Conv3x3(channels, out_channels))
    x = torch.randn(count, channels, height, width)
    add = torch.randn(count, out_channels, height, width)
    expected = exact(conv, x)
    assert relative_error(winograd(x, conv).double(), expected) < 1e-6
    assert relative_error(winograd(x, conv, add=add).double(), expected + add) < 1e-6


@torch.no_grad()
def test_layout_and_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = fill(Conv3x3(16, 32)), torch.randn(5, 16, 6, 10)
    expected = winograd(x, conv)
    assert torch.equal(winograd(x.to(memory_format=torch.channels_last), conv), expected)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    torch.testing.assert_close(winograd(x, conv), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_convolution_without_bias_and_no_maps_at_all() -> None:
    conv = fill(Conv3x3(8, 8))
    assert winograd(torch.zeros(0, 8, 4, 4), conv).shape == (0, 8, 4, 4)
    conv.bias = None
    x, add = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    assert relative_error(winograd(x, conv, add=add).double(), exact(conv, x) + add) < 1e-6


@torch.no_grad()
def test_changed_weights_are_transformed_anew() -> None:
    conv, x = fill(Conv3x3(8, 8)), torch.randn(1, 8, 4, 4)
    first = winograd(x, conv)
    conv.weight.mul_(2)
    assert relative_error(winograd(x, conv).double(), exact(conv, x)) < 1e-6
    conv.load_state_dict({"weight": conv.weight / 2, "bias": conv.bias})
    torch.testing.assert_close(winograd(x, conv), first)


def test_only_inference_in_float32_of_wide_layers_goes_that_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(module, "winograd", lambda x, conv, add=None: calls.append("winograd") or x)
    wide, narrow = (Conv3x3(width, width) for width in (LEAST_CHANNELS, LEAST_CHANNELS - 1))
    assert serves(wide)
    assert not serves(narrow)
    x = torch.zeros(1, LEAST_CHANNELS, 2, 2)
    wide(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wide(x)
    with torch.no_grad():
        narrow(x[:, 1:])
        wide.to(torch.bfloat16)(x.bfloat16())
        assert calls == []
        wide.to(torch.float32)(x)
    assert calls == ["winograd"]


@pytest.mark.parametrize("grad", [True, False])
def test_adding_a_map_is_the_same_in_training(grad: bool) -> None:
    conv, x, add = Conv3x3(4, 4), torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    kept = add.clone()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(conv(x, add=add), conv(x) + add)
    assert torch.equal(add, kept)


def test_the_transforms_pass_opcheck() -> None:
    maps = torch.randn(2, 3, 5, 4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ssldiff.winograd_tiles, (maps,), test_utils=checks)
    products = list(torch.randn(16, 2 * 2 * 3, 4).unbind())
    arguments = (products, torch.randn(4), maps, [2, 3, 5])
    torch.library.opcheck(torch.ops.ssldiff.winograd_maps, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(2, 3, 4),), "maps must be contiguous"),
        ((torch.zeros(1, 2, 2, 3, dtype=torch.float64),), "maps must be contiguous"),
        ((torch.zeros(1, 3, 2, 2).permute(0, 2, 3, 1),), "maps must be contiguous"),
    ],
)
def test_the_raw_tiles_check_for_themselves(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        torch.ops.ssldiff.winograd_tiles(*arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"products": [torch.zeros(4, 3)] * 15}, "16 of"),
        ({"products": [torch.zeros(3, 3)] * 16}, "row for each tile"),
        ({"products": [torch.zeros(4, 3).double()] * 16}, "float32"),
        ({"bias": torch.zeros(2)}, "bias must be"),
        ({"add": torch.zeros(1, 4, 3, 4)}, "add must be"),
        ({"sizes": [1, 4]}, "sizes N, H and W"),
        ({"sizes": [1, 0, 4]}, "sizes N, H and W"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_raw_maps_check_for_themselves(change: dict[str, Any], words: str) -> None:
    given = {"products": [torch.zeros(4, 3)] * 16, "bias": None, "add": None, "sizes": [1, 4, 4]}
    with pytest.raises(RuntimeError, match=words):
        torch.ops.ssldiff.winograd_maps(*{**given, **change}.values())
