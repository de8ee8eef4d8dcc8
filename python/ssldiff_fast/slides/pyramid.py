# SPDX-License-Identifier: Apache-2.0
"""A generic tiled pyramidal BigTIFF, written row by row in the memory of a few tile rows.

OpenSlide, QuPath, cuCIM, tiffslide, tifffile, libvips and GDAL see all levels (`NewSubfileType` 1,
mpp from the resolution in pixels per centimetre); Bio-Formats sees level 0.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .output import RowWriter, atomic_bytes, check_output, part_path, publish, write_error
from .slide import MPP_RANGE
from .tiff_directory import COMPRESSION, HEADER_BYTES, TiledLevel, directory, file_header

Rows = NDArray[np.uint8]  # [rows, W, 3]

# The coarsest level fits this square, so that a viewer shows the whole slide at once.
SMALLEST_LEVEL_PX = 512
# Two rows of tiles of this width are half a GB; no scanner's image is wider.
MAX_SIDE_PX = 1_000_000
# Bytes per level-0 pixel for the estimate of the space needed, all levels together, measured on
# H&E at quality 90 and without loss, rounded up.
BYTES_PER_PX = {"jpeg": 0.9, "deflate": 3.2}


def describe(metadata: Mapping[str, Any]) -> str:
    """The text that says in every file that it is synthetic, and its recipe as JSON (ASCII)."""
    from ssldiff_fast import __version__

    return f"SYNTHETIC image, not a scan of tissue; made by ssldiff_fast {__version__}\n" + (
        json.dumps(dict(metadata), sort_keys=True)
    )


def sidecar(path: os.PathLike[str]) -> str:
    """The JSON beside an output: `out.tif` has `out.tif.json`."""
    return f"{os.fspath(path)}.json"


def check_geometry(width: int, height: int, mpp: float, *, limit: int = MAX_SIDE_PX) -> None:
    """Checks the size and mpp of an image to be written."""
    for name, value in (("width", width), ("height", height)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"the {name} of the output must be an integer, not {value!r}")
        if not 1 <= value <= limit:
            raise ValueError(
                f"the {name} of the output is {value} pixels, expected 1 to {limit}: choose "
                "another size"
            )
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise ValueError(
            f"the output's mpp is {mpp} um per pixel, expected {MPP_RANGE[0]:g} to "
            f"{MPP_RANGE[1]:g}: a slide is never written without one"
        )


def check_rows(rows: Any, width: int, height: int, written: int) -> Rows:
    """The rows as an array, or an error when they do not continue the image."""
    rows = np.asarray(rows)
    if rows.ndim != 3 or rows.shape[1:] != (width, 3):
        raise ValueError(f"rows must be [rows, {width}, 3], not {list(rows.shape)}")
    if rows.dtype != np.uint8:
        raise TypeError(f"rows must be uint8, not {rows.dtype}")
    if written + len(rows) > height:
        raise ValueError(f"{written} rows are written of {height}, and {len(rows)} more came")
    return rows


def halve(rows: Rows) -> Rows:
    """2x2 box reduction, rounded to nearest; an odd last row or column is repeated."""
    if rows.shape[0] % 2 or rows.shape[1] % 2:
        pad = ((0, rows.shape[0] % 2), (0, rows.shape[1] % 2), (0, 0))
        rows = np.pad(rows, pad, mode="edge")
    total = rows[0::2, 0::2].astype(np.uint16)
    for block in (rows[0::2, 1::2], rows[1::2, 0::2], rows[1::2, 1::2]):
        total += block
    result: Rows = ((total + 2) >> 2).astype(np.uint8)
    return result


class _Level:
    """A level being written: the rows of its current row of tiles."""

    def __init__(self, width: int, height: int, mpp: float, tile: int) -> None:
        self.tiled = TiledLevel(width, height, mpp)
        # The columns beyond the image repeat its last one: JPEG rings at any other border.
        self.columns = -(-width // tile) * tile
        self.rows = np.empty((min(tile, height), width, 3), np.uint8)
        self.filled = 0  # rows in the buffer
        self.done = 0  # rows in finished tiles


class PyramidWriter(RowWriter):
    """Rows in, pyramid out; a context manager.

    Levels are built while streaming: finished tiles go to a hidden file in the same folder, which
    takes its final name when all rows have come, and is removed when the block fails. Beside it a
    JSON file holds the metadata that the ImageDescription holds too.

    Args:
        path: the output, .tif or .tiff.
        width, height: of level 0, in pixels.
        mpp: micrometres per pixel of level 0.
        codec: "jpeg" (4:4:4) or "deflate" (lossless): those that every reader opens.
        quality: of JPEG, 1 to 100.
        tile: side of a tile, a multiple of 16.
        metadata: the recipe; anything that JSON holds.
        overwrite: replace an existing file.
        threads: that encode tiles; the bytes do not depend on it.

    Raises:
        ValueError, TypeError, OSError: before anything is written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        mpp: float,
        *,
        codec: str = "jpeg",
        quality: int = 90,
        tile: int = 256,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        threads: int | None = None,
    ) -> None:
        check_geometry(width, height, mpp)
        if codec not in COMPRESSION:
            raise ValueError(f"codec {codec!r} is unknown, expected one of {sorted(COMPRESSION)}")
        if not 1 <= quality <= 100:
            raise ValueError(f"quality is {quality}, expected 1 to 100")
        if tile < 16 or tile % 16:
            raise ValueError(f"tile is {tile}, expected a multiple of 16")
        self.codec, self.quality, self.tile = codec, int(quality), int(tile)
        self.width, self.height = int(width), int(height)
        self._description = describe(metadata or {})
        needs = int(BYTES_PER_PX[codec] * width * height)
        self.path = check_output(path, overwrite=overwrite, needs=needs)
        check_output(sidecar(self.path), overwrite=overwrite)
        self._levels = self._plan(mpp)
        self._pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1))
        self._part = part_path(self.path)
        self._file: BinaryIO | None = open(self._part, "wb")  # noqa: SIM115 - closed by finish
        self._file.write(file_header(0))
        self._end = HEADER_BYTES

    def _plan(self, mpp: float) -> list[_Level]:
        levels = [_Level(self.width, self.height, mpp, self.tile)]
        width, height = self.width, self.height
        while max(width, height) > SMALLEST_LEVEL_PX:
            width, height = -(-width // 2), -(-height // 2)
            # What a pixel of the level spans; exactly a power of two except for odd sizes.
            levels.append(_Level(width, height, mpp * self.width / width, self.tile))
        return levels

    @property
    def rows_written(self) -> int:
        return self._levels[0].done + self._levels[0].filled

    def write_rows(self, rows: Any) -> None:
        """Appends rows of pixels, uint8 [rows, width, 3], any number of them."""
        if self._file is None:
            raise RuntimeError(f"{self.path} is closed: no more rows can be written")
        rows = check_rows(rows, self.width, self.height, self.rows_written)
        self._push(0, rows)

    def _push(self, index: int, rows: Rows) -> None:
        level = self._levels[index]
        while len(rows):
            count = min(len(rows), len(level.rows) - level.filled)
            level.rows[level.filled : level.filled + count] = rows[:count]
            level.filled += count
            rows = rows[count:]
            ended = level.done + level.filled == level.tiled.height
            if level.filled == len(level.rows) or ended:
                self._flush(index, ended)

    def _flush(self, index: int, ended: bool) -> None:
        level = self._levels[index]
        rows = level.rows[: level.filled]
        self._write_tiles(level, rows)
        level.done += level.filled
        level.filled = 0
        if index + 1 < len(self._levels):
            # A tile row is an even number of rows, except for the last one of the image.
            self._push(index + 1, halve(rows))

    def _write_tiles(self, level: _Level, rows: Rows) -> None:
        file, side = self._file, self.tile
        if file is None:
            raise RuntimeError(f"{self.path} is closed")
        missing = (side - len(rows), level.columns - level.tiled.width)
        if any(missing):
            rows = np.pad(rows, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        tiles = (np.ascontiguousarray(rows[:, x : x + side]) for x in range(0, level.columns, side))
        for data in self._pool.map(self._encode, tiles):
            try:
                file.write(data)
            except OSError as error:
                raise write_error(self.path, error, f" beyond row {level.done}") from None
            level.tiled.offsets.append(self._end)
            level.tiled.byte_counts.append(len(data))
            self._end += len(data)

    def _encode(self, tile: Rows) -> bytes:
        import imagecodecs

        if self.codec == "deflate":
            return bytes(imagecodecs.zlib_encode(tile.tobytes(), level=6))
        return bytes(
            imagecodecs.jpeg8_encode(
                tile,
                level=self.quality,
                colorspace="RGB",
                outcolorspace="YCBCR",
                subsampling="444",
            )
        )

    def finish(self) -> None:
        """Writes the directories and gives the file its name; needs all rows."""
        if self._file is None:
            return
        try:
            if self.rows_written != self.height:
                raise RuntimeError(
                    f"{self.path} has {self.rows_written} of {self.height} rows: it is not written"
                )
            try:
                self._write_directories(self._file)
                self._file.flush()  # before the JSON appears, which would stay if this failed
                os.fsync(self._file.fileno())
            except OSError as error:
                raise write_error(self.path, error) from None
            self._file.close()
            atomic_bytes(sidecar(self.path), self._description.split("\n", 1)[1].encode())
            publish(self._part, self.path)
        finally:
            self.abort()

    def _write_directories(self, file: BinaryIO) -> None:
        from ssldiff_fast import __version__

        padding = -self._end % 8
        file.write(b"\0" * padding)
        first = position = self._end + padding
        for index, level in enumerate(self._levels):
            data = directory(
                level.tiled,
                codec=self.codec,
                tile=self.tile,
                description=self._description if index == 0 else None,
                software=f"ssldiff_fast {__version__}",
                position=position,
                last=index + 1 == len(self._levels),
            )
            file.write(data)
            position += len(data)
        file.seek(0)
        file.write(file_header(first))

    def abort(self) -> None:
        """Removes what was written unless it is finished."""
        if self._file is not None:
            # On a full disk closing fails as well, at the bytes that are still in its buffer.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
            self._pool.shutdown(cancel_futures=True)
            self._part.unlink(missing_ok=True)
