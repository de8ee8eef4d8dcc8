# SPDX-License-Identifier: Apache-2.0
"""A band of pixels in a file: made and read by pieces, so that a wide one is never in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.uint8]  # [rows, W, bands]


# Pixels lie in blocks of so many columns, so that a tile is read at once.
BLOCK = 256


class PixelBand:
    """Pixels [rows, W, bands] uint8 of a file, sliced like an array.

    `band[:, a:b] = pixels` writes columns, `band[y0:y1, x0:x1]` is a view of a part, and
    `numpy.asarray` reads.

    Args:
        file: an open file's descriptor.
        offset: of the first of the band's bytes, for all of which the file has room.
        shape: of the band.
        keeper: kept alive as long as the band is.
    """

    dtype = np.dtype(np.uint8)
    ndim = 3

    def __init__(
        self, file: int, offset: int, shape: tuple[int, int, int], keeper: object = None
    ) -> None:
        self._file, self._offset, self._whole, self._keeper = file, offset, shape, keeper
        self._rows, self._columns = range(shape[0]), range(shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self._rows), len(self._columns), self._whole[2]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: slice | tuple[slice, slice]) -> PixelBand:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        part = PixelBand(self._file, self._offset, self._whole, self._keeper)
        part._rows, part._columns = self._rows[rows], self._columns[columns]
        if part._rows.step != 1 or part._columns.step != 1:
            raise ValueError("a PixelBand has no steps: read it with numpy.asarray first")
        return part

    def __setitem__(self, key: tuple[slice, slice], pixels: Rows) -> None:
        part = self[key]
        if pixels.shape != part.shape:
            raise ValueError(f"pixels are {list(pixels.shape)}, expected {list(part.shape)}")
        first = part._columns.start
        for left, begin, end in part._pieces():
            piece = pixels[:, begin - first : end - first]
            if end - begin < part._width(left):
                block = part._read(left)
                block[:, begin - left : end - left] = piece
                piece = block
            part._write(left, piece)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Rows:
        if copy is False:
            raise ValueError("a PixelBand lies in a file: its pixels can only be copied")
        pixels = np.empty(self.shape, np.uint8)
        first = self._columns.start
        for left, begin, end in self._pieces():
            pixels[:, begin - first : end - first] = self._read(left)[:, begin - left : end - left]
        return pixels if dtype is None else pixels.astype(dtype, copy=False)

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """Of each block that is touched its first column, and the columns [begin, end) that are."""
        begin = self._columns.start
        while begin < self._columns.stop:
            left = begin // BLOCK * BLOCK
            end = min(left + self._width(left), self._columns.stop)
            yield left, begin, end
            begin = end

    def _width(self, left: int) -> int:
        """Columns of the block that begins at column `left`."""
        return min(BLOCK, self._whole[1] - left)

    def _place(self, left: int) -> int:
        pixel = self._whole[0] * left + self._rows.start * self._width(left)
        return self._offset + pixel * self._whole[2]

    def _read(self, left: int) -> Rows:
        block = np.empty((len(self._rows), self._width(left), self._whole[2]), np.uint8)
        if block.size and os.preadv(self._file, [block.data], self._place(left)) != block.nbytes:
            raise OSError("a file of waiting pixels has become shorter")
        return block

    def _write(self, left: int, pixels: Rows) -> None:
        if pixels.size:
            data, place = np.ascontiguousarray(pixels).data.cast("B"), self._place(left)
            while data:
                written = os.pwrite(self._file, data, place)
                data, place = data[written:], place + written
