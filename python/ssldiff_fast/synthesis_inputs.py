# SPDX-License-Identifier: Apache-2.0
"""What a synthesis is given: a grid and a model, and what the two say of cells without tissue."""

from __future__ import annotations

import hashlib
import os

import torch
from torch import Tensor

from ssldiff_fast.canvas.glass import LEVEL
from ssldiff_fast.encoders.spec import EncoderSpec
from ssldiff_fast.models.conditioner import PatchRegionConditioner
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.slides.grid import Grid


def opened_grid(grid: Grid | str | os.PathLike[str]) -> Grid:
    if isinstance(grid, Grid):
        return grid
    if not isinstance(grid, str | os.PathLike):
        raise TypeError(
            f"synthesize: grid is a {type(grid).__name__}, but a Grid or the path of its file was "
            "expected; see sf.encode and sf.Grid."
        )
    return Grid.open(grid)


def loaded_model(
    model: LatentDiffusion | str | os.PathLike[str],
    device: str | None,
    dtype: str | None,
    decoder_dtype: str | None,
    execution: str | None,
) -> LatentDiffusion:
    if isinstance(model, LatentDiffusion):
        if any(option is not None for option in (device, dtype, decoder_dtype, execution)):
            raise ValueError(
                "synthesize: device, dtype, decoder_dtype and execution are for a model that is "
                "loaded here, but a loaded one was given; pass them to sf.load instead."
            )
        return model
    from ssldiff_fast.models.load import load

    return load(
        model,
        device=device or "cpu",
        dtype=dtype or "float32",
        decoder_dtype=decoder_dtype or "float32",
        execution=execution or "auto",
    )


def precision_of(network: torch.nn.Module) -> str:
    """The dtype of its parameters, as a recipe holds it."""
    return str(next(network.parameters()).dtype).removeprefix("torch.")


def wanted_grid(model: LatentDiffusion, grid: Grid) -> EncoderSpec | dict[str, int]:
    """What a grid for the model must be; published models do not name their encoder."""
    conditioner = model.conditioner
    if model.encoder_spec is not None or conditioner is None:  # LDMDenoiser refuses the latter
        return model.encoder_spec or {"tokens": grid.tokens, "width": grid.width}
    if grid.tokens == 1 and isinstance(conditioner, PatchRegionConditioner):
        return {"tokens": 1, "width": conditioner.patch_width}  # patches without their regions
    return {"tokens": conditioner.tokens, "width": conditioner.width}


@torch.no_grad()
def glass_latent(model: LatentDiffusion) -> Tensor:  # [C, 1, 1]
    """The latent of an empty slide, which what the mask leaves out takes."""
    parameter = next(model.vae.parameters())
    side = [size * model.downsample_factor for size in model.window]
    white = torch.full((1, 3, *side), LEVEL / 127.5 - 1.0).to(parameter)
    latent = model.to_latent(white)[0].float()
    # Of the middle, where the convolutions' padding does not reach.
    h, w = (size // 4 for size in latent.shape[1:])
    middle = latent[:, h : latent.shape[1] - h, w : latent.shape[2] - w]
    return middle.mean((1, 2), keepdim=True).cpu()


def background_filled(
    model: LatentDiffusion, grid: Grid
) -> tuple[Tensor, Tensor]:  # embeddings [R, K, T, D], valid [R, K]
    """A grid whose cells without tissue hold the embedding of an empty slide.

    A model without its encoder cannot say what that is; such cells then stay out of the
    interpolation, and windows far from any other cell are unconditional, as published.
    """
    if bool(grid.valid.all()) or model.encoder_spec is None or not model.encoder_weights:
        return grid.embeddings, grid.valid
    side = model.encoder_spec.patch_px
    white = torch.full((1, side, side, 3), LEVEL, dtype=torch.uint8)
    embeddings = grid.embeddings.clone()
    embeddings[~grid.valid] = model.encoder(white)[0]
    return embeddings, torch.ones_like(grid.valid)


def grid_hash(grid: Grid) -> str:
    """sha256 over the embeddings and the valid mask."""
    digest = hashlib.sha256(str(tuple(grid.embeddings.shape)).encode())
    digest.update(grid.embeddings.contiguous().numpy().tobytes())
    digest.update(grid.valid.contiguous().numpy().tobytes())
    return digest.hexdigest()
