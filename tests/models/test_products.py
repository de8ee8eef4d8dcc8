# SPDX-License-Identifier: Apache-2.0
"""Products and attention by oneDNN, and what a guided pair shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_inputs import UNET_A, fill, golden_input, relative_error
from ssldiff_fast.models import UNet
from ssldiff_fast.models.attention import SpatialTransformer
from ssldiff_fast.models.products import attention, conv1x1, geglu, linear
from ssldiff_fast.models.unet_blocks import ResBlock

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 5, 64), (0, 16)], ids=str)
def test_a_product_and_what_follows_it_are_plain_pytorchs(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, other = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 24).to(dtype)
    weight, bias = torch.randn(24, shape[-1]).to(dtype), torch.randn(24).to(dtype)
    product = F.linear(x.double(), weight.double(), bias.double())
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({}, product),
        ({"add": other}, product + other),
    ]
    for options, expected in cases:
        with torch.no_grad():
            inference = linear(x, weight, bias, **options)
        for out in (inference, linear(x, weight, bias, **options)):
            assert out.dtype == dtype
            assert out.shape == expected.shape
            if out.numel():
                assert relative_error(out.double(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 17, 66), (3, 5, 512), (0, 4, 8)], ids=str)
def test_geglu_is_that_of_pytorch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    projected = (4 * torch.randn(shape)).to(dtype)
    values, gates = projected.double().chunk(2, -1)
    with torch.no_grad():
        out = geglu(projected)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out.double(), values * F.gelu(gates), rtol=rtol, atol=1e-6)


def test_geglu_keeps_its_digits_from_one_tail_to_the_other() -> None:
    gates = torch.cat([torch.linspace(-9, 9, 20001), torch.tensor([-1e4, 0.0, 1e4])])
    exact = gates.double() * 0.5 * torch.special.erfc(-gates.double() / 2**0.5)
    with torch.no_grad():
        out = geglu(torch.stack((torch.ones_like(gates), gates), -1)[None])[0, :, 0]
        bad = geglu(torch.tensor([[[1.0, torch.nan], [torch.nan, 1.0], [1.0, torch.inf]]]))
    # Measured: 9.2e-6, of values of 1e-18, whose exponent is rounded as a number of 40.
    torch.testing.assert_close(out.double(), exact, rtol=1.2e-5, atol=1e-30)
    assert bad.isnan().flatten().tolist() == [True, True, False]


def test_geglu_passes_opcheck_and_the_raw_operator_checks_for_itself() -> None:
    operator = torch.ops.ssldiff.geglu
    torch.library.opcheck(
        operator, (torch.randn(2, 3, 8),), test_utils=("test_schema", "test_faketensor")
    )
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        operator(torch.zeros(1, 1, 2, dtype=torch.int64))
    for wrong in (torch.zeros(1, 1, 3), torch.zeros(2, 4), torch.zeros(2, 4, 6).mT):
        with pytest.raises(RuntimeError, match="contiguous"):
            operator(wrong)


def test_a_product_of_strided_operands_is_right() -> None:
    x, weight = torch.randn(6, 40)[:, 3:19], torch.randn(16, 12).mT
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), x @ weight.mT)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_is_a_product(layout: torch.memory_format) -> None:
    conv = nn.Conv2d(8, 5, 1)
    x = torch.randn(2, 8, 3, 4).contiguous(memory_format=layout)
    add = torch.randn(2, 5, 3, 4).contiguous(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(conv1x1(x, conv, add=add), conv(x) + add)
    torch.testing.assert_close(conv1x1(x, conv), conv(x))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("heads", "positions", "width"), [(1, 5, 264), (2, 16, 256), (3, 9, 16)])
def test_attention_is_that_of_pytorch_for_every_width_of_head(
    heads: int, positions: int, width: int, dtype: torch.dtype
) -> None:
    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, width)).transpose(1, 2)

    qkv = torch.randn(2, positions, 3 * heads * width).to(dtype)
    parts = [split(part) for part in qkv.chunk(3, -1)]
    expected = F.scaled_dot_product_attention(*(part.double() for part in parts))
    with torch.no_grad():
        out = attention(*parts)
    assert relative_error(out.double(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_a_guided_pair_is_two_evaluations_and_shares_what_comes_before_the_context(
    tokens: int,
) -> None:
    unet = fill(UNet(**UNET_A)).eval()
    x, t = golden_input("pair.x", 2, 3, 16, 16), torch.tensor([17, 803])
    contexts = [golden_input(f"pair.{kind}", 2, tokens, 64) for kind in ("cond", "uncond")]
    windows: dict[str, int] = {}
    for name, module in unet.named_modules():
        if isinstance(module, ResBlock | SpatialTransformer):
            module.register_forward_pre_hook(
                lambda module, args, name=name: windows.update({name: len(args[0])})
            )
    with torch.no_grad():
        expected = torch.cat([unet(x, t, context) for context in contexts])
        for context in (torch.cat(contexts), unet.prepare(torch.cat(contexts))):
            out = unet(x, t, context)
            assert relative_error(out, expected) < 2e-6
    counts = list(windows.values())
    first = next(i for i, name in enumerate(windows) if ".1" in name[-2:])
    assert counts[: first + 1] == [2] * (first + 1)  # the first transformer takes x once too
    assert counts[first + 1 :] == [4] * (len(counts) - first - 1)


def test_a_prepared_timestep_gives_the_same_bits_and_one_serves_all_windows() -> None:
    unet = fill(UNet(**UNET_A)).eval()
    x, context = golden_input("x", 3, 3, 16, 16), golden_input("context", 3, 1, 64)
    with torch.no_grad():
        expected = unet(x, torch.tensor(17), context)
        one = unet.prepare_time(torch.tensor(17))
        assert torch.equal(unet(x, one, context), expected)
        each = unet.prepare_time(torch.full((3,), 17))
        torch.testing.assert_close(unet(x, each, context), expected)
    assert [len(one), len(each)] == [1, 3]


def test_a_prepared_timestep_of_other_windows_is_named() -> None:
    unet = fill(UNet(**UNET_A)).eval()
    time = unet.prepare_time(torch.tensor([17, 803]))
    with pytest.raises(ValueError, match=r"t has shape \[2\], expected \[3\]"):
        unet(torch.zeros(3, 3, 16, 16), time, torch.zeros(3, 1, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conditioning_and_timesteps_are_prepared_in_float32_for_half_precision(
    dtype: torch.dtype,
) -> None:
    unet = fill(UNet(**UNET_A)).eval().to(dtype)
    exact = fill(UNet(**UNET_A)).eval()
    exact.load_state_dict({name: value.float() for name, value in unet.state_dict().items()})
    context, t = golden_input("context", 2, 1, 64), torch.tensor([17, 803])
    for ours, theirs in zip(unet.prepare(context).blocks, exact.prepare(context).blocks):
        assert torch.equal(ours.values, theirs.values)
    for vectors, expected in zip(unet.prepare_time(t).blocks, exact.prepare_time(t).blocks):
        assert torch.equal(vectors, expected)


def test_all_maps_of_a_guided_pair_stay_channels_last() -> None:
    unet = fill(UNet(**UNET_A)).eval()
    lost: list[str] = []

    def check(name: str, out: Tensor) -> None:
        if not out.is_contiguous(memory_format=torch.channels_last):
            lost.append(name)

    for name, module in unet.named_modules():
        if isinstance(module, ResBlock | SpatialTransformer):
            module.register_forward_hook(lambda m, args, out, name=name: check(name, out))
    with torch.no_grad():
        unet(torch.randn(2, 3, 16, 16), torch.tensor(5), torch.randn(4, 1, 64))
    assert lost == []
