# SPDX-License-Identifier: Apache-2.0
"""The U-Net's inference on a GPU; without one its kernels run in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden_inputs import UNET_A, fill, golden_input, golden_output, relative_error
from ssldiff_fast.models.folded import enlarging
from ssldiff_fast.models.fused_unet import FusedUNet, why_not
from ssldiff_fast.models.unet import UNet

PROGRAM = Path(__file__).parent.parent / "fused_programs.py"
LIMIT = 1e-5  # of float32, what the issue of the published outputs allows


def test_in_the_interpreter_it_is_the_unet() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert set(errors) == {
        *("one token", "a guided pair", "two tokens", "five tokens", "depth two"),
        "the outermost level",
    }
    assert all(error < LIMIT for error in errors.values()), errors


def test_a_transposed_convolution_is_enlargement_and_convolution() -> None:
    conv = nn.Conv2d(5, 7, 3, padding=1).double()
    x = torch.randn(2, 5, 6, 9, dtype=torch.float64)
    made = F.conv_transpose2d(x, enlarging(conv), conv.bias, stride=2, padding=1)
    torch.testing.assert_close(made, conv(F.interpolate(x, scale_factor=2, mode="nearest")))


def test_the_enlarging_filter_follows_its_convolution() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    before = enlarging(conv)
    assert enlarging(conv) is before
    with torch.no_grad():
        conv.weight.mul_(2)
    torch.testing.assert_close(enlarging(conv), 2 * before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_scale_shift_norm": True}, "not of the published kind"),
        ({"resblock_updown": True}, "not of the published kind"),
        ({"use_spatial_transformer": False, "context_dim": None}, "takes no context"),
    ],
)
def test_another_unet_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    unet = UNet(**{**UNET_A, **change})
    assert reason in (why_not(unet) or "")
    with pytest.raises(ValueError, match=f"{reason}; call the U-Net itself"):
        FusedUNet(unet)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2])
def test_on_a_gpu_it_is_the_published_unet(tokens: int) -> None:
    tag = f"unet_a_{tokens}tok"
    unet = fill(UNet(**UNET_A)).to("cuda", memory_format=torch.channels_last)
    fused = FusedUNet(unet)
    x, context = (
        golden_input(f"{tag}.x", 2, 3, 32, 32),
        golden_input(f"{tag}.context", 2, tokens, 64),
    )
    for number, t in enumerate((17.0, 803.0)):
        some = slice(number, number + 1)
        time, prepared = (
            fused.prepare_time(torch.tensor(t).cuda()),
            fused.prepare(context[some].cuda()),
        )
        out = fused(x[some].cuda(), time, prepared)
        assert relative_error(out.cpu(), golden_output(f"{tag}.out")[some]) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_half_precision_is_near(dtype: torch.dtype) -> None:
    unet = fill(UNet(**UNET_A))
    x, context = golden_input("x", 3, 3, 32, 32), golden_input("context", 6, 1, 64)
    expected = unet.double()(x.double(), torch.tensor(400.0), context.double())
    fused = FusedUNet(fill(UNet(**UNET_A)).to("cuda", dtype, memory_format=torch.channels_last))
    time, prepared = fused.prepare_time(torch.tensor(400.0).cuda()), fused.prepare(context.cuda())
    assert relative_error(fused(x.cuda(), time, prepared).cpu(), expected.float()) < 2e-2
