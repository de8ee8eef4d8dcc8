# SPDX-License-Identifier: Apache-2.0
"""An image to a canvas in disjoint tiles with a halo: each pixel is encoded about once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ssldiff_fast.canvas.row_buffer import RowBuffer
from ssldiff_fast.canvas.tile_decoder import TileEncoder
from ssldiff_fast.canvas.tile_span import Span, batches, sample_origins
from ssldiff_fast.models.local_autoencoder import (
    Statistics,
    local_autoencoder,
    measure_statistics,
)

_CALL = "encode_rows"


class LocalEncoder:
    """Tiles side by side, each encoded with its surroundings, of which its own part is kept.

    With fixed statistics and a halo of the network's receptive field, a tile's latents are what
    convolutions of the whole image would give; attention sees the tile and its halo.

    Args:
        tiles: the encoder of the model as it is.
        size: (H, W) of the canvas in latents.
        window: (h, w) of what the autoencoder was trained on, in latents: attention is kept within
            such windows, and statistics are measured on them.
        halo: latents whose pixels are encoded around a tile and thrown away; see `encoder_halo`.
        tile: side of a tile without its halo, in latents.
        batch_size: tiles of one call, at most.
        statistics: of the norms; measured on windows of the first rows of tiles without them.
    """

    def __init__(
        self,
        tiles: TileEncoder,
        size: tuple[int, int],
        *,
        window: tuple[int, int],
        halo: int,
        tile: int,
        batch_size: int,
        statistics: Statistics | None = None,
    ) -> None:
        self._own = tiles
        self._size = size
        self._window = window
        self.tile = tile
        self.halo = halo
        self._batch_size = batch_size
        self._tiles: TileEncoder | None = None
        self.statistics: Statistics | None = None
        if statistics is not None:
            self._fix(statistics)

    def _fix(self, statistics: Statistics) -> None:
        self.statistics = statistics
        vae = local_autoencoder(self._own.vae, statistics, self._window)
        self._tiles = self._own.with_vae(vae)

    def _measure(self, pixels: Tensor) -> None:
        """Fix the statistics of windows spread over [3, n * f, W * f] pixels."""
        f = self._own.factor
        h, w = (side * f for side in self._window)
        origins = sample_origins(pixels.shape[1] // f, self._size[1], self._window)
        windows = [pixels[:, y * f : y * f + h, x * f : x * f + w] for y, x in origins]
        parameter = next(self._own.vae.parameters())
        inputs = torch.stack(windows).to(parameter.device, parameter.dtype)
        self._fix(measure_statistics(self._own.vae, self._own.vae.encode, inputs))

    def encode(self, bands: Iterable[Tensor], *, progress: bool = False) -> Iterator[Tensor]:
        """Bands [C, n, W] fp32 of the canvas, of bands [3, n, W * f] of the image in [-1, 1]."""
        height, width = self._size
        factor = self._own.factor
        buffer = RowBuffer(
            bands, height * factor, width * factor, begin=0, call=_CALL, name="pixels"
        )
        tops = range(0, height, self.tile)
        total = len(tops) * -(-width // self.tile)
        with tqdm(total=total, desc="encoding", unit="tile", disable=not progress) as bar:
            for top in tops:
                rows = Span.around(top, self.tile, self.halo, height)
                buffer.forget(rows.begin * factor)
                buffer.upto(rows.end * factor)
                pixels = buffer.read(rows.begin * factor, rows.end * factor)
                if self._tiles is None:
                    self._measure(pixels)
                yield self._row(pixels, rows, bar)

    def _row(self, pixels: Tensor, rows: Span, bar: tqdm) -> Tensor:
        """One row of tiles: [C, kept, W]."""
        assert self._tiles is not None
        factor = self._own.factor
        made = []
        for part in batches(self._size[1], self.tile, self.halo, self._batch_size):
            regions = [pixels[:, :, span.begin * factor : span.end * factor] for span in part]
            origins = [(rows.top * factor, span.top * factor) for span in part]
            latents = self._tiles(torch.stack(regions), origins)
            made += [latent[:, rows.within(), span.within()] for latent, span in zip(latents, part)]
            bar.update(len(part))
        return torch.cat(made, dim=2)
