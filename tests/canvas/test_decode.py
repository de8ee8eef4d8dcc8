# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from golden_inputs import VQ_SMALL, fill, golden_input, golden_output
from ssldiff_fast.canvas import canvas_noise, decode_image, decode_rows, wide
from ssldiff_fast.models.autoencoder import VQModel
from ssldiff_fast.slides.pixel_band import PixelBand
from tiny_models import tiny_model


def enlarge(tiles: Tensor) -> Tensor:
    """A decoder without context: four pixels a latent."""
    return torch.nn.functional.interpolate(tiles, scale_factor=4.0)


@pytest.mark.golden
@pytest.mark.parametrize("stride", [16, 32])
def test_the_decode_is_the_published_one(stride: int) -> None:
    vae = fill(VQModel(**VQ_SMALL), "first_stage_model.")
    latent = golden_input("decode.latent", 1, 3, 128, 96)[0]
    image = decode_image(vae, latent, stride=stride, window=(64, 64), batch_size=4)
    expected = golden_output(f"decode.image_u8_stride{stride}")[0].numpy()
    assert image.shape == (512, 384, 3)
    assert float((image == expected).mean()) > 0.999
    # What differs is where rounding crosses a grey level.
    assert int(np.abs(image.astype(int) - expected).max()) <= 1


def test_the_precision_of_the_unet_does_not_matter_to_the_decode() -> None:
    model, latent = tiny_model(), canvas_noise(0, 3, 8, 8)
    expected = decode_image(model, latent, stride=8)
    model.unet.to(torch.bfloat16)
    assert np.array_equal(decode_image(model, latent, stride=8), expected)


def test_a_decoder_without_context_shows_no_tiles() -> None:
    latent = canvas_noise(0, 3, 20, 28) / 4
    image = decode_image(enlarge, latent, stride=5, window=(8, 8))
    whole = ((enlarge(latent[None])[0] + 1) / 2).clamp(0, 1) * 255
    assert image.dtype == np.uint8
    difference = image.astype(float) - whole.permute(1, 2, 0).numpy()
    # Cut off, not rounded, give or take the rounding of the mean.
    assert float(difference.max()) < 1e-3
    assert float(difference.min()) > -1.001


def test_bands_come_from_top_to_bottom_and_do_not_change_the_bytes() -> None:
    latent = canvas_noise(0, 3, 37, 21)
    options: dict[str, Any] = {"stride": 3, "window": (8, 8)}
    whole = decode_image(enlarge, latent, **options)
    for cut in (37, 5):
        bands = list(decode_rows(enlarge, latent.split(cut, dim=1), (37, 21), **options))
        assert len(bands) > 2
        assert np.array_equal(np.concatenate(bands), whole)


@pytest.mark.parametrize("stride", [(3, 3), (8, 8), (5, 2)], ids=str)
@pytest.mark.parametrize("piece_bytes", [1, 2**14])
def test_what_waits_in_a_file_does_not_change_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: tuple[int, int], piece_bytes: int
) -> None:
    monkeypatch.setattr(wide, "_PIECE_BYTES", piece_bytes)
    latent = canvas_noise(0, 3, 37, 41)
    options: dict[str, Any] = {"stride": stride, "window": (8, 8), "weights": "hann"}
    whole = decode_image(enlarge, latent, **options)
    bands = list(decode_rows(enlarge, [latent], (37, 41), scratch=tmp_path, **options))
    assert {type(band) for band in bands} == {PixelBand}
    assert np.array_equal(np.concatenate([np.asarray(band) for band in bands]), whole)
    assert list(tmp_path.iterdir()) == []


