# SPDX-License-Identifier: Apache-2.0
"""The published overlapped decode, as a stream of finished pixel rows.

An autoencoder trained on patches decodes patches: window-sized tiles, each with its own GroupNorm
statistics and attention, are blended by a Gaussian, and the result is cut off (not rounded) to
eight bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ssldiff_fast.canvas.bands import blend_window_rows, micro_batches
from ssldiff_fast.canvas.row_buffer import RowBuffer
from ssldiff_fast.canvas.tile_decoder import Pixels, TileDecoder, to_bytes
from ssldiff_fast.canvas.windows import WEIGHTS
from ssldiff_fast.ops import WindowPlan, gather_windows

_CALL = "decode"


class OverlappedDecoder:
    """Blends overlapping tiles (the paper's supplement; golden images hold it to that).

    Args:
        tiles: decodes single tiles.
        plan: the tiles on the canvas; its weights are not used.
        weights: weights of a tile's pixels in the blend, by name. The published "gaussian" is
            still 0.21 at a tile's edge, where its convolutions saw zeros for neighbours:
            half-overlapping tiles leave a faint line there, which "hann", zero at the edge, does
            not.
        batch_size: tiles of one call, at most; belongs to the recipe.
        rows_held: tile rows gathered before they are blended; changes memory, not the result.
    """

    def __init__(
        self,
        tiles: TileDecoder,
        plan: WindowPlan,
        *,
        weights: str,
        batch_size: int,
        rows_held: int | None = None,
    ) -> None:
        self._tiles = tiles
        self.plan = plan
        self._weights = weights
        self._batch_size = batch_size
        self._rows_held = rows_held

    def first_latent(self, row: int) -> int:
        """The first row of latents that the image is made of from row `row` of latents down."""
        return self.plan.origins_y[self._first_tile_row(row)]

    def decode(
        self, bands: Iterable[Tensor], *, begin: int = 0, progress: bool = False
    ) -> Iterator[Pixels]:
        """Bands of pixel rows, from the first that belongs to row `begin` of latents down.

        Args:
            bands: [C, n, W] fp32 each, the canvas from row `first_latent(begin)` on.
            begin: first row of latents whose pixels are wanted.
            progress: show a progress bar.

        Yields:
            [rows, W * f, 3] uint8.
        """
        first = self._first_tile_row(begin)
        rest = _below(self.plan, first)
        base = self.plan.origins_y[first]
        buffer = RowBuffer(bands, self.plan.height, self.plan.width, begin=base, call=_CALL)
        count = len(rest.origins_x)
        with tqdm(total=len(rest), desc="decoding", unit="tile", disable=not progress) as bar:

            def row(number: int) -> Tensor:
                origin = base + rest.origins_y[number]
                buffer.forget(origin)
                latents = buffer.upto(origin + rest.window[0])
                decoded = self._row(latents, rest, number, origin)
                bar.update(count)
                return decoded

            top = row(0)
            factor = _factor(top, rest)
            sizes = [size * factor for size in rest.window]
            pixels = rest.scaled(factor, *(WEIGHTS[self._weights](size) for size in sizes))
            rows = (top if number == 0 else row(number) for number in range(len(rest.origins_y)))
            skip = (begin - base) * factor
            for band in blend_window_rows(pixels, rows, rows_held=self._rows_held):
                if skip < band.shape[1]:
                    yield to_bytes(band[:, skip:])
                skip = max(0, skip - band.shape[1])

    def _first_tile_row(self, row: int) -> int:
        bottoms = [origin + self.plan.window[0] for origin in self.plan.origins_y]
        # Below the last row nothing is left, and the last tiles make nothing.
        below = (number for number, bottom in enumerate(bottoms) if bottom > row)
        return next(below, len(bottoms) - 1)

    def _row(self, latents: Tensor, plan: WindowPlan, number: int, origin: int) -> Tensor:
        """One row of tiles, decoded: [Q, 3, h * f, w * f] fp32."""
        count = len(plan.origins_x)
        decoded = []
        for columns in micro_batches(count, self._batch_size):
            index = number * count + columns
            crops = gather_windows(latents, plan, index, first_row=plan.origins_y[number])
            places = [(origin, plan.origins_x[column]) for column in columns.tolist()]
            decoded.append(self._tiles(crops, places))
        return torch.cat(decoded)[:count]


def _below(plan: WindowPlan, first: int) -> WindowPlan:
    """The windows from window row `first` down, on the canvas that begins with them."""
    base = plan.origins_y[first]
    origins = tuple(y - base for y in plan.origins_y[first:])
    return dataclasses.replace(plan, height=plan.height - base, origins_y=origins)


def _factor(decoded: Tensor, plan: WindowPlan) -> int:
    height, width = decoded.shape[-2:]
    factor = int(height) // plan.window[0]
    if (height, width) != (plan.window[0] * factor, plan.window[1] * factor) or factor < 1:
        raise RuntimeError(
            f"{_CALL}: a tile of {plan.window} latents was decoded to {height} x {width} "
            "pixels, but a whole multiple of the tile was expected; use the model's own decoder."
        )
    return factor
