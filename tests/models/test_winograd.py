# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions by Winograd's transforms against direct ones in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_inputs import fill, relative_error
from ssldiff_fast import _C
from ssldiff_fast.models import winograd as module
from ssldiff_fast.models.winograd import LEAST_CHANNELS, Conv3x3, packed, serves, winograd

# Measured: 1.8e-6 for 129 channels, where a direct convolution is within 2e-7.
TOLERANCE = 3e-6
# Measured: 2e-3 and 3e-4, as results are stored.
HALVES = {torch.bfloat16: 4e-3, torch.float16: 6e-4}

SHAPES = {
    "one-position": (1, 1, 1, 1, 1),
    "odd-sides": (2, 3, 5, 7, 4),
    "one-row": (1, 16, 8, 1, 9),
    "one-column": (1, 8, 16, 9, 1),
    "over-a-panel-of-channels": (1, 65, 129, 4, 6),
    "many-tiles": (1, 20, 36, 33, 65),
    "many-maps": (5, 32, 32, 8, 8),
}


def exact(conv: Conv3x3, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(x.double(), conv.weight.double(), bias, padding=1)


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
def test_it_is_the_convolution_within_float32s_rounding(
    cpu_path: str, shape: tuple[int, int, int, int, int]
) -> None:
    count, channels, out_channels, height, width = shape
    conv = fill(Conv3x3(channels, out_channels))
    x = torch.randn(count, channels, height, width)
    add = torch.randn(count, out_channels, height, width)
    expected = exact(conv, x)
    assert relative_error(winograd(x, conv).double(), expected) < TOLERANCE
    assert relative_error(winograd(x, conv, add=add).double(), expected + add) < TOLERANCE


@pytest.mark.parametrize("dtype", list(HALVES), ids=str)
@torch.no_grad()
def test_half_precision_is_rounded_at_its_ends_alone(cpu_path: str, dtype: torch.dtype) -> None:
    conv = fill(Conv3x3(37, 65)).to(dtype)
    x, add = torch.randn(2, 37, 5, 9).to(dtype), torch.randn(2, 65, 5, 9).to(dtype)
    out = winograd(x, conv, add=add)
    assert out.dtype == dtype
    assert relative_error(out.double(), exact(conv, x) + add) < HALVES[dtype]
    wide = fill(Conv3x3(37, 65))
    wide.load_state_dict(conv.state_dict())
    assert torch.equal(out, winograd(x.float(), wide, add=add.float()).to(dtype))


@torch.no_grad()
def test_what_is_not_finite_stays_so_in_half_precision() -> None:
    conv = fill(Conv3x3(32, 32)).to(torch.bfloat16)
    x = torch.zeros(1, 32, 8, 8, dtype=torch.bfloat16)
    x[0, 0, 0, 0] = torch.nan
    out = winograd(x, conv)
    assert out[..., :2, :2].isnan().all()
    assert out[..., 4:, 4:].isfinite().all()


@torch.no_grad()
def test_maps_may_be_enlarged_on_the_way(cpu_path: str) -> None:
    conv, x = fill(Conv3x3(24, 40)), torch.randn(2, 24, 5, 3)
    add = torch.randn(2, 40, 10, 6)
    enlarged = F.interpolate(x, scale_factor=2, mode="nearest")
    out = winograd(x, conv, zoom=2, add=add)
    assert relative_error(out.double(), exact(conv, enlarged) + add) < TOLERANCE
    assert torch.equal(out, winograd(enlarged, conv, add=add))


@torch.no_grad()
def test_neither_layout_nor_threads_nor_the_maps_beside_it_change_a_bit() -> None:
    conv, x = fill(Conv3x3(40, 64)), torch.randn(9, 40, 16, 20)
    expected = winograd(x, conv)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(winograd(x.to(memory_format=torch.channels_last), conv), expected)
    for first, last in ((0, 1), (3, 8), (8, 9)):
        assert torch.equal(winograd(x[first:last], conv), expected[first:last])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(winograd(x, conv), expected)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_a_convolution_without_bias_and_no_maps_at_all() -> None:
    conv = fill(Conv3x3(8, 8))
    assert winograd(torch.zeros(0, 8, 4, 4), conv).shape == (0, 8, 4, 4)
    conv.bias = None
    x, add = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    assert relative_error(winograd(x, conv, add=add).double(), exact(conv, x) + add) < TOLERANCE


@torch.no_grad()
def test_changed_weights_are_transformed_anew() -> None:
    conv, x = fill(Conv3x3(8, 8)), torch.randn(1, 8, 4, 4)
    first = winograd(x, conv)
    conv.weight.mul_(2)
    assert relative_error(winograd(x, conv).double(), exact(conv, x)) < TOLERANCE
    conv.load_state_dict({"weight": conv.weight / 2, "bias": conv.bias})
    torch.testing.assert_close(winograd(x, conv), first)
    conv.to(torch.float64).to(torch.float32)
    torch.testing.assert_close(winograd(x, conv), first)
    conv.weight.data = conv.weight * 3
    assert relative_error(winograd(x, conv).double(), exact(conv, x)) < TOLERANCE


def test_only_inference_of_wide_layers_goes_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(module, "winograd", lambda x, conv, **_: calls.append("winograd") or x)
    monkeypatch.setattr(module, "_halves", lambda: (torch.bfloat16,))
    wide, narrow = (Conv3x3(width, width) for width in (LEAST_CHANNELS, LEAST_CHANNELS - 1))
    assert serves(wide)
    assert not serves(narrow)
    x = torch.zeros(1, LEAST_CHANNELS, 2, 2)
    wide(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wide(x)
    with torch.no_grad():
        narrow(x[:, 1:])
        wide.to(torch.float64)(x.double())
        assert calls == []
        wide.to(torch.float32)(x)
        wide.to(torch.bfloat16)(x.bfloat16())
        assert calls == ["winograd"] * 2
        monkeypatch.setattr(module, "_halves", lambda: ())  # as on a processor with AMX
        wide(x.bfloat16())
    assert calls == ["winograd"] * 2


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("channels", [4, LEAST_CHANNELS])
def test_adding_a_map_and_enlarging_are_the_same_in_training(channels: int, grad: bool) -> None:
    conv, x = Conv3x3(channels, channels), torch.randn(1, channels, 4, 4)
    add, wide = torch.randn(1, channels, 4, 4), torch.randn(1, channels, 8, 8)
    kept = add.clone()
    enlarged = F.interpolate(x, scale_factor=2)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(conv(x, add=add), conv(x) + add, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            conv(x, zoom=2, add=wide), conv(enlarged) + wide, rtol=1e-5, atol=1e-5
        )
    assert torch.equal(add, kept)


def arguments(**change: Any) -> tuple[Any, ...]:
    given: dict[str, Any] = {
        "maps": torch.randn(2, 3, 5, 4),
        "filters": packed(torch.randn(7, 4, 3, 3)),
        "out_channels": 7,
        "zoom": 1,
        "bias": torch.randn(7),
        "add": torch.randn(2, 3, 5, 7),
    }
    return tuple({**given, **change}.values())


def test_the_operator_passes_opcheck() -> None:
    checks = ("test_schema", "test_faketensor")
    for change in ({}, {"zoom": 2, "bias": None, "add": None}):
        torch.library.opcheck(torch.ops.ssldiff.winograd, arguments(**change), test_utils=checks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"maps": torch.zeros(2, 3, 4)}, "maps must be contiguous"),
        ({"maps": torch.zeros(2, 3, 5, 4, dtype=torch.float64)}, "maps must be contiguous"),
        ({"maps": torch.zeros(2, 3, 5, 4, dtype=torch.float16)}, "maps must be contiguous"),
        ({"maps": torch.zeros(2, 3, 5, 4, dtype=torch.bfloat16)}, "add must be"),
        ({"maps": torch.zeros(2, 4, 3, 5).permute(0, 2, 3, 1)}, "maps must be contiguous"),
        ({"zoom": 3}, "zoom 1 or 2"),
        ({"filters": packed(torch.zeros(7, 3, 3, 3))}, "filters must be"),
        ({"filters": packed(torch.zeros(33, 4, 3, 3))}, "filters must be"),
        ({"filters": packed(torch.zeros(7, 4, 3, 3))[:16]}, "filters must be"),
        ({"out_channels": 0}, "filters must be"),
        ({"bias": torch.zeros(2)}, "bias must be"),
        ({"add": torch.zeros(2, 3, 4, 7)}, "add must be"),
        ({"add": torch.zeros(2, 3, 5, 7).double()}, "add must be"),
        ({"zoom": 2}, "add must be"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_raw_operator_checks_for_itself(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        torch.ops.ssldiff.winograd(*arguments(**change))
