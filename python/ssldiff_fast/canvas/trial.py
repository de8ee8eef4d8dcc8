# SPDX-License-Identifier: Apache-2.0
"""Before a run: does a micro-batch fit into memory? Halved until it does, never in the middle."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from ssldiff_fast.canvas.decode import DecodeSettings, open_decoder
from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.canvas.tile_decoder import TileDecoder
from ssldiff_fast.models.execution import is_out_of_memory
from ssldiff_fast.models.ldm import LatentDiffusion

logger = logging.getLogger(__name__)

# Where a trial is made. The CPU's allocator promises memory that is not there, so none fails.
TRIED = ("cuda",)
_T = 500.0


def fitting(what: str, size: int, trial: Callable[[int], object], *, most: int) -> int:
    """The first of `size`, its half, the half of that, ... that fits into memory.

    Args:
        what: comes in batches, in words, for messages.
        size: of a batch, at most.
        trial: runs a batch of so many.
        most: so many come together at once, whatever `size` is.

    Returns:
        A size with which the largest batch there can be has run. The log says so where it is not
        `size`.

    Raises:
        MemoryError: not even one fits.
    """
    taken, failed = size, 0
    while True:
        batch = min(most, taken)
        if batch == failed or not _fits(trial, batch):
            if batch == 1:
                raise MemoryError(
                    f"not even one of the {what} fits into the memory there is; use a smaller "
                    "dtype, or a device with more."
                )
            taken, failed = taken // 2, batch
            continue
        if taken != size:
            logger.warning(
                "%d %s at once do not fit into memory: %d are taken, as the recipe says",
                size,
                what,
                taken,
            )
        return taken


def _fits(trial: Callable[[int], object], batch: int) -> bool:
    try:
        trial(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    # Only here are the frames gone that held what did fit.
    torch.cuda.empty_cache()
    return False


def fitting_windows(
    denoiser: LDMDenoiser, size: int, *, most: int, guided: bool, reuses: bool = False
) -> int:
    """`fitting` for windows of the network, on a GPU; elsewhere `size`.

    Args:
        denoiser: of the run: what it captures here is what it replays later.
        size: windows of one network call, at most.
        most: windows of one row of the canvas.
        guided: whether each is a pair.
        reuses: whether the outermost level is evaluated alone too.
    """
    if next(denoiser.model.unet.parameters()).device.type not in TRIED:
        return size
    trial = partial(evaluate, denoiser, guided=guided, reuses=reuses)
    return fitting("windows", size, trial, most=most)


@torch.no_grad()
def evaluate(denoiser: LDMDenoiser, batch: int, *, guided: bool, reuses: bool = False) -> float:
    """The seconds of one evaluation of `batch` windows of zeros, or of one and one that reuses."""
    device = next(denoiser.model.unet.parameters()).device
    x = torch.zeros(batch, denoiser.channels, *denoiser.window, device=device)
    cells = torch.ones(batch, denoiser.conditioner.tokens, denoiser.conditioner.width)
    state = denoiser.prepare(cells, cells[:1] if guided else None)
    index = torch.arange(batch)
    start = time.perf_counter()
    if reuses:
        _, deep = denoiser.with_deep(x, _T, state, index)
        denoiser.with_deep(x, _T, state, index, deep)[0].sum().item()
    else:
        denoiser(x, _T, state, index).sum().item()
    return time.perf_counter() - start


def fitting_tiles(
    model: LatentDiffusion, size: tuple[int, int], settings: DecodeSettings
) -> DecodeSettings:
    """`fitting` for the tiles of a decoder, on a GPU; elsewhere the settings as they are.

    Args:
        model: whose autoencoder decodes.
        size: (H, W) of the canvas in latents.
        settings: of the decode, with the tiles of one call, at most.
    """
    device = next(model.vae.parameters()).device
    if device.type not in TRIED or settings.decoder == "global":  # the latter goes by layers
        return settings

    def windows(batch: int) -> None:
        tiles = torch.zeros(batch, model.latent_channels, *model.window, device=device)
        TileDecoder(model, call="decode")(tiles, [(0, 0)] * batch)

    def local(batch: int) -> None:
        # Tiles at the ends are smaller than those between.
        side = settings.tile or 2 * max(model.window)
        rows, columns = min(size[0], 3 * side), min(size[1], (batch + 2) * side)
        latents = torch.zeros(model.latent_channels, rows, columns, device=device)
        chosen = dataclasses.replace(settings, batch_size=batch)
        for _ in zip(range(2), open_decoder(model, (rows, columns), chosen).decode([latents])):
            pass

    most = settings.batch_size
    batch = fitting("tiles", most, local if settings.decoder == "local" else windows, most=most)
    return dataclasses.replace(settings, batch_size=batch)
