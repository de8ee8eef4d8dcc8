# SPDX-License-Identifier: Apache-2.0
"""An autoencoder applied to a whole image, layer by layer, in bands of rows.

What one call on the whole image would compute, without its memory: between two GroupNorms a layer
sees one row beyond its own on either side, so each layer runs over bands of rows, from one map of
features to the next, while the statistics of what it writes are combined for the norm that
follows. (Averaging the variances of tiles instead would leave out how their means differ.) Maps
that are larger than a limit lie in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast.canvas.feature_map import FeatureMap
from ssldiff_fast.models.autoencoder import Autoencoder, AutoencoderKL, VQModel
from ssldiff_fast.models.autoencoder_blocks import AttnBlock, Middle, ResnetBlock
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.ops import GroupNormStatistics

# Features of one band, its input and its output together, at most.
_BAND_BYTES = 64 * 2**20
# Queries of one call of attention, so that the scores of all of them never exist at once.
_QUERIES = 4096
# Attention takes the square of the positions: 2^18 of 512 channels are 140 TFLOP.
ATTENTION_LIMIT = 2**18


def check_attention(size: tuple[int, int], limit: int, *, call: str) -> None:
    """Raise ValueError where a canvas of (H, W) latents is too large to attend over the whole."""
    if size[0] * size[1] > limit:
        raise ValueError(
            f"{call}: the canvas is {size[0]} x {size[1]} latents, but the global way attends over "
            f"the whole of it, and {limit} latents are its limit; use the local one, or raise "
            "attention_limit."
        )


class Source(Protocol):
    """A map of features that can be read by rows."""

    shape: tuple[int, int, int]  # (C, H, W)

    @property
    def statistics(self) -> GroupNormStatistics | None:
        """Of the whole map, where its channels make groups."""
        ...

    def read(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end): [1, C, end - begin, W]."""
        ...

    def close(self) -> None:
        """Called when nothing needs the map any more."""
        ...


