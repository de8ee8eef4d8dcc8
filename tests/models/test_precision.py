# SPDX-License-Identifier: Apache-2.0
"""`dtype="auto"` takes what is faster here, and says so."""

from __future__ import annotations

import logging

import pytest
import torch

import ssldiff_fast as sf
from ssldiff_fast.models import UNet, precision


@pytest.mark.parametrize(
    ("half_seconds", "chosen"), [(0.5, "bfloat16"), (0.95, "float32"), (3.0, "float32")]
)
def test_auto_takes_bfloat16_where_it_is_clearly_faster(
    half_seconds: float,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def seconds(unet: UNet, window: tuple[int, int], device: torch.device) -> float:
        whole = next(unet.parameters()).dtype == torch.float32
        return 1.0 if whole else half_seconds

    monkeypatch.setattr(precision, "_seconds", seconds)
    with caplog.at_level(logging.WARNING):
        model = sf.load("he-demo", dtype="auto")
    parts = [model.unet, model.conditioner]
    assert [str(next(part.parameters()).dtype) for part in parts] == [f"torch.{chosen}"] * 2
    assert next(model.vae.parameters()).dtype == torch.float32
    assert f"dtype auto: {chosen}" in caplog.text


def test_the_measurement_runs_the_network_in_both() -> None:
    unet = sf.load("he-demo").unet
    assert precision.choose_dtype(unet, (32, 32)) in (torch.float32, torch.bfloat16)
    assert next(unet.parameters()).dtype == torch.float32


def test_an_unknown_dtype_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"dtype is 'int8', expected one of .*float16, auto"):
        sf.load("he-demo", dtype="int8")
