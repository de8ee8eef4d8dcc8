# SPDX-License-Identifier: Apache-2.0
"""An image to a canvas as the published decode goes back: overlapping tiles, blended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ssldiff_fast.canvas.bands import blend_window_rows, micro_batches
from ssldiff_fast.canvas.row_buffer import RowBuffer
from ssldiff_fast.canvas.tile_decoder import TileEncoder
from ssldiff_fast.ops import WindowPlan, gather_windows

_CALL = "encode_rows"


class OverlappedEncoder:
    """Blends the latents of overlapping tiles.

    An autoencoder trained on patches encodes patches: each tile has its own GroupNorm statistics
    and attention.

    Args:
        tiles: encodes single tiles.
        plan: the tiles on the canvas, with the weights of the blend.
        batch_size: tiles of one call, at most.
    """

    def __init__(self, tiles: TileEncoder, plan: WindowPlan, *, batch_size: int) -> None:
        self._tiles = tiles
        self.plan = plan
        self._batch_size = batch_size

    def encode(self, bands: Iterable[Tensor], *, progress: bool = False) -> Iterator[Tensor]:
        """Bands [C, n, W] fp32 of the canvas, of bands [3, n, W * f] of the image in [-1, 1]."""
        plan, factor = self.plan, self._tiles.factor
        ones = (torch.ones(side * factor) for side in plan.window)
        pixels = plan.scaled(factor, *ones)
        buffer = RowBuffer(bands, pixels.height, pixels.width, begin=0, call=_CALL, name="pixels")
        with tqdm(total=len(plan), desc="encoding", unit="tile", disable=not progress) as bar:

            def row(number: int) -> Tensor:
                origin = pixels.origins_y[number]
                buffer.forget(origin)
                buffer.upto(origin + pixels.window[0])
                made = self._row(buffer.read(origin, buffer.end), pixels, number)
                bar.update(len(plan.origins_x))
                return made

            made = (row(number) for number in range(len(plan.origins_y)))
            yield from blend_window_rows(plan, made)

    def _row(self, rows: Tensor, pixels: WindowPlan, number: int) -> Tensor:
        """One row of tiles, encoded: [Q, C, h, w] fp32."""
        count, top = len(pixels.origins_x), pixels.origins_y[number]
        made = []
        for columns in micro_batches(count, self._batch_size):
            crops = gather_windows(rows, pixels, number * count + columns, first_row=top)
            origins = [(top, pixels.origins_x[column]) for column in columns.tolist()]
            made.append(self._tiles(crops, origins))
        return torch.cat(made)[:count]