class Layerwise:
    """Runs the layers of an autoencoder over whole maps.

    Args:
        vae: the autoencoder.
        folder: where maps that do not fit into memory lie while they are needed.
        attention_limit: positions of a map that may attend to one another, at most.
    """

    def __init__(
        self, vae: Autoencoder, folder: Path, *, attention_limit: int = ATTENTION_LIMIT
    ) -> None:
        self.vae = vae
        self.folder = folder
        self.attention_limit = attention_limit
        self._like = next(vae.parameters())  # of its maps

    @torch.no_grad()
    def decode(self, latents: Source) -> Iterator[Tensor]:
        """Bands [1, 3, n, W * f] of the image of a latent [C, H, W], from top to bottom."""
        check_attention(latents.shape[1:], self.attention_limit, call="decode")
        decoder = self.vae.decoder
        self._like = next(decoder.parameters())

        def codes(rows: Tensor) -> Tensor:
            if isinstance(self.vae, VQModel):
                rows, _ = self.vae.quantize(rows)
            return self.vae.decoder_input(rows)

        h: Source = self._store(_Mapped(latents, codes), decoder.conv_in)
        latents.close()
        h = self._middle(h, decoder.mid)
        for level in reversed(decoder.up):
            h = self._level(h, level)
        yield from self._bands(h, decoder.conv_out, norm=decoder.norm_out)
        h.close()

    @torch.no_grad()
    def encode(self, image: Source) -> Iterator[Tensor]:
        """Bands [1, C, n, w] of the latent of an image [3, H, W] in [-1, 1]."""
        factor = self.vae.downsample_factor
        size = image.shape[1] // factor, image.shape[2] // factor
        check_attention(size, self.attention_limit, call="encode")
        encoder = self.vae.encoder
        self._like = next(encoder.parameters())
        h: Source = self._store(image, encoder.conv_in)
        image.close()
        for level in encoder.down:
            h = self._level(h, level)
        h = self._middle(h, encoder.mid)
        for band in self._bands(h, encoder.conv_out, norm=encoder.norm_out):
            moments = self.vae.quant_conv(band)
            is_kl = isinstance(self.vae, AutoencoderKL)
            yield moments.chunk(2, dim=1)[0] if is_kl else moments
        h.close()

    def _level(self, h: Source, level: Any) -> Source:  # a Level
        for i, block in enumerate(level.block):
            h = self._block(h, block)
            if len(level.attn):
                h = self._attend(h, level.attn[i])
        if level.downsample is not None:
            return self._next(h, level.downsample.conv, resample="down")
        return h if level.upsample is None else self._next(h, level.upsample.conv, resample="up")

    def _middle(self, h: Source, middle: Middle) -> Source:
        h = self._block(h, middle.block_1)
        h = self._attend(h, middle.attn_1)
        return self._block(h, middle.block_2)

    def _block(self, x: Source, block: ResnetBlock) -> Source:
        shortcut = getattr(block, "nin_shortcut", nn.Identity())
        h = self._store(x, block.conv1, norm=block.norm1)
        out = self._store(h, block.conv2, norm=block.norm2, add=lambda a, b: shortcut(x.read(a, b)))
        h.close()
        x.close()
        return out

    def _attend(self, x: Source, block: AttnBlock) -> Source:
        """Attention of all positions to all others: keys and values of the whole map at once."""
        channels, height, width = x.shape
        keys, values = (
            torch.empty(1, 1, height * width, channels, device=self._like.device).to(
                self._like.dtype
            )
            for _ in range(2)
        )
        bands = self._split(x, channels, 1.0, width)
        for a, b in bands:
            normed = block.norm(x.read(a, b), statistics=x.statistics)
            for whole, conv in ((keys, block.k), (values, block.v)):
                whole[0, 0, a * width : b * width] = _positions(conv(normed))
        out = FeatureMap(channels, height, width, self.folder, self._like)
        for a, b in bands:
            rows = x.read(a, b)
            queries = _positions(block.q(block.norm(rows, statistics=x.statistics)))
            attended = torch.cat(
                [
                    F.scaled_dot_product_attention(part[None, None], keys, values)[0, 0]
                    for part in queries.split(_QUERIES)
                ]
            )
            maps = attended.t().reshape(1, channels, b - a, width)
            out.write(a, rows + block.proj_out(maps))
        x.close()
        return out

    def _next(self, source: Source, conv: nn.Conv2d, *, resample: str) -> Source:
        out = self._store(source, conv, resample=resample)
        source.close()
        return out

    def _store(
        self,
        source: Source,
        conv: nn.Conv2d,
        *,
        norm: GroupNormSiLU | None = None,
        resample: str | None = None,
        add: Callable[[int, int], Tensor] | None = None,
    ) -> FeatureMap:
        """The map that `_bands` makes."""
        height, width = (int(size * _SCALE[resample]) for size in source.shape[1:])
        out = FeatureMap(conv.out_channels, height, width, self.folder, self._like)
        y = 0
        for band in self._bands(source, conv, norm=norm, resample=resample):
            if add is not None:
                band = add(y, y + band.shape[2]) + band
            out.write(y, band)
            y += band.shape[2]
        return out

    def _bands(
        self,
        source: Source,
        conv: nn.Conv2d,
        *,
        norm: GroupNormSiLU | None = None,
        resample: str | None = None,
    ) -> Iterator[Tensor]:
        """GroupNorm and SiLU where there is a norm, resampling, and a 3x3 convolution."""
        scale = _SCALE[resample]
        for a, b in self._split(source, conv.out_channels, scale, int(source.shape[2] * scale)):
            first, last = _needed(a, b, resample)
            begin, end = max(first, 0), min(last, source.shape[1])
            rows = source.read(begin, end)
            if norm is not None:
                rows = norm(rows, statistics=source.statistics)
            yield _convolve(rows, conv, resample, begin - first, last - end, (a, b))

    def _split(
        self, source: Source, channels: int, scale: float, width: int
    ) -> list[tuple[int, int]]:
        """The bands [a, b) of the rows of a map of `channels` channels made from a source."""
        own, height, source_width = source.shape
        row = 4 * (channels * width + int(own * source_width / scale))
        rows, total = max(1, _BAND_BYTES // row), int(height * scale)
        return [(a, min(a + rows, total)) for a in range(0, total, rows)]


_SCALE = {None: 1.0, "up": 2.0, "down": 0.5}


class _Mapped:
    """A source whose rows go through a function of single positions when they are read."""

    def __init__(self, source: Source, function: Callable[[Tensor], Tensor]) -> None:
        self.shape = source.shape
        self.statistics: GroupNormStatistics | None = None
        self._source, self._function = source, function

    def read(self, begin: int, end: int) -> Tensor:
        return self._function(self._source.read(begin, end))

    def close(self) -> None:
        self._source.close()


def _needed(a: int, b: int, resample: str | None) -> tuple[int, int]:
    """Source rows [first, last) that rows [a, b) are made of; outside the map they are zeros."""
    if resample == "up":
        return (a - 1) // 2, -(-(b + 1) // 2)
    if resample == "down":
        return 2 * a, 2 * b + 1
    return a - 1, b + 1


def _convolve(
    rows: Tensor,
    conv: nn.Conv2d,
    resample: str | None,
    above: int,
    below: int,
    band: tuple[int, int],
) -> Tensor:
    """Rows `band` of a convolution from those it needs; `above` and `below` lie outside the map."""
    a, b = band
    if resample == "down":  # pads right and bottom only, as the published encoder does
        return F.conv2d(F.pad(rows, (0, 1, 0, below)), conv.weight, conv.bias, stride=2)
    if resample == "up":
        rows = F.interpolate(rows, scale_factor=2.0, mode="nearest")
        above, below = 2 * above, 2 * below
    rows = F.pad(rows, (0, 0, above, below))
    if resample == "up":
        # Upsampling gives two rows for each; of the outermost pairs the nearer row may do.
        skip = (a - 1) % 2
        rows = rows[:, :, skip : skip + b - a + 2]
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def _positions(maps: Tensor) -> Tensor:
    """[1, C, n, W] -> [n * W, C]."""
    return maps[0].flatten(1).t().contiguous()
