# SPDX-License-Identifier: Apache-2.0
"""Where rows as wide as the canvas wait: in memory, or in a file, and pieces of it in memory.

A wavefront keeps a window height of rows for every step, and decoded rows are sixteen times as many
bytes: at 100,000 pixels that is gigabytes. A file is written and read at the speed of the system's
cache, which gives its memory to whoever needs it.
"""

from __future__ import annotations

import contextlib
import mmap
import operator
import os
import tempfile
import threading
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ssldiff_fast.slides.output import write_error
from ssldiff_fast.slides.pixel_band import PixelBand, Rows

# Of a wide tensor so many bytes are worked on at once, if the rest is in a file.
_PIECE_BYTES = 2**20
# The file grows by its own size each time, and by this at first and this at most.
_LEAST_BYTES, _MOST_BYTES = 2**24, 2**28


class Memory:
    """Rows wait in memory, on the device where they are made; all of them is one piece."""

    spills = False
    folder: Path | None = None

    def empty(self, *shape: int, like: Tensor) -> Tensor:
        """An uninitialised tensor with device and dtype of `like`."""
        return like.new_empty(shape)

    def release(self, *tensors: Tensor) -> None:
        """What was written to these need not stay in memory. It is kept in any case."""

    def share(self, count: int, each: int) -> int:
        """How many of `count` things of `each` bytes are worked on at once."""
        return max(1, count)

    def read(
        self,
        band: Tensor,  # [..., n, W]
        rows: slice,
        columns: slice,
    ) -> Tensor:
        """A part of a band, [..., n', w]; here a view."""
        return band[..., rows, columns]

    def pixels(self, rows: int, width: int) -> Rows | PixelBand:
        """An uninitialised band of pixels, written by columns: `band[:, a:b] = pixels`."""
        return np.empty((rows, width, 3), np.uint8)


@dataclass(frozen=True)
class _Slab:
    """A part of the file, mapped into memory."""

    map: mmap.mmap
    offset: int  # in the file
    address: int

    @classmethod
    def of(cls, file: int, offset: int, size: int) -> _Slab:
        mapped = mmap.mmap(file, size, offset=offset)
        return cls(mapped, offset, np.frombuffer(mapped, np.uint8).ctypes.data)


@dataclass(eq=False)
class _Keeper:
    """Gives a place back with the last view of a band of pixels."""

    file: object


class Spill(Memory):
    """Rows wait in a file without a name; its space is used again and again.

    Args:
        folder: on the disk that takes the file.

    Raises:
        OSError: the folder cannot be written to, or (when something is made) its disk is full.
    """

    spills = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder = Path(folder)
        try:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 - as long as what lies in it
                prefix=".ssldiff-", suffix=".part", dir=folder
            )
        except OSError as error:
            raise write_error(folder, error) from None
        self._size = 0
        self._slabs: list[_Slab] = []
        self._fresh = 0  # of the last slab, the first byte that was never given out
        # Places that were given back, by size: (slab, where in it).
        self._free: dict[int, deque[tuple[_Slab, int]]] = defaultdict(deque)
        self._lock = threading.Lock()

    def empty(self, *shape: int, like: Tensor) -> Tensor:
        if like.device.type != "cpu":
            return super().empty(*shape, like=like)
        count = like.element_size() * int(np.prod(shape, dtype=np.int64))
        if not count:
            return super().empty(*shape, like=like)
        slab, place, size = self._place(count)
        array = np.frombuffer(slab.map, np.uint8, count, place)
        self._back_with(array, slab, place, size)
        return torch.from_numpy(array).view(like.dtype).view(shape)

    def pixels(self, rows: int, width: int) -> Rows | PixelBand:
        if not rows * width:
            return super().pixels(rows, width)
        slab, place, size = self._place(3 * rows * width)
        keeper = _Keeper(self._file)
        self._back_with(keeper, slab, place, size)
        return PixelBand(self._file.fileno(), slab.offset + place, (rows, width, 3), keeper)

    def release(self, *tensors: Tensor) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for tensor in tensors:
            slab, storage = self._slab_of(tensor), tensor.untyped_storage()
            if slab is not None:
                place = storage.data_ptr() - slab.address
                slab.map.madvise(mmap.MADV_DONTNEED, place, _paged(storage.nbytes()))

    def share(self, count: int, each: int) -> int:
        return max(1, min(count, _PIECE_BYTES // max(1, each)))

    def read(self, band: Tensor, rows: slice, columns: slice) -> Tensor:
        """A copy, past the map: a page of it that is touched brings its neighbours along."""
        slab, part = self._slab_of(band), band[..., rows, columns]
        if slab is None or not band.is_contiguous():
            return part.clone()
        copy = torch.empty_like(part, memory_format=torch.contiguous_format)
        if copy.numel():
            begin = slab.offset + part.data_ptr() - slab.address
            strides = [stride * band.element_size() for stride in part.stride()[:-1]]
            lines = copy.view(torch.uint8).view(-1, copy.shape[-1] * band.element_size()).numpy()
            for line, index in zip(lines, np.ndindex(*part.shape[:-1])):
                place = begin + sum(map(operator.mul, index, strides))
                if os.preadv(self._file.fileno(), [line.data], place) != len(line):
                    raise OSError("a file of rows that wait has become shorter")
        return copy

    def _slab_of(self, tensor: Tensor) -> _Slab | None:
        address = tensor.untyped_storage().data_ptr()
        inside = (slab for slab in self._slabs if 0 <= address - slab.address < len(slab.map))
        return next(inside, None)

    def _place(self, count: int) -> tuple[_Slab, int, int]:
        """Room for so many bytes: a slab, the place in it, and its size in whole pages."""
        size = _paged(count)
        with contextlib.suppress(IndexError):
            return *self._free[size].popleft(), size
        with self._lock:
            if not self._slabs or self._fresh + size > len(self._slabs[-1].map):
                self._grow(max(size, min(_MOST_BYTES, max(_LEAST_BYTES, self._size))))
            place = self._fresh
            self._fresh += size
            return self._slabs[-1], place, size

    def _grow(self, size: int) -> None:
        file = self._file.fileno()
        try:
            # A page of a mapped file that finds no room on the disk would end the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, self._size, size)
            else:
                self._file.truncate(self._size + size)
            slab = _Slab.of(file, self._size, size)
        except OSError as error:
            folder = Path(str(self.folder))
            raise write_error(folder, error, " to, for rows that wait") from None
        self._slabs.append(slab)
        self._size += size
        self._fresh = 0

    def _back_with(self, last: object, slab: _Slab, place: int, size: int) -> None:
        weakref.finalize(last, self._free[size].append, (slab, place)).atexit = False


# Wide rows wait here, or in a file in this folder, or (None) in memory.
Where: TypeAlias = "Memory | str | os.PathLike[str] | None"


def wide_rows(where: Where) -> Memory:
    """Where they wait."""
    if isinstance(where, Memory):
        return where
    return Memory() if where is None else Spill(where)


def folder_of(where: Where) -> Path | None:
    """The folder for other files that should not be in memory."""
    if isinstance(where, Memory):
        return where.folder
    return None if where is None else Path(where)


def _paged(count: int) -> int:
    """Whole pages for so many bytes."""
    return -(-count // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
