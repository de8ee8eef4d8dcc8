# SPDX-License-Identifier: Apache-2.0
"""diffusers' tiled decode as a baseline: the library's own, or its algorithm where it is missing.

Tiles that overlap by a quarter, each with statistics of its own; where neighbours meet, one fades
linearly into the other.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from published_decode import published_decode
from ssldiff_fast.adapters.first_stage import _renamed
from ssldiff_fast.models import LatentDiffusion

OVERLAP = 0.25
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None


def step(window: int) -> int:
    """Latents from one tile to the next."""
    return int(window * (1 - OVERLAP))


def tiled_decoder(model: LatentDiffusion) -> Callable[[Tensor], Tensor]:
    """A function from the autoencoder's latents [1, C, H, W] to an image [1, 3, H * f, W * f]."""
    vae: Any = model.vae
    if not HAS_DIFFUSERS:
        return lambda z: tiled(lambda tile: published_decode(vae, tile), z, model.window[0])
    theirs = of_diffusers(model)
    # Its autoencoder with codes has no tiles, so the codes are looked up before it.
    return lambda z: theirs.decode(vae.quantize(z)[0]).sample


def of_diffusers(model: LatentDiffusion) -> Any:
    """diffusers' AutoencoderKL with the decoder's weights, tiled."""
    from diffusers import AutoencoderKL

    config = model.vae.ddconfig
    widths = tuple(config["ch"] * mult for mult in config["ch_mult"])
    theirs = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=config["num_res_blocks"],
        latent_channels=config["z_channels"],
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        sample_size=model.window[0] * model.downsample_factor,
    )
    ours, state = model.vae.state_dict(), theirs.state_dict()
    for name, value in state.items():
        if name.startswith(("decoder.", "post_quant_conv.")):
            state[name] = ours[_renamed(name, len(widths))].reshape(value.shape)
    theirs.load_state_dict(state)
    theirs.enable_tiling()
    if theirs.tile_overlap_factor != OVERLAP:
        raise RuntimeError(f"diffusers' tiles overlap by {theirs.tile_overlap_factor} now")
    return theirs.eval()


def tiled(decode: Callable[[Tensor], Tensor], z: Tensor, window: int) -> Tensor:
    """The algorithm of its `AutoencoderKL.tiled_decode`."""
    height, width = z.shape[2:]
    above: list[Tensor] = []
    made = []
    for y in range(0, height, step(window)):
        row = []
        for x in range(0, width, step(window)):
            tile = decode(z[:, :, y : y + window, x : x + window])
            side = window * (tile.shape[2] // z[:, :, y : y + window].shape[2])
            if above:
                _fade(above[len(row)].mT, tile.mT, int(side * OVERLAP))
            if row:
                _fade(row[-1], tile, int(side * OVERLAP))
            row.append(tile)
        above, kept = row, side - int(side * OVERLAP)
        made.append(torch.cat([tile[:, :, :kept, :kept] for tile in row], dim=3))
    return torch.cat(made, dim=2)


def _fade(before: Tensor, tile: Tensor, extent: int) -> None:
    """The last columns of one tile into the first of the next, in place."""
    extent = min(before.shape[3], tile.shape[3], extent)
    share = torch.arange(extent, device=tile.device) / extent
    tile[..., :extent] = before[..., -extent:] * (1 - share) + tile[..., :extent] * share