def test_the_first_rows_are_finished_before_the_last_are_decoded() -> None:
    calls = 0

    def counted(tiles: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return enlarge(tiles)

    latents = canvas_noise(0, 3, 80, 8).split(7, dim=1)
    bands = decode_rows(counted, latents, (80, 8), stride=8, window=(8, 8))
    assert calls == 0
    assert next(bands).shape == (32, 32, 3)
    assert calls <= 2
    assert sum(len(band) for band in bands) == 320 - 32


def test_a_canvas_of_one_window_is_one_tile() -> None:
    latent = canvas_noise(0, 3, 8, 8)
    calls: list[tuple[int, ...]] = []

    def noted(tiles: Tensor) -> Tensor:
        calls.append(tuple(tiles.shape))
        return enlarge(tiles)

    assert decode_image(noted, latent, stride=2, window=(8, 8)).shape == (32, 32, 3)
    assert calls == [(1, 3, 8, 8)]


def test_models_decode_by_their_own_window_and_scale() -> None:
    class Model:
        window = (8, 8)

        def from_latent(self, x: Tensor) -> Tensor:
            return enlarge(x / 2)

    latent = canvas_noise(0, 3, 16, 16)
    assert np.array_equal(
        decode_image(Model(), latent, stride=8),
        decode_image(enlarge, latent / 2, stride=8, window=(8, 8)),
    )


def test_progress_counts_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    decode_image(enlarge, canvas_noise(0, 3, 16, 16), stride=8, window=(8, 8), progress=True)
    assert "4/4" in capsys.readouterr().err


def nan_in_one_tile(tiles: Tensor) -> Tensor:
    return torch.where(tiles[:, :1, :1, :1] == 7.0, float("nan"), enlarge(tiles))


def test_nan_in_a_tile_is_reported_with_its_origin() -> None:
    latent = torch.zeros(3, 16, 16)
    latent[0, 8, 4] = 7.0
    with pytest.raises(RuntimeError, match=r"tile with origin \(8, 4\)"):
        decode_image(nan_in_one_tile, latent, stride=4, window=(8, 8))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: decode(canvas_noise(0, 3, 6, 8)), ValueError, "canvas is 6 x 8 .*window, 8 x 8"),
        (lambda: decode(canvas_noise(0, 3, 8, 8)[None]), ValueError, "latent has shape"),
        (lambda: decode(torch.full((3, 8, 8), float("nan"))), ValueError, "latent holds 192"),
        (lambda: decode(stride=0), ValueError, "stride is 0"),
        (lambda: decode(stride=9), ValueError, "stride is 9"),
        (lambda: decode(batch_size=0), ValueError, "batch_size is 0"),
        (lambda: decode(window=None), ValueError, "window is None"),
        (lambda: decode(model="vae"), TypeError, "model is a str, which cannot decode"),
        (lambda: decode(model=lambda tiles: tiles[:, :, :3]), RuntimeError, "whole multiple"),
    ],
)
def test_bad_arguments_are_named(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def decode(latent: Tensor | None = None, model: Any = enlarge, **options: Any) -> object:
    latent = canvas_noise(0, 3, 16, 16) if latent is None else latent
    return decode_image(model, latent, **{"stride": 4, "window": (8, 8), **options})


def test_hann_weights_leave_no_line_where_tiles_end_and_the_gaussian_does() -> None:
    """A decoder that spoils the edge of each tile, as zero padding does."""

    def decode(tiles: torch.Tensor) -> torch.Tensor:
        image = torch.zeros(len(tiles), 3, 32, 32)
        image[:, :, :, :1] = 1.0
        return image

    lines = {}
    for weights in ("gaussian", "hann"):
        latent = torch.zeros(3, 8, 40)
        image = decode_image(decode, latent, stride=4, window=(8, 8), weights=weights)
        lines[weights] = int(image[:, 16:].astype(int).max() - 127)
    assert lines["gaussian"] > 15
    assert lines["hann"] <= 1


def test_unknown_weights_are_named() -> None:
    with pytest.raises(ValueError, match="boxcar"):
        decode_image(lambda x: x, torch.zeros(3, 8, 8), stride=4, window=(8, 8), weights="boxcar")
