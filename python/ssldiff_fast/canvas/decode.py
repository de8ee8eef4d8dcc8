# SPDX-License-Identifier: Apache-2.0
"""From a canvas to pixels: three decoders, one interface, rows in and rows out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ssldiff_fast._checks import check_choice, check_count, check_shape
from ssldiff_fast.canvas.decode_global import GlobalDecoder
from ssldiff_fast.canvas.decode_local import LocalDecoder
from ssldiff_fast.canvas.decode_overlapped import OverlappedDecoder
from ssldiff_fast.canvas.decode_staggered import StaggeredDecoder
from ssldiff_fast.canvas.glass import Glass, GlassDecoder
from ssldiff_fast.canvas.tile_decoder import Pixels, TileDecoder
from ssldiff_fast.canvas.wide import Memory, Where, folder_of, wide_rows
from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel
from ssldiff_fast.models.local_autoencoder import Statistics, norm_names
from ssldiff_fast.ops import WindowPlan
from ssldiff_fast.ops.window_plan import WEIGHTS
from ssldiff_fast.slides.pixel_band import PixelBand

_CALL = "decode"
DECODERS = ("reference", "global", "local")


class RowDecoder(Protocol):
    """Rows of latents in, rows of pixels out, from top to bottom."""

    def first_latent(self, row: int) -> int:
        """The first row of latents that the image is made of from row `row` of latents down."""
        ...

    def decode(
        self, bands: Iterable[Tensor], *, begin: int = 0, progress: bool = False
    ) -> Iterator[Pixels | PixelBand]:
        """Bands [rows, W * f, 3] uint8 of pixels, from the first that belongs to latent row `begin`
        down, of bands [C, n, W] of the canvas from row `first_latent(begin)` down."""
        ...


@dataclass(frozen=True)
class DecodeSettings:
    """How a canvas becomes pixels; belongs to the recipe.

    Args:
        decoder: "reference" (the published overlapped decode), "global" (what one decode of the
            whole canvas would give) or "local" (each latent is decoded about once, or four times).
        stride: distance (y, x) between tiles of the reference, in latents; the published notebook
            has a quarter window. None: that.
        weights: weights of a tile's pixels in the reference's blend, by name.
        fixed: how the local decoder comes by statistics. True: the same everywhere, for tiles of
            any size with the surroundings that they depend on; each latent is decoded about once.
            False: each window's own, for windows that overlap by half as the reference's do by
            three quarters (`StaggeredDecoder`). None: fixed where the model was trained with some,
            or some are given, or it has no norms; otherwise the windows' own, without which an
            autoencoder trained on patches gives other colours.
        tile: side of the local decoder's tiles, where statistics are fixed, in latents; None: two
            windows.
        batch_size: tiles of one call of the network, at most, or as many latents.
    """

    decoder: str = "reference"
    stride: int | tuple[int, int] | None = None
    weights: str = "gaussian"
    fixed: bool | None = None
    tile: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_choice("decoder", self.decoder, DECODERS, call=_CALL)
        check_choice("weights", self.weights, WEIGHTS, call=_CALL)
        check_count("batch_size", self.batch_size, call=_CALL)
        if self.tile is not None:
            check_count("tile", self.tile, call=_CALL)


def open_decoder(
    model: Any,
    size: tuple[int, int],
    settings: DecodeSettings | None = None,
    *,
    window: tuple[int, int] | None = None,
    statistics: Statistics | None = None,
    glass: Glass | None = None,
    scratch: Where = None,
) -> RowDecoder:
    """The decoder of a canvas.

    Args:
        model: a `LatentDiffusion`, an autoencoder, what `sf.adapters.first_stage_from_diffusers`
            returns, or (for the reference) any callable from tiles [B, C, h, w] to images
            [B, 3, h * f, w * f] in [-1, 1].
        size: (H, W) of the canvas in latents.
        settings: which decoder, and how; the reference without them.
        window: (h, w) of a tile of the reference in latents; the model's own unless given.
        statistics: of the local decoder's norms, as `measure_statistics` returns them; the model's
            own, or else measured on the first rows of the canvas.
        glass: what is made of the canvas away from tissue; tiles that are all glass cost nothing.
        scratch: folder for what should not be in memory: rows as wide as the canvas (bands of
            pixels are then a `PixelBand` each, which `numpy.asarray` reads and writers take), and
            maps that the global decoder cannot hold.

    Raises:
        TypeError: the model cannot decode, or not in this way.
        ValueError: a canvas smaller than a tile, or too large to be decoded at once, or of another
            size than the glass.
    """
    options = settings or DecodeSettings(), window, statistics
    if glass is None:
        return _opened(model, size, *options, None, scratch)
    if tuple(size) != tuple(glass.size):
        raise ValueError(
            f"{_CALL}: glass is of a canvas of {glass.size[0]} x {glass.size[1]} latents, but this "
            f"one has {size[0]} x {size[1]}; make it of the same size."
        )
    return GlassDecoder(_opened(model, size, *options, glass, scratch), glass)


def _opened(
    model: Any,
    size: tuple[int, int],
    chosen: DecodeSettings,
    window: tuple[int, int] | None,
    statistics: Statistics | None,
    glass: Glass | None,
    scratch: Where,
) -> RowDecoder:
    """The decoder of what is not glass."""
    tiles = TileDecoder(model, call=_CALL)
    if chosen.decoder == "reference":
        plan = _tiles(size, chosen.stride, _window(model, window))
        return OverlappedDecoder(
            tiles,
            plan,
            weights=chosen.weights,
            batch_size=chosen.batch_size,
            glass=glass,
            wide=wide_rows(scratch),
        )
    if chosen.decoder == "global":
        if not isinstance(tiles.vae, VQModel | AutoencoderKL):
            raise TypeError(
                f"{_CALL}: the global decoder runs the layers of a VQModel or AutoencoderKL of "
                f"ours, but the model has a {type(tiles.vae).__name__}; see "
                "sf.adapters.first_stage_from_diffusers, or use another decoder."
            )
        return GlobalDecoder(tiles, size, scratch=folder_of(scratch))
    if not isinstance(tiles.vae, torch.nn.Module):
        raise TypeError(
            f"{_CALL}: the local decoder fixes statistics within an autoencoder, but model is a "
            f"{type(model).__name__}; pass a LatentDiffusion or an autoencoder, or use the "
            "reference decoder."
        )
    known = statistics or getattr(model, "statistics", None) or None
    return _local(tiles, size, chosen, _window(model, window), known, glass, wide_rows(scratch))


def decode_rows(
    model: Any,
    bands: Iterable[Tensor],
    size: tuple[int, int],
    *,
    progress: bool = False,
    **options: Any,
) -> Iterator[Pixels | PixelBand]:
    """Bands [rows, W * f, 3] uint8 of pixels of the bands [C, n, W] of a canvas.

    Args:
        model, size: as `open_decoder` takes them.
        bands: the canvas from top to bottom, fp32.
        progress: show a progress bar.
        options: of `DecodeSettings`, and those of `open_decoder`.
    """
    names = {field.name for field in dataclasses.fields(DecodeSettings)}
    chosen = {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names}
    decoder = open_decoder(model, size, DecodeSettings(**chosen), **others)
    return decoder.decode(bands, progress=progress)


def decode_image(model: Any, latent: Tensor, **options: Any) -> Pixels:
    """The whole image [H * f, W * f, 3] uint8 of a canvas [C, H, W]; options as `decode_rows`."""
    check_shape("latent", latent, "C H W", call=_CALL)
    size = int(latent.shape[1]), int(latent.shape[2])
    bands = decode_rows(model, [latent], size, **options)
    return np.concatenate([np.asarray(band) for band in bands])


def _local(
    tiles: TileDecoder,
    size: tuple[int, int],
    chosen: DecodeSettings,
    window: tuple[int, int],
    known: Statistics | None,
    glass: Glass | None,
    wide: Memory,
) -> RowDecoder:
    """The local decoder, with fixed statistics or the windows' own."""
    fixed = known is not None or not norm_names(tiles.vae)
    if not (fixed if chosen.fixed is None else chosen.fixed):
        return StaggeredDecoder(
            tiles, size, window, batch_size=chosen.batch_size, glass=glass, wide=wide
        )
    tile = chosen.tile or 2 * max(window)
    return LocalDecoder(
        tiles,
        size,
        window=window,
        channels=_latent_channels(tiles.vae),
        tile=tile,
        batch_size=max(1, chosen.batch_size * window[0] * window[1] // tile**2),
        statistics=known,
        glass=glass,
        wide=wide,
    )


def _window(model: Any, window: tuple[int, int] | None) -> tuple[int, int]:
    window = getattr(model, "window", None) if window is None else window
    if window is None:
        raise ValueError(
            f"{_CALL}: window is None, but this model has no window of its own; pass (h, w)."
        )
    return window


def _tiles(
    size: tuple[int, int],
    stride: int | tuple[int, int] | None,
    window: tuple[int, int],
) -> WindowPlan:
    if stride is None:
        stride = max(1, window[0] // 4), max(1, window[1] // 4)
    return WindowPlan.regular(*size, window, stride)


def _latent_channels(vae: Any) -> int:
    if isinstance(vae, VQModel | AutoencoderKL):
        return vae.embed_dim
    first = next(p for p in vae.decoder.parameters() if p.dim() == 4)
    return int(first.shape[1])
