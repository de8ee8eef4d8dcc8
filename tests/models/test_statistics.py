# SPDX-License-Identifier: Apache-2.0
"""Statistics of the autoencoder's norms that travel with a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_models import small_model
from ssldiff_fast.canvas import decode_image, open_decoder
from ssldiff_fast.canvas.decode import DecodeSettings
from ssldiff_fast.models.checkpoint import load_weights
from ssldiff_fast.models.ldm import STATISTICS_PREFIX, LatentDiffusion
from ssldiff_fast.models.load import load
from ssldiff_fast.models.local_autoencoder import measure_statistics, norm_names
from ssldiff_fast.ops import GroupNormStatistics


def model_with_statistics() -> LatentDiffusion:
    model = small_model().eval()
    latents = torch.randn(
        3, model.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    model.set_statistics(measure_statistics(model.vae, model.vae.decode, latents))
    return model


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_statistics_are_saved_and_loaded_with_the_model_in_full(
    tmp_path: Path, dtype: str | None
) -> None:
    model = model_with_statistics()
    folder = model.save_pretrained(tmp_path / "model", dtype=dtype)
    again = load(folder)
    assert list(again.statistics) == sorted(norm_names(model.vae, "decoder."))
    for name, given in model.statistics.items():
        torch.testing.assert_close(again.statistics[name].mean, given.mean, rtol=0, atol=0)
        torch.testing.assert_close(again.statistics[name].variance, given.variance)
    other = small_model()
    load_weights(other, folder / "model.safetensors")
    assert set(other.statistics) == set(model.statistics)


def test_a_model_without_statistics_has_none(tmp_path: Path) -> None:
    folder = small_model().save_pretrained(tmp_path / "model")
    assert load(folder).statistics == {}
    assert not [n for n in load_file(folder / "model.safetensors") if n.startswith("first_stage_s")]


def test_the_local_decoder_takes_the_models_own_statistics_unless_others_are_given() -> None:
    model = model_with_statistics()
    settings = DecodeSettings(decoder="local")
    own = open_decoder(model, (16, 24), settings)
    assert own.statistics == model.statistics  # type: ignore[attr-defined]
    latent = torch.randn(model.latent_channels, 16, 24)
    assert (
        decode_image(model, latent, decoder="local")
        == decode_image(model, latent, decoder="local", statistics=model.statistics)
    ).all()
    others = measure_statistics(model.vae, model.vae.decode, latent[None])
    given = open_decoder(model, (16, 24), settings, statistics=others)
    assert given.statistics == others  # type: ignore[attr-defined]
    unknown = open_decoder(small_model(), (16, 24), DecodeSettings("local", fixed=True))
    assert unknown.statistics is None  # type: ignore[attr-defined]


def test_statistics_of_another_autoencoder_are_refused() -> None:
    one = torch.ones(1, 32)
    with pytest.raises(ValueError, match=r"'decoder\.nothing', which is no norm of this"):
        small_model().set_statistics({"decoder.nothing": GroupNormStatistics(one, one, 1)})


def test_damaged_statistics_in_a_file_are_named(tmp_path: Path) -> None:
    folder = model_with_statistics().save_pretrained(tmp_path / "model")
    path = folder / "model.safetensors"
    state = load_file(path)
    del state[f"{STATISTICS_PREFIX}decoder.norm_out.variance"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"statistics of the norm 'decoder\.norm_out'"):
        load(folder)


def test_the_weights_hash_knows_the_statistics() -> None:
    assert model_with_statistics().weights_hash != small_model().weights_hash
