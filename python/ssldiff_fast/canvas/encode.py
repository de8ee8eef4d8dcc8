# SPDX-License-Identifier: Apache-2.0
"""From pixels to a canvas, in the three ways of the decoders, rows in and rows out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssldiff_fast._checks import check_choice, check_count
from ssldiff_fast.canvas.encode_local import LocalEncoder
from ssldiff_fast.canvas.encode_overlapped import OverlappedEncoder
from ssldiff_fast.canvas.feature_map import FeatureMap
from ssldiff_fast.canvas.layerwise import ATTENTION_LIMIT, Layerwise, check_attention
from ssldiff_fast.canvas.row_buffer import RowBuffer
from ssldiff_fast.canvas.tile_decoder import Pixels, TileEncoder, from_bytes
from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel
from ssldiff_fast.models.local_autoencoder import Statistics, encoder_halo
from ssldiff_fast.ops import WindowPlan
from ssldiff_fast.ops.window_plan import WEIGHTS

_CALL = "encode_rows"
WAYS = ("reference", "global", "local")


def encode_rows(
    model: Any,
    bands: Iterable[Pixels],  # [n, W_px, 3] uint8 each
    size_px: tuple[int, int],
    *,
    way: str = "reference",
    stride: int | tuple[int, int] | None = None,
    weights: str = "hann",
    tile: int | None = None,
    batch_size: int = 8,
    window: tuple[int, int] | None = None,
    statistics: Statistics | None = None,
    scratch: Path | None = None,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Bands [C, n, W] fp32 of the canvas of an image, which `decode_rows` makes the image of again.

    Args:
        model: a `LatentDiffusion`, an autoencoder, or what
            `sf.adapters.first_stage_from_diffusers` returns.
        bands: the image from top to bottom.
        size_px: (H, W) of the image in pixels, multiples of the autoencoder's factor.
        way: "reference" (window-sized tiles as the autoencoder was trained on, blended where they
            overlap: what a model trained on patches knows), "global" (what one encoding of the
            whole image would give) or "local" (disjoint tiles with a halo and fixed statistics).
        stride: distance (y, x) between the reference's tiles in latents; half a window without it.
        weights: weights of a tile's latents in the reference's blend, by name.
        tile: side of the local way's tiles without their halo, in latents; two windows without it.
        batch_size: tiles of one call of the network, at most.
        window: (h, w) of a tile of the reference in latents; the model's own unless given.
        statistics: of the local way's norms, as `measure_statistics` returns them; measured on the
            first rows without them.
        scratch: folder for what the global way cannot hold in memory.
        progress: show a progress bar.

    Raises:
        TypeError: the model cannot encode, or not in this way; pixels that are not uint8.
        ValueError: a size that the factor does not divide, an image smaller than a tile or too
            large for the global way, bands that are not of this image.
        RuntimeError: latents became NaN or infinite.
    """
    check_choice("way", way, WAYS, call=_CALL)
    check_choice("weights", weights, WEIGHTS, call=_CALL)
    check_count("batch_size", batch_size, call=_CALL)
    if tile is not None:
        check_count("tile", tile, call=_CALL)
    tiles = TileEncoder(model, call=_CALL)
    size = _latents(size_px, tiles.factor)
    rows = (_checked(band, size_px[1]) for band in bands)
    if way == "global":
        return _global(tiles, rows, size, scratch)
    window = window or getattr(model, "window", None)
    if window is None:
        raise ValueError(
            f"{_CALL}: window is None, but this model has no window of its own; pass (h, w)."
        )
    if way == "reference":
        half = max(1, window[0] // 2), max(1, window[1] // 2)
        plan = WindowPlan.regular(*size, window, half if stride is None else stride, weights)
        return OverlappedEncoder(tiles, plan, batch_size=batch_size).encode(rows, progress=progress)
    if not isinstance(tiles.vae, torch.nn.Module):
        raise TypeError(
            f"{_CALL}: the local way fixes statistics within an autoencoder, but model is a "
            f"{type(model).__name__}; pass a LatentDiffusion or an autoencoder, or use the "
            "reference."
        )
    local = LocalEncoder(
        tiles,
        size,
        window=window,
        halo=-(-encoder_halo(tiles.vae) // tiles.factor),
        tile=tile or 2 * max(window),
        batch_size=batch_size,
        statistics=statistics,
    )
    return local.encode(rows, progress=progress)


def encode_image(
    model: Any,
    image: Pixels,  # [H_px, W_px, 3] uint8
    **options: Any,
) -> Tensor:
    """The whole canvas [C, H, W] fp32 of an image; options as `encode_rows`."""
    _check_pixels(image)
    size_px = int(image.shape[0]), int(image.shape[1])
    return torch.cat(list(encode_rows(model, [image], size_px, **options)), dim=1)


def _global(
    tiles: TileEncoder, rows: Iterable[Tensor], size: tuple[int, int], scratch: Path | None
) -> Iterator[Tensor]:
    if not isinstance(tiles.vae, VQModel | AutoencoderKL):
        raise TypeError(
            f"{_CALL}: the global way runs the layers of a VQModel or AutoencoderKL of ours, but "
            f"the model has a {type(tiles.vae).__name__}; see "
            "sf.adapters.first_stage_from_diffusers, or use another way."
        )
    check_attention(size, ATTENTION_LIMIT, call=_CALL)
    return _layer_by_layer(tiles, tiles.vae, rows, size, scratch)


def _layer_by_layer(
    tiles: TileEncoder,
    vae: VQModel | AutoencoderKL,
    rows: Iterable[Tensor],
    size: tuple[int, int],
    scratch: Path | None,
) -> Iterator[Tensor]:
    height, width = (side * tiles.factor for side in size)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        image = FeatureMap(3, height, width, Path(folder), next(vae.parameters()))
        buffer = RowBuffer(rows, height, width, begin=0, call=_CALL, name="pixels")
        while buffer.end < height:
            buffer.upto(buffer.end + 1)
            image.write(buffer.begin, buffer.read(buffer.begin, buffer.end)[None])
            buffer.forget(buffer.end)
        for band in Layerwise(vae, Path(folder)).encode(image):
            if not bool(torch.isfinite(band).all()):
                raise RuntimeError(
                    f"{_CALL}: the latent became NaN or infinite; encode in float32, or check the "
                    "autoencoder's weights."
                )
            yield tiles.scaled(band[0].float())


def _latents(size_px: tuple[int, int], factor: int) -> tuple[int, int]:
    height, width = (check_count("size_px", side, call=_CALL) for side in size_px)
    if height % factor or width % factor:
        raise ValueError(
            f"{_CALL}: the image is {height} x {width} pixels, but its sides must be multiples of "
            f"{factor}, the pixels of a latent; crop or pad it."
        )
    return height // factor, width // factor


def _checked(band: Pixels, width: int) -> Tensor:
    """A band of pixels as the network takes them: [3, n, W_px]."""
    _check_pixels(band)
    if band.shape[1] != width:
        raise ValueError(
            f"{_CALL}: a band is {band.shape[1]} pixels wide, but the image is {width}; pass whole "
            "rows of one image."
        )
    return from_bytes(band)


def _check_pixels(image: Pixels) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = getattr(image, "dtype", type(image).__name__)
        raise TypeError(f"{_CALL}: the pixels are {kind}, but a uint8 array was expected.")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"{_CALL}: the pixels have shape {list(image.shape)}, but RGB [H, W, 3] was expected."
        )
