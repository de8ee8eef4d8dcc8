# SPDX-License-Identifier: Apache-2.0
"""Autoencoders of diffusers decode the same as ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssldiff_fast.adapters.first_stage import first_stage_from_diffusers
from ssldiff_fast.canvas import decode_image
from ssldiff_fast.canvas.tile_decoder import to_bytes
from ssldiff_fast.models.local_autoencoder import local_autoencoder, measure_statistics

diffusers = pytest.importorskip("diffusers")

WIDTHS = (32, 64, 64)
BLOCKS = {
    "block_out_channels": WIDTHS,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
MODELS = {
    "KL": lambda: diffusers.AutoencoderKL(**BLOCKS, layers_per_block=2),
    "KL without 1x1 convolutions": lambda: diffusers.AutoencoderKL(
        **BLOCKS, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
    ),
    "VQ": lambda: diffusers.VQModel(**BLOCKS, vq_embed_dim=3, num_vq_embeddings=32),
    "tiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16,) * 3,
        decoder_block_out_channels=(16,) * 3,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ),
}


def theirs(vae: Any, images: Tensor) -> Tensor:
    """The latent that diffusers makes, without the spread of a KL autoencoder."""
    made = vae.encode(images)
    return made.latent_dist.mean if hasattr(made, "latent_dist") else made.latents


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_images_and_latents_are_those_of_diffusers(name: str) -> None:
    torch.manual_seed(0)
    vae = MODELS[name]()
    stage = first_stage_from_diffusers(vae)
    factor = stage.vae.downsample_factor
    channels = vae.config.latent_channels
    latents = torch.randn(2, channels, 12, 10)
    images = torch.randn(1, 3, 8 * factor, 6 * factor)
    torch.testing.assert_close(
        stage.vae.decode(latents), vae.decode(latents).sample, rtol=1e-4, atol=1e-5
    )
    if name == "tiny":
        torch.testing.assert_close(stage.vae.encode(images), vae.encode(images).latents)
    else:
        torch.testing.assert_close(stage.vae.encode(images), theirs(vae, images))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_their_local_tiles_are_parts_of_one_decode(name: str) -> None:
    torch.manual_seed(0)
    stage = first_stage_from_diffusers(MODELS[name]())
    canvas = torch.randn(MODELS[name]().config.latent_channels, 13, 29)
    latent = canvas / stage.scale_factor + stage.shift
    known = measure_statistics(stage.vae, stage.vae.decode, latent[None, :, :8, :8])
    undivided: Any = local_autoencoder(stage.vae, known, (8, 8))
    expected = to_bytes(undivided.decode(latent[None])[0])
    options: dict[str, Any] = {"decoder": "local", "window": (8, 8), "statistics": known}
    for tile in (5, 16):
        made = decode_image(stage, canvas, tile=tile, **options)
        difference = np.abs(made.astype(int) - expected)
        assert int(difference.max()) <= 1
        assert float((difference > 0).mean()) < 1e-3


def test_the_weights_are_the_same_tensors() -> None:
    vae = MODELS["KL"]()
    ours = first_stage_from_diffusers(vae).vae.decoder.conv_in.weight
    assert ours.data_ptr() == vae.decoder.conv_in.weight.data_ptr()


def test_the_scale_of_the_latents_comes_from_the_configuration() -> None:
    vae = diffusers.AutoencoderKL(**BLOCKS, scaling_factor=0.5, shift_factor=0.25)
    stage = first_stage_from_diffusers(vae)
    assert (stage.scale_factor, stage.shift) == (0.5, 0.25)


def test_other_builds_are_named() -> None:
    with pytest.raises(ValueError, match="norm_num_groups 16"):
        first_stage_from_diffusers(diffusers.AutoencoderKL(**BLOCKS, norm_num_groups=16))
    with pytest.raises(ValueError, match="mid_block_add_attention False"):
        first_stage_from_diffusers(diffusers.AutoencoderKL(**BLOCKS, mid_block_add_attention=False))
    with pytest.raises(TypeError, match="vae is a Linear, but one of diffusers' AutoencoderKL"):
        first_stage_from_diffusers(torch.nn.Linear(1, 1))
