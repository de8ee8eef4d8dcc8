# SPDX-License-Identifier: Apache-2.0
"""The local decoder: disjoint tiles that fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from golden_inputs import VQ_SMALL, fill
from ssldiff_fast.canvas import canvas_noise, decode_image, decode_rows, open_decoder
from ssldiff_fast.canvas.decode import DecodeSettings
from ssldiff_fast.canvas.decode_local import LocalDecoder
from ssldiff_fast.canvas.decode_staggered import StaggeredDecoder
from ssldiff_fast.canvas.tile_decoder import to_bytes
from ssldiff_fast.canvas.wide import Memory
from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel
from ssldiff_fast.models.local_autoencoder import (
    local_autoencoder,
    measure_statistics,
    receptive_halo,
)
from tiny_models import tiny_model

VQ_F4 = {"ch": 32, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "z_channels": 3}
SIZE = (45, 21)


def vq(*, attention: bool = True) -> VQModel:
    vae = fill(VQModel(**VQ_SMALL), "first_stage_model.").eval()
    if not attention:
        vae.decoder.mid.attn_1.proj_out.weight.data.zero_()
    return vae


def latent() -> Tensor:
    return canvas_noise(0, 3, *SIZE)


def statistics(vae: Any, side: int = 16) -> Any:
    return measure_statistics(
        vae, vae.decode, canvas_noise(1, 3, side, 4 * side).split(side, 2)[0][None]
    )


def test_the_halo_of_the_published_autoencoder_is_17() -> None:
    assert receptive_halo(VQModel(ddconfig=VQ_F4, n_embed=8, embed_dim=3), 3) == 17


def test_the_halo_follows_from_the_build_and_not_from_the_widths() -> None:
    wide = VQModel(ddconfig={**VQ_F4, "ch": 64}, n_embed=8, embed_dim=3)
    short = AutoencoderKL(
        ddconfig={**VQ_F4, "num_res_blocks": 1, "double_z": True, "z_channels": 4}, embed_dim=4
    )
    assert receptive_halo(wide, 3) == 17
    assert receptive_halo(short, 4) < 17


@pytest.mark.parametrize("tile", [20, 64])
def test_without_attention_tiles_are_parts_of_one_decode(tile: int) -> None:
    vae = vq(attention=False)
    fixed = statistics(vae)
    with torch.no_grad():
        whole = local_autoencoder(vae, fixed, (16, 16)).decode(latent()[None])[0]
    image = decode_image(
        vae, latent(), decoder="local", tile=tile, window=(16, 16), statistics=fixed
    )
    difference = np.abs(image.astype(int) - to_bytes(whole))
    assert int(difference.max()) <= 1
    assert float((difference > 0).mean()) < 1e-3


@pytest.mark.parametrize("tile", [7, 20, 64])
@pytest.mark.parametrize("size", [(20, 75), (45, 21), (9, 5), (1, 1)], ids=str)
def test_tiles_of_any_size_give_the_same_pixels(tile: int, size: tuple[int, int]) -> None:
    vae, canvas = vq(), canvas_noise(0, 3, *size)
    options: dict[str, Any] = {"decoder": "local", "window": (16, 16)}
    options["statistics"] = statistics(vae)
    expected = decode_image(vae, canvas, tile=16, **options)
    assert expected.shape == (4 * size[0], 4 * size[1], 3)
    made = decode_image(vae, canvas, tile=tile, batch_size=64, **options)
    # Float32 rounds differently, and pixels are cut off to whole numbers.
    difference = np.abs(made.astype(int) - expected)
    assert int(difference.max()) <= 1
    assert float((difference > 0).mean()) < 1e-3


class Convolutional(torch.nn.Module):
    """A decoder without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Conv2d(3, 3, 5, padding=2)

    def decode(self, z: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(self.decoder(z), scale_factor=2.0)


def test_what_has_neither_norms_nor_attention_is_decoded_as_the_whole() -> None:
    network = fill(Convolutional())
    with torch.no_grad():
        whole = network.decode(latent()[None])[0]
    image = decode_image(network, latent(), decoder="local", tile=7, window=(16, 16))
    assert np.abs(image.astype(int) - to_bytes(whole)).max() <= 1


def test_statistics_are_fixed_where_the_autoencoder_knows_some() -> None:
    model, vae = tiny_model(), vq()
    known = measure_statistics(model.vae, model.vae.decode, canvas_noise(0, 3, 8, 8)[None])

    def kind(model: Any, fixed: bool | None = None, **options: Any) -> type:
        return type(open_decoder(model, (20, 24), DecodeSettings("local", fixed=fixed), **options))

    assert kind(vae, window=(16, 16)) is StaggeredDecoder
    assert kind(vae, True, window=(16, 16)) is LocalDecoder
    assert kind(vae, window=(16, 16), statistics=statistics(vae)) is LocalDecoder
    assert kind(model) is StaggeredDecoder
    model.set_statistics(known)
    assert kind(model) is LocalDecoder
    assert kind(model, False) is StaggeredDecoder
    assert kind(Convolutional(), window=(16, 16)) is LocalDecoder


@pytest.mark.parametrize("part", ["all of it", "its decoder"])
@pytest.mark.parametrize("kind", ["local", "own"])
def test_a_first_stage_that_overflows_in_half_precision_is_run_again_in_float32(
    kind: str, part: str
) -> None:
    narrow, wide = vq(), vq()
    for vae in (narrow, wide):  # maps of 1e5, where float16 ends at 65,504
        vae.decoder.conv_in.weight.data.mul_(5e4)
    (narrow if part == "all of it" else narrow.decoder).half()
    wide.load_state_dict(narrow.state_dict())
    known = statistics(wide) if kind == "local" else None
    options: dict[str, Any] = {"decoder": "local", "window": (16, 16), "statistics": known}
    with torch.no_grad():
        dtype = next(narrow.parameters()).dtype
        alone = narrow.decode(latent()[None, :, :16, :16].to(dtype))
    assert not torch.isfinite(alone).all()
    expected = decode_image(wide, latent(), **options)
    assert np.array_equal(decode_image(narrow, latent(), **options), expected)


def test_windows_with_statistics_of_their_own_overlap_by_half_in_staggered_rows() -> None:
    decoder = open_decoder(vq(), (256, 250), DecodeSettings("local"), window=(64, 63))
    assert isinstance(decoder, StaggeredDecoder)
    for row in range(7):
        tiles = decoder.tiles_of(row)
        assert tiles.origins_y == (0, 32, 64, 96, 128, 160, 192)
        shifted = (0, 16, 48, 80, 112, 144, 176, 187)
        assert tiles.origins_x == ((0, 32, 64, 96, 128, 160, 187) if row % 2 else shifted)


class Centred(torch.nn.Module):
    """Decodes a tile by its own mean: two pixels a latent."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Conv2d(3, 3, 1)

    def decode(self, z: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(
            z - z.mean((1, 2, 3), keepdim=True), scale_factor=2.0
        )


def staggered_by_hand(latent: Tensor, window: int) -> Tensor:
    """Each row of tiles blended, then the rows."""
    network, (height, width) = Centred(), latent.shape[1:]
    weight = torch.sin(torch.pi * (torch.arange(2 * window) + 0.5) / (2 * window))
    total, norm = torch.zeros(3, 2 * height, 2 * width), torch.zeros(2 * height, 1)
    tops = sorted({*range(0, height - window, window // 2), height - window})
    for number, y in enumerate(tops):
        row, across = torch.zeros(3, 2 * window, 2 * width), torch.zeros(2 * width)
        shift = 0 if number % 2 else window // 4
        for x in sorted({0, *range(shift, width - window, window // 2), width - window}):
            tile = network.decode(latent[None, :, y : y + window, x : x + window])[0]
            row[:, :, 2 * x : 2 * (x + window)] += tile * weight
            across[2 * x : 2 * (x + window)] += weight
        total[:, 2 * y : 2 * (y + window)] += row / across * weight[:, None]
        norm[2 * y : 2 * (y + window)] += weight[:, None]
    return total / norm


class Pieces(Memory):
    """Works on so many columns of tiles at once."""

    def __init__(self, columns: int) -> None:
        self._columns = columns

    def share(self, count: int, each: int) -> int:
        return self._columns


@pytest.mark.parametrize("size", [(45, 21), (16, 75), (33, 16), (16, 16)], ids=str)
def test_staggered_rows_are_blended_by_themselves_and_then_together(size: tuple[int, int]) -> None:
    canvas = canvas_noise(0, 3, *size) / 4
    options: dict[str, Any] = {"decoder": "local", "fixed": False, "window": (16, 16)}
    made = decode_image(Centred(), canvas, **options)
    difference = made.astype(int) - to_bytes(staggered_by_hand(canvas, 16))
    # Sums in another order, cut off to whole numbers.
    assert np.abs(difference).max() <= 1
    assert float((difference != 0).mean()) < 1e-3
    for columns in (1, 2):
        assert np.array_equal(
            decode_image(Centred(), canvas, scratch=Pieces(columns), batch_size=3, **options), made
        )


def test_a_halo_that_is_one_too_small_shows() -> None:
    vae = vq(attention=False).double()
    fixed = measure_statistics(vae, vae.decode, canvas_noise(1, 3, 16, 16)[None].double())
    network = local_autoencoder(vae, fixed, (16, 16))
    z = latent()[None].double()
    halo, factor = receptive_halo(vae, 3), vae.downsample_factor
    with torch.no_grad():
        whole = network.decode(z)
        for less, equal in ((0, True), (1, False)):
            begin = 30 - halo + less
            part = network.decode(z[:, :, begin:])
            kept = part[:, :, (30 - begin) * factor :]
            same = torch.allclose(kept, whole[:, :, 30 * factor :], rtol=0, atol=1e-12)
            assert same is equal


@pytest.mark.parametrize("fixed", [True, False])
def test_bands_of_latents_do_not_change_the_bytes(tmp_path: Path, fixed: bool) -> None:
    vae = vq()
    options: dict[str, Any] = {"decoder": "local", "tile": 16, "window": (16, 16), "fixed": fixed}
    whole = decode_image(vae, latent(), **options)
    in_file = decode_rows(vae, [latent()], SIZE, scratch=tmp_path, **options)
    assert np.array_equal(np.concatenate([np.asarray(band) for band in in_file]), whole)
    bands = decode_rows(vae, latent().split(7, dim=1), SIZE, **options)
    assert np.array_equal(np.concatenate(list(bands)), whole)


# "own" is the local decoder where no statistics are fixed.
KINDS = ["reference", "local", "own", "global"]


def opened(vae: VQModel, kind: str) -> Any:
    fixed = statistics(vae) if kind == "local" else None
    settings = DecodeSettings("local" if kind == "own" else kind, stride=8, tile=15)
    return open_decoder(vae, SIZE, settings, window=(16, 16), statistics=fixed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_of_half_precision_is_given_the_codes_of_float32(kind: str) -> None:
    vae, narrow = vq(), vq()
    narrow.decoder.bfloat16()
    z = latent()[None]
    with torch.no_grad():
        exact = vae.decoder_input(vae.quantize(z)[0])
        assert torch.equal(narrow.decoder_input(narrow.quantize(z)[0]), exact.bfloat16())
    made, expected = (
        np.concatenate(list(opened(model, kind).decode([latent()]))).astype(int)
        for model in (narrow, vae)
    )
    assert 0 < np.abs(made - expected).mean() < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begin", [5, 15])
def test_a_decode_that_goes_on_in_the_middle_gives_the_rest(kind: str, begin: int) -> None:
    vae = vq()
    decoder = opened(vae, kind)
    whole = np.concatenate(list(decoder.decode([latent()])))
    rest = latent()[:, decoder.first_latent(begin) :]
    pixels = np.concatenate(list(decoder.decode(rest.split(5, dim=1), begin=begin)))
    assert np.array_equal(pixels, whole[begin * vae.downsample_factor :])


@pytest.mark.parametrize("kind", KINDS)
def test_a_decode_that_goes_on_at_the_end_gives_nothing(kind: str) -> None:
    decoder = opened(vq(), kind)
    rest = latent()[:, decoder.first_latent(SIZE[0]) :]
    assert list(decoder.decode([rest], begin=SIZE[0])) == []


def test_statistics_are_measured_once_and_can_be_given_again() -> None:
    vae = vq()
    settings = DecodeSettings("local", fixed=True, tile=16)
    first = open_decoder(vae, SIZE, settings, window=(16, 16))
    assert isinstance(first, LocalDecoder)
    with pytest.raises(ValueError, match="begin is 16, but the local decoder has no statistics"):
        next(first.decode([latent()], begin=16))
    whole = np.concatenate(list(first.decode([latent()])))
    again = open_decoder(vae, SIZE, settings, window=(16, 16), statistics=first.statistics)
    assert np.array_equal(np.concatenate(list(again.decode([latent()]))), whole)


def test_a_model_decodes_locally_in_its_own_scale() -> None:
    model = tiny_model()
    canvas = canvas_noise(0, 3, 20, 24)
    fixed = measure_statistics(model.vae, model.vae.decode, canvas[None, :, :8, :8])
    by_model = decode_image(model, canvas, decoder="local", statistics=fixed)
    by_vae = decode_image(
        model.vae,
        canvas / model.scale_factor,
        decoder="local",
        window=model.window,
        statistics=fixed,
    )
    assert by_model.shape == (20 * model.downsample_factor, 24 * model.downsample_factor, 3)
    assert np.array_equal(by_model, by_vae)


def test_the_autoencoder_itself_is_not_changed() -> None:
    vae = vq()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    kinds = [type(module) for module in vae.modules()]
    decode_image(vae, latent(), decoder="local", fixed=True, tile=16, window=(16, 16))
    assert [type(module) for module in vae.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_a_tile_that_overflows_in_half_precision_is_decoded_again() -> None:
    class Narrow(torch.nn.Module):
        """Overflows in float16 wherever the latent is 7."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(20000.0))

        def decode(self, z: Tensor) -> Tensor:
            image = torch.nn.functional.interpolate(z, scale_factor=2.0)
            return image * self.gain / self.gain

    narrow = Narrow().half()
    z = torch.zeros(3, 16, 16)
    z[:, 3, 3] = 7.0
    image = decode_image(narrow, z, stride=8, window=(8, 8))
    expected = decode_image(Narrow(), z, stride=8, window=(8, 8))
    assert image.max() == 255
    assert np.array_equal(image, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decoder": "best"}, ValueError, "decoder is 'best', but it must be one of global, local"),
        ({"decoder": "local", "tile": 0}, ValueError, "tile is 0"),
        ({"decoder": "local", "window": None}, ValueError, "window is None"),
        ({"decoder": "global", "model": lambda z: z}, TypeError, "global decoder runs the layers"),
        ({"decoder": "local", "model": lambda z: z}, TypeError, "local decoder fixes statistics"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"model": vq(), "window": (16, 16), **arguments}
    with pytest.raises(error, match=message):
        decode_image(options.pop("model"), latent(), **options)


def test_a_canvas_too_large_for_its_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="the canvas is 600 x 600 latents, but the global way"):
        open_decoder(vq(), (600, 600), DecodeSettings("global"))


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([torch.zeros(3, 10, 21)], "the latents end at row 10, but the canvas has 45 rows"),
        ([torch.zeros(3, 10, 9)], r"latent has shape \[3, 10, 9\]"),
        ([torch.zeros(3, 60, 21)], "the latents have 60 rows or more, but the canvas has 45"),
        ([torch.full((3, 45, 21), float("nan"))], "latent holds 2835 values that are NaN"),
    ],
)
def test_wrong_rows_are_named(bands: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(decode_rows(vq(), bands, SIZE, window=(16, 16)))
