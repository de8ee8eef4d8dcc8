# SPDX-License-Identifier: Apache-2.0
"""Glass where a mask leaves tissue out: pixels of one colour, which no decoder makes.

A tile of one latent has hardly any variance of its own, and normed by it an autoencoder gives
another white than beside tissue, and lines where tiles end. So what is far from tissue is plain,
and beside tissue the decoded pixels hand over to it. Tiles normed by themselves differ in their
whites by how much tissue they hold, too: each is balanced to the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssldiff_fast._checks import check_count
from ssldiff_fast.canvas.mask import TissueMask
from ssldiff_fast.canvas.tile_decoder import Pixels
from ssldiff_fast.slides.pixel_band import BLOCK, PixelBand

if TYPE_CHECKING:
    from ssldiff_fast.canvas.decode import RowDecoder

_CALL = "Glass"
LEVEL = 243  # grey level of an empty slide, what scanners show between tissue
# Grey levels: of glass is a pixel whose channels are this at least, and differ by less than that.
DARKEST, CHROMA = 215, 16
_CERTAIN = 0.1  # share of glass in a tile above which its white is taken as it is
_PARTS = 4096  # of a grey value, in sums that must not depend on their order
_COLUMNS = 4 * BLOCK  # of pixels, painted at once

Shares: TypeAlias = "NDArray[np.float32]"


@dataclass(frozen=True)
class Glass:
    """An empty slide around tissue.

    Args:
        mask: where the tissue is.
        size: (H, W) of the canvas in latents.
        reach: (y, x) latents from tissue at which all is glass.
        factor: pixels per latent along one side.
        level: grey level of glass, 0 to 255.

    Raises:
        TypeError: the mask is no `TissueMask`, or a size is not whole.
        ValueError: a size or reach is not above zero, or the level is no grey level.
    """

    mask: TissueMask
    size: tuple[int, int]
    reach: tuple[int, int]
    factor: int
    level: int = LEVEL

    def __post_init__(self) -> None:
        if not isinstance(self.mask, TissueMask):
            raise TypeError(
                f"{_CALL}: mask is a {type(self.mask).__name__}, but a TissueMask was expected."
            )
        for name in ("size", "reach"):
            for side in getattr(self, name):
                check_count(name, side, call=_CALL)
        check_count("factor", self.factor, call=_CALL)
        if not isinstance(self.level, int) or not 0 <= self.level <= 255:
            raise ValueError(
                f"{_CALL}: level is {self.level!r}, but a grey level was expected, 0 to 255."
            )

    @property
    def value(self) -> float:
        """The level in [-1, 1]: the middle of what is cut off to it."""
        return (self.level + 0.5) / 127.5 - 1.0

    def balanced(
        self,
        tiles: Tensor,  # [B, 3, h, w] in [-1, 1]
    ) -> Tensor:
        """Tiles whose channels are scaled so that the mean of their glass is the level.

        With less than a tenth of a tile the scaling fades; without glass it stays as it is.
        """
        values = (tiles + 1) / 2
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        glass = (low >= DARKEST / 255) & (high - low < CHROMA / 255)
        count = glass.sum((2, 3), keepdim=True)
        parts = (values * _PARTS).round().to(torch.int64) * glass
        white = parts.sum((2, 3), keepdim=True) / (_PARTS * count.clamp(min=1))
        certain = (count / (_CERTAIN * glass[0].numel())).clamp(max=1)
        gain = (self.level + 0.5) / 255 / white.clamp(min=DARKEST / 255)
        return tiles + 2 * values * certain * (gain - 1)

    def is_plain(self, rows: tuple[int, int], columns: tuple[int, int]) -> bool:
        """Whether latents [begin, end) of each axis all lie beyond the reach of tissue."""
        y, x = (
            (max(0, begin - reach), min(size, end + reach))
            for (begin, end), reach, size in zip((rows, columns), self.reach, self.size)
        )
        return not bool(self.mask.cells(y, x, self.size).any())


class GlassDecoder:
    """A decoder whose pixels become glass away from tissue.

    Within cells of tissue they stay as they are; outside, their share falls with the distance, by
    half a cosine along each axis, to none at the glass's reach.

    Args:
        decoder: makes pixels, at least of all that is not plain.
        glass: of the same canvas.
    """

    def __init__(self, decoder: RowDecoder, glass: Glass) -> None:
        self.decoder = decoder
        self.glass = glass

    def first_latent(self, row: int) -> int:
        """As of the decoder."""
        return self.decoder.first_latent(row)

    def decode(
        self, bands: Iterable[Tensor], *, begin: int = 0, progress: bool = False
    ) -> Iterator[Pixels | PixelBand]:
        """As of the decoder, with glass."""
        top = begin * self.glass.factor
        across: dict[int, Shares] = {}
        for band in self.decoder.decode(bands, begin=begin, progress=progress):
            down = self._down(top, len(band))
            across = {row: across[row] if row in across else self._across(row) for row in down}
            self._paint(band, [(down[row], across[row]) for row in down])
            top += len(band)
            yield band

    def _paint(
        self,
        band: Pixels | PixelBand,  # [n, W * f, 3]
        shares: list[tuple[Shares, Shares]],  # [n] and [W * f] of each row of cells
    ) -> None:
        level = self.glass.level
        for left in range(0, band.shape[1], _COLUMNS):
            part = slice(left, min(left + _COLUMNS, band.shape[1]))
            # Most of a slide is all tissue, or all beyond its reach.
            if any(y.min() == 1 and x[part].min() == 1 for y, x in shares):
                continue
            near = [(y, x[part]) for y, x in shares if x[part].any()]
            pixels = np.full((len(band), part.stop - left, 3), level, np.uint8)
            if near:
                share = np.maximum.reduce([y[:, None] * x for y, x in near])[..., None]
                decoded = np.asarray(band[:, part]).astype(np.float32)
                pixels[:] = np.rint(level + share * (decoded - level))
            band[:, part] = pixels

    def _down(self, top: int, count: int) -> dict[int, Shares]:
        """Of rows of cells with tissue in reach, the share [n] of the pixel rows from `top` on."""
        glass, cells = self.glass, len(self.glass.mask.tissue)
        y, (height, _) = np.arange(top, top + count), glass.size
        first = max(0, top // glass.factor - glass.reach[0]) * cells // height
        last = min(height, (top + count) // glass.factor + glass.reach[0] + 1)
        found = {}
        for row in range(first, -(-last * cells // height)):
            if bool(glass.mask.tissue[row].any()):
                begin, end = self._pixels(row, 0)
                found[row] = self._falling(np.maximum(begin - y, y - end + 1), 0)
        return found

    def _across(self, row: int) -> Shares:  # [W * f]
        """The share of the pixel columns, by the tissue of one row of cells."""
        x = np.arange(self.glass.size[1] * self.glass.factor)
        before, after = np.full(len(x), -len(x)), np.full(len(x), 2 * len(x))
        for column in self.glass.mask.tissue[row].nonzero().flatten().tolist():
            cell = slice(*self._pixels(column, 1))
            before[cell] = after[cell] = x[cell]
        before = x - np.maximum.accumulate(before)
        after = np.minimum.accumulate(after[::-1])[::-1] - x
        return self._falling(np.minimum(before, after), 1)

    def _pixels(self, cell: int, axis: int) -> tuple[int, int]:
        """The pixels [begin, end) of a row or column of cells."""
        size, cells = self.glass.size[axis], self.glass.mask.tissue.shape[axis]
        factor = self.glass.factor
        return cell * size // cells * factor, -(-(cell + 1) * size // cells) * factor

    def _falling(self, distance: NDArray[np.int64], axis: int) -> Shares:
        reach = self.glass.reach[axis] * self.glass.factor
        return (0.5 + 0.5 * np.cos(np.pi * np.clip(distance / reach, 0, 1))).astype(np.float32)
