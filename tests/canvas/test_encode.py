# SPDX-License-Identifier: Apache-2.0
"""From pixels to a canvas, in three ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from golden_inputs import VQ_SMALL, fill
from ssldiff_fast.canvas import canvas_noise, encode_image, encode_rows, layerwise
from ssldiff_fast.canvas.tile_decoder import from_bytes
from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel
from ssldiff_fast.models.local_autoencoder import (
    encoder_halo,
    local_autoencoder,
    measure_statistics,
)
from tiny_models import tiny_model

SIZE_PX = (88, 60)  # 22 x 15 latents
WINDOW = (8, 8)


def vq(*, attention: bool = True) -> VQModel:
    vae = fill(VQModel(**VQ_SMALL), "first_stage_model.").eval()
    if not attention:
        vae.encoder.mid.attn_1.proj_out.weight.data.zero_()
    return vae


def kl() -> AutoencoderKL:
    ddconfig = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "double_z": True}
    return fill(AutoencoderKL(ddconfig=ddconfig, embed_dim=4), "first_stage_model.").eval()


def picture(height: int = SIZE_PX[0], width: int = SIZE_PX[1]) -> np.ndarray:
    values = torch.sigmoid(canvas_noise(3, 3, height, width)) * 255
    return values.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


class Mean:
    """An autoencoder without context: the mean of four by four pixels."""

    downsample_factor = 4

    def encode(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 4)


@pytest.mark.parametrize("weights", ["hann", "gaussian", "uniform"])
def test_an_encoder_without_context_shows_no_tiles(weights: str) -> None:
    image = picture()
    canvas = encode_image(Mean(), image, window=WINDOW, stride=3, weights=weights)
    torch.testing.assert_close(canvas, Mean().encode(from_bytes(image)[None])[0])


def test_tiles_of_the_reference_are_those_the_autoencoder_was_trained_on() -> None:
    vae, image = vq(), picture(32, 64)
    canvas = encode_image(vae, image, window=WINDOW, stride=8)
    with torch.no_grad():
        tiles = [vae.encode(part[None])[0] for part in from_bytes(image).split(32, dim=2)]
    torch.testing.assert_close(canvas, torch.cat(tiles, dim=2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [vq, kl])
@torch.no_grad()
def test_the_global_way_is_one_encoding_of_the_whole(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_BAND_BYTES", 100_000)  # several bands a layer
    vae, image = make(), picture()
    bands = [image[:30], image[30:31], image[31:]]
    canvas = torch.cat(list(encode_rows(vae, bands, SIZE_PX, way="global")), dim=1)
    torch.testing.assert_close(canvas, vae.encode(from_bytes(image)[None])[0], rtol=1e-4, atol=1e-4)


def test_the_halo_of_the_published_encoder_is_found() -> None:
    ddconfig = {"ch": 32, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "z_channels": 3}
    deep = VQModel(ddconfig=ddconfig, n_embed=8, embed_dim=3)
    shallow = VQModel(ddconfig={**ddconfig, "num_res_blocks": 1}, n_embed=8, embed_dim=3)
    # Nine 3x3 convolutions on latents, four on twice as many, five on pixels; the strided ones
    # reach one further below and to the right.
    assert encoder_halo(shallow) < encoder_halo(deep) == 9 * 4 + 4 * 2 + 5 + 2 + 1


@pytest.mark.parametrize("less", [0, 1])
@torch.no_grad()
def test_a_halo_that_is_one_pixel_too_small_shows(less: int) -> None:
    vae = vq(attention=False).double()
    image = from_bytes(picture(160, 80))[None].double()
    fixed = measure_statistics(vae, vae.encode, image[:, :, :64, :64])
    network: Any = local_autoencoder(vae, fixed, (16, 16))
    row, factor = 20, vae.downsample_factor
    changed = image.clone()
    changed[:, :, : row * factor - encoder_halo(vae) + less] = 0
    changed[:, :, (row + 1) * factor + encoder_halo(vae) - less :] = 0
    same = torch.allclose(
        network.encode(changed)[:, :, row], network.encode(image)[:, :, row], rtol=0, atol=1e-12
    )
    assert same is (less == 0)


@pytest.mark.parametrize("tile", [7, 64])
@torch.no_grad()
def test_local_tiles_without_attention_are_parts_of_one_encoding(tile: int) -> None:
    vae, image = vq(attention=False), picture(176, 60)
    pixels = from_bytes(image)[None]
    fixed = measure_statistics(vae, vae.encode, pixels[:, :, :32, :32])
    canvas = encode_image(vae, image, way="local", tile=tile, window=WINDOW, statistics=fixed)
    whole: Any = local_autoencoder(vae, fixed, WINDOW)
    torch.testing.assert_close(canvas, whole.encode(pixels)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["reference", "global", "local"])
def test_bands_of_pixels_do_not_change_the_canvas(way: str) -> None:
    vae, image = vq(), picture()
    options: dict[str, Any] = {"way": way, "window": WINDOW, "tile": 6}
    bands = [image[begin : begin + 13] for begin in range(0, len(image), 13)]
    canvas = torch.cat(list(encode_rows(vae, bands, SIZE_PX, **options)), dim=1)
    assert torch.equal(canvas, encode_image(vae, image, **options))


@pytest.mark.parametrize("way", ["reference", "local"])
def test_the_first_latents_are_made_before_the_last_pixels_are_read(way: str) -> None:
    read = 0

    def bands() -> Any:
        nonlocal read
        for _ in range(100):
            read += 1
            yield picture(8, 32)

    rows = encode_rows(vq(), bands(), (800, 32), way=way, window=WINDOW, tile=8)
    first = next(rows)
    assert (first.shape[0], first.shape[2]) == (3, 8)
    assert read < 20


@pytest.mark.parametrize("way", ["reference", "global", "local"])
def test_a_model_encodes_in_the_scale_of_its_canvas(way: str) -> None:
    model = tiny_model()
    image = picture(16 * model.downsample_factor, 16 * model.downsample_factor)
    by_model = encode_image(model, image, way=way)
    by_vae = encode_image(model.vae, image, way=way, window=model.window)
    torch.testing.assert_close(by_model, by_vae * model.scale_factor)


def test_progress_counts_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    encode_image(Mean(), picture(64, 64), window=WINDOW, stride=8, progress=True)
    assert "4/4" in capsys.readouterr().err


def test_a_latent_that_is_nan_is_reported_with_its_tile() -> None:
    class Broken(Mean):
        def encode(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1, :1, :1] == 1.0, float("nan"), super().encode(x))

    image = np.zeros((64, 64, 3), np.uint8)
    image[32, 32] = 255
    with pytest.raises(RuntimeError, match=r"latent became NaN .* tile with origin \(32, 32\)"):
        encode_image(Broken(), image, window=WINDOW, stride=8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"way": "best"}, ValueError, "way is 'best', but it must be one of global, local"),
        ({"weights": "boxcar"}, ValueError, "weights is 'boxcar'"),
        ({"tile": 0}, ValueError, "tile is 0"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"window": None}, ValueError, "window is None"),
        ({"stride": 9}, ValueError, "stride is 9"),
        ({"window": (32, 32)}, ValueError, "canvas is 22 x 15"),
        ({"model": lambda x: x}, TypeError, "model is a function, which cannot encode"),
        ({"model": Mean(), "way": "global"}, TypeError, "global way runs the layers"),
        ({"model": Mean(), "way": "local"}, TypeError, "local way fixes statistics"),
        ({"image": picture(30, 60)}, ValueError, "30 x 60 pixels, but its sides must be multiples"),
        ({"image": picture().astype(float)}, TypeError, "pixels are float64, but a uint8"),
        ({"image": picture()[..., :2]}, ValueError, r"pixels have shape \[88, 60, 2\]"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"model": vq(), "image": picture(), "window": WINDOW, **arguments}
    with pytest.raises(error, match=message):
        encode_image(options.pop("model"), options.pop("image"), **options)


@pytest.mark.parametrize("way", ["reference", "global", "local"])
@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([picture(40, 60)], "the pixels end at row 40, but the image has 88 rows"),
        ([picture(92, 60)], "the pixels have 92 rows or more, but the image has 88"),
        ([picture(88, 64)], "a band is 64 pixels wide, but the image is 60"),
    ],
)
def test_wrong_rows_are_named(way: str, bands: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(encode_rows(vq(), bands, SIZE_PX, way=way, window=WINDOW))


def test_an_image_too_large_for_global_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="the canvas is 600 x 600 latents, but the global way"):
        encode_rows(vq(), [], (2400, 2400), way="global")
