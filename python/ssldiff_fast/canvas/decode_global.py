# SPDX-License-Identifier: Apache-2.0
"""What one decode of the whole canvas would give, in bands of rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ssldiff_fast.canvas.feature_map import FeatureMap
from ssldiff_fast.canvas.layerwise import ATTENTION_LIMIT, Layerwise, check_attention
from ssldiff_fast.canvas.row_buffer import RowBuffer
from ssldiff_fast.canvas.tile_decoder import Pixels, TileDecoder, to_bytes

_CALL = "decode"


class GlobalDecoder:
    """The whole canvas at once: its statistics, its attention, no tiles.

    Args:
        tiles: the decoder of the model; its autoencoder must be a VQModel or AutoencoderKL.
        size: (H, W) of the canvas in latents.
        scratch: folder for maps of features that do not fit into memory; the system's own for
            temporary files without it.
        attention_limit: latents of a canvas, at most.

    Raises:
        ValueError: the canvas has more latents than that.
    """

    def __init__(
        self,
        tiles: TileDecoder,
        size: tuple[int, int],
        *,
        scratch: Path | None = None,
        attention_limit: int = ATTENTION_LIMIT,
    ) -> None:
        check_attention(size, attention_limit, call=_CALL)
        self._tiles = tiles
        self._size = size
        self._scratch = scratch
        self._limit = attention_limit

    def first_latent(self, row: int) -> int:
        """0: every pixel depends on the whole canvas."""
        return 0

    def decode(
        self, bands: Iterable[Tensor], *, begin: int = 0, progress: bool = False
    ) -> Iterator[Pixels]:
        """Bands [rows, W * f, 3] uint8, from latent row `begin` down, of the whole canvas.

        Raises:
            RuntimeError: the image became NaN or infinite.
        """
        height, width = self._size
        canvas = RowBuffer(bands, height, width, begin=0, call=_CALL)
        canvas.upto(height)
        latent, vae = self._tiles.unscaled(canvas.read(0, height)), self._tiles.vae
        factor = vae.downsample_factor
        skip, above = begin * factor, 0
        bar = tqdm(total=height * factor, desc="decoding", unit="row", disable=not progress)
        with bar, tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            like = next(vae.parameters())
            network = Layerwise(vae, Path(folder), attention_limit=self._limit)
            source = FeatureMap.of(latent.to(like.device), Path(folder), like)
            for band in network.decode(source):
                if not bool(torch.isfinite(band).all()):
                    raise RuntimeError(
                        f"{_CALL}: the image became NaN or infinite in pixel rows {above} to "
                        f"{above + band.shape[2]}; decode in float32, or check the latents."
                    )
                rows = band[0, :, max(0, skip - above) :].float()
                above += band.shape[2]
                bar.update(band.shape[2])
                if rows.shape[1]:
                    yield to_bytes(rows)
