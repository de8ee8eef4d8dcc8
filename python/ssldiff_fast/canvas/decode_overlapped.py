# SPDX-License-Identifier: Apache-2.0
"""The published overlapped decode, as a stream of finished pixel rows.

An autoencoder trained on patches decodes patches: window-sized tiles, each with its own GroupNorm
statistics and attention, are blended by a Gaussian, and the result is cut off (not rounded) to
eight bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ssldiff_fast.canvas.bands import RowBlend, even_parts
from ssldiff_fast.canvas.glass import Glass
from ssldiff_fast.canvas.row_buffer import RowBuffer
from ssldiff_fast.canvas.tile_decoder import Pixels, TileDecoder, to_bytes
from ssldiff_fast.canvas.wide import Memory
from ssldiff_fast.canvas.windows import WEIGHTS
from ssldiff_fast.ops import WindowPlan
from ssldiff_fast.slides.pixel_band import PixelBand

_CALL = "decode"


class OverlappedDecoder:
    """Blends overlapping tiles (the paper's supplement; golden images hold it to that).

    Args:
        tiles: decodes single tiles.
        plan: the tiles on the canvas; its weights are not used.
        weights: weights of a tile's pixels in the blend, by name. The published "gaussian" is
            still 0.21 at a tile's edge, where its convolutions saw zeros for neighbours:
            half-overlapping tiles leave a faint line there, which "sine" and "hann", about zero at
            the edge, do not.
        batch_size: tiles of one call, at most; belongs to the recipe.
        glass: what tiles that touch no tissue are of; they are not decoded, and others are
            balanced to its white.
        wide: where rows of latents, tiles and pixels wait.
    """

    def __init__(
        self,
        tiles: TileDecoder,
        plan: WindowPlan,
        *,
        weights: str,
        batch_size: int,
        glass: Glass | None = None,
        wide: Memory | None = None,
    ) -> None:
        self._tiles = tiles
        self.plan = plan
        self._weights = weights
        self._batch_size = batch_size
        self._glass = glass
        self._wide = wide or Memory()

    def tiles_of(self, number: int) -> WindowPlan:
        """The tiles of row `number`; in other rows they may lie elsewhere."""
        return self.plan

    def first_latent(self, row: int) -> int:
        """The first row of latents that the image is made of from row `row` of latents down."""
        return self.plan.origins_y[self._first_tile_row(row)]

    def decode(
        self, bands: Iterable[Tensor], *, begin: int = 0, progress: bool = False
    ) -> Iterator[Pixels | PixelBand]:
        """Bands of pixel rows, from the first that belongs to row `begin` of latents down.

        Args:
            bands: [C, n, W] fp32 each, the canvas from row `first_latent(begin)` on.
            begin: first row of latents whose pixels are wanted.
            progress: show a progress bar.

        Yields:
            [rows, W * f, 3] uint8.
        """
        first = self._first_tile_row(begin)
        plan, base = _below(self.plan, first), self.plan.origins_y[first]
        sizes = self.plan.height, self.plan.width
        buffer = RowBuffer(bands, *sizes, begin=base, call=_CALL, wide=self._wide)
        blend: RowBlend | None = None
        skip = 0
        counts = [len(self.tiles_of(first + row).origins_x) for row in range(len(plan.origins_y))]
        with tqdm(total=sum(counts), desc="decoding", unit="tile", disable=not progress) as bar:
            for number, y in enumerate(plan.origins_y):
                buffer.forget(base + y)
                buffer.upto(base + y + plan.window[0])
                tiles = self._row(buffer, first + number)
                bar.update(counts[number])
                if blend is None:
                    factor = pixels_of_latent(tiles, plan)
                    blend = RowBlend(self._blended(plan, factor), self._wide)
                    skip = (begin - base) * factor
                final = blend.push(tiles)
                if final.stop > skip:
                    rows = range(max(final.start, skip), final.stop)
                    yield self._band(blend, rows, plan.width * factor)

    def _blended(self, plan: WindowPlan, factor: int) -> WindowPlan:
        """The tiles in pixels, with the weights of the blend."""
        sizes = [size * factor for size in plan.window]
        return plan.scaled(factor, *(WEIGHTS[self._weights](size) for size in sizes))

    def _band(self, blend: RowBlend, rows: range, width: int) -> Pixels | PixelBand:
        band = self._wide.pixels(len(rows), width)
        for left, piece in blend.pieces(rows):
            band[:, left : left + piece.shape[2]] = to_bytes(piece)
        return band

    def _first_tile_row(self, row: int) -> int:
        bottoms = [origin + self.plan.window[0] for origin in self.plan.origins_y]
        # Below the last row nothing is left, and the last tiles make nothing.
        below = (number for number, bottom in enumerate(bottoms) if bottom > row)
        return next(below, len(bottoms) - 1)

    def _row(self, buffer: RowBuffer, number: int) -> Tensor:
        """One row of tiles, decoded: [Q, 3, h * f, w * f] fp32."""
        plan = self.tiles_of(number)
        top, (h, w) = plan.origins_y[number], plan.window
        wanted, made = self._wanted(buffer, number)
        for columns in even_parts(wanted, self._batch_size):
            origins = [plan.origins_x[column] for column in columns]
            left = origins[0]
            latents = buffer.read(top, top + h, range(left, origins[-1] + w))
            crops = torch.stack([latents[:, :, x - left : x - left + w] for x in origins])
            tiles = self._tiles(crops, [(top, x) for x in origins])
            if self._glass is not None:
                tiles = self._glass.balanced(tiles)
            if made is None:
                made = self._wide.empty(len(wanted), *tiles.shape[1:], like=tiles)
            for column, tile in zip(columns, tiles):
                made[column] = tile
            self._wide.release(made)
        assert made is not None
        return made

    def _wanted(self, buffer: RowBuffer, number: int) -> tuple[Sequence[int], Tensor | None]:
        """Columns of the tiles that are decoded, and the row of tiles where others are plain."""
        plan, glass = self.tiles_of(number), self._glass
        count = len(plan.origins_x)
        if glass is None:
            return range(count), None
        columns = glass.mask.columns(plan, number).tolist()
        if len(columns) == count:
            return columns, None
        h, w = (side * glass.factor for side in plan.window)
        made = self._wide.empty(count, 3, h, w, like=buffer.held[0])
        for tile in made:
            tile.fill_(glass.value)
        self._wide.release(made)
        return columns, made


def _below(plan: WindowPlan, first: int) -> WindowPlan:
    """The windows from window row `first` down, on the canvas that begins with them."""
    base = plan.origins_y[first]
    origins = tuple(y - base for y in plan.origins_y[first:])
    return dataclasses.replace(plan, height=plan.height - base, origins_y=origins)


def pixels_of_latent(decoded: Tensor, plan: WindowPlan) -> int:
    """Along one side, by decoded tiles [..., h * f, w * f]."""
    height, width = decoded.shape[-2:]
    factor = int(height) // plan.window[0]
    if (height, width) != (plan.window[0] * factor, plan.window[1] * factor) or factor < 1:
        raise RuntimeError(
            f"{_CALL}: a tile of {plan.window} latents was decoded to {height} x {width} "
            "pixels, but a whole multiple of the tile was expected; use the model's own decoder."
        )
    return factor
