# SPDX-License-Identifier: Apache-2.0
"""Rows that arrive in bands and are read by ranges."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ssldiff_fast._checks import check_finite, check_shape
from ssldiff_fast.canvas.wide import Memory


class Bands:
    """Bands [..., n, W] of rows, one below the other.

    Args:
        begin: The first row.
        wide: Where the bands were made, of which pieces are in memory at once.
    """

    def __init__(self, begin: int = 0, wide: Memory | None = None) -> None:
        self._bands: deque[Tensor] = deque()
        self._wide = wide or Memory()
        self.begin = self.end = begin  # rows held: [begin, end)

    @property
    def held(self) -> Sequence[Tensor]:
        """From row `begin` on."""
        return self._bands

    def push(self, band: Tensor) -> None:
        """The rows that follow."""
        self._bands.append(band)
        self.end += band.shape[-2]

    def forget(self, before: int) -> None:
        """Rows above row `before` are not needed again."""
        while self._bands and self.begin + self._bands[0].shape[-2] <= before:
            self.begin += self._bands.popleft().shape[-2]

    def read(self, begin: int, end: int, columns: range | None = None) -> Tensor:
        """Rows [begin, end): [..., n, w], a view where one band holds them.

        Rows from the end on count from the first again, and columns from W on likewise.
        """
        if end > self.end:
            again = self.begin + end - self.end
            both = self.read(begin, self.end, columns), self.read(self.begin, again, columns)
            return torch.cat(both, dim=-2)
        parts, top = [], self.begin
        for band in self._bands:
            bottom = top + band.shape[-2]
            if top < end and bottom > begin:
                rows = slice(max(0, begin - top), end - top)
                parts.append(self._columns(band, rows, columns))
            top = bottom
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def _columns(self, band: Tensor, rows: slice, columns: range | None) -> Tensor:
        width = band.shape[-1]
        if columns is None or columns.stop <= width:
            here = slice(None) if columns is None else slice(columns.start, columns.stop)
            return self._wide.read(band, rows, here)
        parts = slice(columns.start, width), slice(0, columns.stop - width)
        return torch.cat([self._wide.read(band, rows, part) for part in parts], dim=-1)


class RowBuffer(Bands):
    """The rows of a canvas or image [C, H, W], taken from bands as they are asked for.

    Args:
        bands: [C, n, W] each, one below the other from row `begin` on.
        height, width: H, W.
        begin: row of the canvas that the first band starts with.
        call: the public call that messages name.
        name: what messages call the rows.
        wide: where the bands were made.
    """

    def __init__(
        self,
        bands: Iterable[Tensor],
        height: int,
        width: int,
        *,
        begin: int,
        call: str,
        name: str = "latents",
        wide: Memory | None = None,
    ) -> None:
        super().__init__(begin, wide)
        self._source = iter(bands)
        self._size = (height, width)
        self._call = call
        self._name = name
        self._where = "the canvas" if name == "latents" else "the image"

    def upto(self, end: int) -> None:
        """Draws bands until all rows above row `end` are there.

        Raises:
            ValueError: a band has another width, NaN or too many rows, or the bands end too early.
        """
        while self.end < end:
            band = next(self._source, None)
            if band is None:
                raise ValueError(
                    f"{self._call}: the {self._name} end at row {self.end}, but "
                    f"{self._where} has {self._size[0]} rows; pass all of them."
                )
            self._check(band)
            self.push(band)
            self._wide.release(band)

    def _check(self, band: Tensor) -> None:
        height, width = self._size
        check_shape(self._name.rstrip("s"), band, "C n W", {"W": width}, call=self._call)
        share = self._wide.share(band.shape[1], band[:, :1].nbytes)
        for y in range(0, band.shape[1], share):
            rows = self._wide.read(band, slice(y, y + share), slice(None))
            check_finite(self._name.rstrip("s"), rows, call=self._call)
        end = self.end + band.shape[1]
        if end > height:
            raise ValueError(
                f"{self._call}: the {self._name} have {end} rows or more, but {self._where} "
                f"has {height}; pass only those."
            )
