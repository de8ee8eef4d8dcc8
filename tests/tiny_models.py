# SPDX-License-Identifier: Apache-2.0
"""A whole model small enough for tests: windows of 8 latents, 32 pixels, random weights."""

from __future__ import annotations

import torch

from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.encoders import Encoder, EncoderSpec
from ssldiff_fast.models.autoencoder import VQModel
from ssldiff_fast.models.conditioner import PatchConditioner
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.unet import UNet
from ssldiff_fast.slides.grid import Grid, spec_dict

PATCH_PX = 32
SPEC = EncoderSpec(
    name="tiny-encoder", network="test_resnet", width=12, patch_px=PATCH_PX, mpp=0.5, head=True
)


def tiny_model(seed: int = 0) -> LatentDiffusion:
    torch.manual_seed(seed)
    encoder = Encoder(SPEC)
    unet = UNet(
        image_size=8,
        in_channels=3,
        out_channels=3,
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=[1],
        channel_mult=[1],
        num_heads=1,
        use_spatial_transformer=True,
        context_dim=16,
    )
    for parameter in unet.parameters():
        if parameter.ndim > 1 and not parameter.any():  # outputs of blocks start from zero
            torch.nn.init.normal_(parameter, std=0.1)
    ddconfig = {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 3}
    model = LatentDiffusion(
        unet,
        VQModel(ddconfig=ddconfig, n_embed=512, embed_dim=3),
        PatchConditioner(SPEC.width, 16),
        schedule=Schedule(zero_terminal_snr=True),
        prediction="v",
        window=(8, 8),
        name="tiny",
        encoder_spec=encoder.spec,
    )
    model.encoder_weights = dict(encoder.network.state_dict())
    return model.eval()


def tiny_grid(model: LatentDiffusion, rows: int = 2, columns: int = 3) -> Grid:
    assert model.encoder_spec is not None
    generator = torch.Generator().manual_seed(3)
    return Grid(
        torch.randn(rows, columns, 1, SPEC.width, generator=generator),
        torch.ones(rows, columns, dtype=torch.bool),
        mpp=0.5,
        cell_px=PATCH_PX,
        encoder=spec_dict(model.encoder_spec),
    )
