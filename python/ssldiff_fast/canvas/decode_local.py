# SPDX-License-Identifier: Apache-2.0
"""Disjoint tiles with a halo: each latent is decoded about once, and tiles fit without a blend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ssldiff_fast.canvas.glass import Glass
from ssldiff_fast.canvas.row_buffer import RowBuffer
from ssldiff_fast.canvas.tile_decoder import Pixels, TileDecoder, to_bytes
from ssldiff_fast.canvas.tile_span import grouped, sample_origins
from ssldiff_fast.canvas.wide import Memory
from ssldiff_fast.models.local_autoencoder import Statistics, measure_statistics
from ssldiff_fast.models.region_decoder import Reach, region_decoder
from ssldiff_fast.slides.pixel_band import PixelBand

_CALL = "decode"


class LocalDecoder:
    """Tiles side by side, each decoded with its surroundings, of which its own part is kept.

    With fixed statistics a tile's pixels are what the whole canvas would give: convolutions are
    exact, and attention keeps to the window around what attends (`models.region_decoder`). They do
    not depend on the size of tiles but for float32's rounding.

    An autoencoder trained on patches tells hues by the statistics of each patch, which fixed ones
    take from it: only one that was trained with both gives the reference's colours.

    Args:
        tiles: the decoder of the model as it is.
        size: (H, W) of the canvas in latents.
        window: (h, w) of what the autoencoder was trained on, in latents: attention is kept within
            such windows, and statistics are measured on them.
        channels: of its latents.
        tile: side of a tile without its surroundings, in latents.
        batch_size: tiles of one call, at most; belongs to the recipe.
        statistics: of the norms; measured on windows of the first rows of tiles without them.
        glass: what is painted over the pixels later; tiles that it hides are not decoded.
        wide: where rows of latents and pixels wait.
    """

    def __init__(
        self,
        tiles: TileDecoder,
        size: tuple[int, int],
        *,
        window: tuple[int, int],
        channels: int,
        tile: int,
        batch_size: int,
        statistics: Statistics | None = None,
        glass: Glass | None = None,
        wide: Memory | None = None,
    ) -> None:
        self._wide = wide or Memory()
        self._own = tiles
        self._size = size
        self._window = window
        self._channels = channels
        self.tile = tile
        self._batch_size = batch_size
        self._glass = glass
        self.statistics = statistics
        # What a tile needs does not depend on statistics, which the first rows may have to tell.
        self._take({} if statistics is None else statistics)

    def _take(self, statistics: Statistics) -> None:
        network = region_decoder(self._own.vae, statistics, self._window, self._channels)
        self._regions, self._tiles = network, self._own.with_vae(network)

    def _measure(self, latents: Tensor) -> None:
        """Fix the statistics of windows spread over [C, n, W] latents."""
        h, w = self._window
        rows, columns = latents.shape[1:]
        origins = sample_origins(rows, columns, self._window)
        windows = [latents[:, y : y + h, x : x + w] for y, x in origins]
        parameter = next(self._own.vae.parameters())
        inputs = self._own.unscaled(torch.stack(windows)).to(parameter.device, parameter.dtype)
        self.statistics = measure_statistics(self._own.vae, self._own.vae.decode, inputs)
        self._take(self.statistics)

    def _reach(self, top: int, axis: int) -> Reach:
        """Of the tile whose first latent is `top`."""
        size = self._size[axis]
        reach: Reach = self._regions.reach((top, min(top + self.tile, size)), size, axis=axis)
        return reach

    def first_latent(self, row: int) -> int:
        """The first row of latents that the image is made of from row `row` of latents down."""
        # Below the last row nothing is left, and the last tiles make nothing.
        top = min(row, self._size[0] - 1) // self.tile * self.tile
        return self._reach(top, 0).read[0]

    def decode(
        self, bands: Iterable[Tensor], *, begin: int = 0, progress: bool = False
    ) -> Iterator[Pixels | PixelBand]:
        """Bands [rows, W * f, 3] uint8, from latent row `begin` down.

        Args:
            bands: [C, n, W] fp32 each, the canvas from row `first_latent(begin)` on.
            begin: first row of latents whose pixels are wanted.
            progress: show a progress bar.

        Raises:
            ValueError: `begin` is not 0 and no statistics are known: those of other rows would
                give other pixels.
        """
        if begin and self.statistics is None:
            raise ValueError(
                f"{_CALL}: begin is {begin}, but the local decoder has no statistics yet; pass "
                "those that the first rows were decoded with."
            )
        height, width = self._size
        first = self.first_latent(begin)
        buffer = RowBuffer(bands, height, width, begin=first, call=_CALL, wide=self._wide)
        tops = range(begin // self.tile * self.tile, height, self.tile)
        total = len(tops) * -(-width // self.tile)
        with tqdm(total=total, desc="decoding", unit="tile", disable=not progress) as bar:
            for top in tops:
                rows = self._reach(top, 0)
                buffer.forget(rows.read[0])
                buffer.upto(rows.read[1])
                if self.statistics is None:
                    self._measure(buffer.read(*rows.read))
                band = self._row(buffer, rows, bar)
                factor = len(band) // (rows.tile[1] - rows.tile[0])
                yield band[max(0, begin - top) * factor :]

    def _row(self, buffer: RowBuffer, rows: Reach, bar: tqdm) -> Pixels | PixelBand:
        """One row of tiles: [h * f, W * f, 3]."""
        width, glass = self._size[1], self._glass
        reaches = [self._reach(left, 1) for left in range(0, width, self.tile)]
        band: Pixels | PixelBand | None = None
        if glass is not None:
            reaches = [reach for reach in reaches if not glass.is_plain(rows.tile, reach.tile)]
            height = (rows.tile[1] - rows.tile[0]) * glass.factor
            band = self._wide.pixels(height, width * glass.factor)
        for part in grouped(reaches, lambda reach: reach.shape, self._batch_size):
            for columns, made in zip(part, self._decode(buffer, rows, part)):
                factor = made.shape[1] // (columns.tile[1] - columns.tile[0])
                if band is None:
                    band = self._wide.pixels(len(made), width * factor)
                left = columns.tile[0] * factor
                band[:, left : left + made.shape[1]] = made
            bar.update(len(part))
        bar.update(-(-width // self.tile) - len(reaches))
        assert band is not None
        return band

    def _decode(self, buffer: RowBuffer, rows: Reach, part: list[Reach]) -> list[Pixels]:
        """Tiles of one row, of one shape."""
        across = range(part[0].read[0], part[-1].read[1])
        latents = buffer.read(*rows.read, across)
        begins = [columns.read[0] - across.start for columns in part]
        width = part[0].read[1] - part[0].read[0]
        regions = torch.stack([latents[:, :, x : x + width] for x in begins])
        origins = [(rows.tile[0], columns.tile[0]) for columns in part]
        images = self._tiles(regions, origins, rows=rows, columns=part[0])
        return [to_bytes(image) for image in images]
