# SPDX-License-Identifier: Apache-2.0
"""Parts of a batch; without a GPU its streams are played."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from golden_inputs import UNET_A, fill, golden_input
from ssldiff_fast.models import fused_unet
from ssldiff_fast.models.execution import network_for
from ssldiff_fast.models.fused_unet import FusedUNet
from ssldiff_fast.models.prepared import PreparedContext
from ssldiff_fast.models.side_by_side import side_by_side
from ssldiff_fast.models.unet import UNet


def scaled(x: Tensor, context: PreparedContext, beside: Tensor) -> tuple[Tensor, Tensor]:
    """A network: windows times the sums of what is prepared for them, and with more added."""
    assert context.packed is not None
    sums = context.packed.sum(1)[:, None, None, None]
    out = x.repeat(len(context) // len(x), 1, 1, 1) * sums
    return out, out + beside


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_windows_and_pairs_come_back_in_their_order(
    monkeypatch: pytest.MonkeyPatch, each: int, parts: int
) -> None:
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    x, packed = torch.randn(5, 3, 2, 2), torch.randn(5 * each, 7)
    context = PreparedContext.of_one_token(packed, [3, 4])
    beside = torch.randn(5 * each, 3, 2, 2)
    found = side_by_side(scaled, x, context, beside, parts=parts)
    for one, expected in zip(found, scaled(x, context, beside), strict=True):
        assert torch.equal(one, expected)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_halves_are_those_that_are_evaluated_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unet = fill(UNet(**UNET_A)).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    whole, time = FusedUNet(unet), torch.tensor(400.0, device="cuda")
    x, context = golden_input("x", 6, 3, 32, 32).cuda(), golden_input("context", 12, 1, 64).cuda()
    vectors, prepared = whole.prepare_time(time), whole.prepare(context)
    monkeypatch.setattr(fused_unet, "HALVED", 2**40)
    alone = [
        whole(x[some], vectors, prepared[torch.cat((some, some + 6))]).unflatten(0, (2, -1))
        for some in torch.arange(6, device="cuda").split(3)
    ]
    monkeypatch.setattr(fused_unet, "HALVED", 1)
    graphed = network_for(unet)
    expected, deep = torch.cat(alone, 1).flatten(0, 1), None
    for network in (whole, graphed, graphed):
        assert torch.equal(network(x, vectors, prepared), expected)
        out, made = network.with_deep(x, vectors, prepared)
        assert torch.equal(out, expected)
        deep = made if deep is None else deep
        assert torch.equal(made, deep)
        assert torch.equal(network.with_deep(x, vectors, prepared, made)[0], expected)
