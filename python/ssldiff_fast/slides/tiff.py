# SPDX-License-Identifier: Apache-2.0
"""Pyramidal BigTIFF: generic, conforming OME-TIFF, and both at once.

- "tif", levels in the main chain: OpenSlide, QuPath, cuCIM, tiffslide, GDAL, libvips and tifffile
  see all levels and the mpp; Bio-Formats (OMERO, Fiji) sees level 0.
- "ome", levels as SubIFDs with OME-XML: Bio-Formats, GDAL, libvips and tifffile see all levels and
  the mpp; OpenSlide and what is built on it see level 0.
- "universal", both: all of them see all levels and the mpp; GDAL and libvips list levels twice.

"universal" is outside the OME-TIFF specification, which forbids levels in the main chain; it is
for those who need one file for all readers, and is named .tif. A resumed file equals the
uninterrupted one byte for byte.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .codecs import TIFF_CODECS, choose
from .levels import LevelSize
from .ome_xml import ome_xml
from .output import check_output, publish
from .raster import Raster, Rows
from .tiff_directory import HEADER_BYTES, Tag, TiledLevel, directories, file_header
from .tile_sink import TileSink

TILE = 256
# The coarsest level fits this square, so that a viewer shows the whole slide at once.
SMALLEST_LEVEL_PX = 512
_IMAGE_DESCRIPTION = 270
# So many bytes are sent to the disk at once while tiles come: an fsync then waits for the last.
_SENT_BYTES = 2**23
_JOINED_BYTES = 2**16


class TiffSink(TileSink):
    """Tiles are appended as they come; the directories follow."""

    pads = True
    smallest = SMALLEST_LEVEL_PX

    def __init__(
        self,
        raster: Raster,
        description: str,
        *,
        kind: str = "tif",
        codec: str | None = None,
        quality: int | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__(raster, description)
        self.kind, self.tile = kind, TILE if tile is None else tile
        self.codec, self.quality = choose(TIFF_CODECS, codec or "jpeg", quality, raster.bands)
        self._file: BinaryIO | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"format": self.kind, "codec": self.codec.name, "quality": self.quality}

    @property
    def bytes_needed(self) -> int:
        share = self.raster.bands / 3
        return int(self.codec.bytes_per_px * share * self.raster.width * self.raster.height)

    def check(self, path: Path, *, overwrite: bool) -> None:
        check_output(path, overwrite=overwrite)

    def begin(
        self, part: Path, levels: Sequence[LevelSize], saved: Mapping[str, NDArray[Any]] | None
    ) -> None:
        self._part, self._sizes = part, levels
        # Where each level's tiles begin in the arrays of all tiles.
        self._starts = np.cumsum([0, *[level.columns * level.rows for level in levels]])
        if saved is None:
            self._offsets = np.zeros(self._starts[-1], np.uint64)
            self._counts = np.zeros(self._starts[-1], np.uint32)
            self._end = self._sent = HEADER_BYTES
            self._file = open(part, "w+b")  # noqa: SIM115 - closed by close
            self._file.write(file_header(0))
            return
        self._offsets, self._counts = saved["offsets"], saved["counts"]
        self._end = self._sent = int(saved["end"])
        if part.stat().st_size < self._end:
            raise OSError(
                f"{part} is shorter than its saved state says: remove both to begin the output anew"
            )
        self._file = open(part, "r+b")  # noqa: SIM115
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def encode(self, level: int, pixels: Rows) -> bytes:
        return self.codec.encode(pixels, self.quality)

    def put(self, level: int, row: int, column: int, tiles: Sequence[bytes]) -> None:
        framed = [self.framed(data) for data in tiles]
        # One call for small tiles; a copy of large ones would cost more.
        small = len(framed[0]) < _JOINED_BYTES
        self._opened.writelines([b"".join(framed)] if small else framed)
        index = int(self._starts[level]) + row * self._sizes[level].columns + column
        for place, data, whole in zip(itertools.count(index), tiles, framed):
            # What stands before a tile is half of what is around it.
            self._offsets[place] = self._end + (len(whole) - len(data)) // 2
            self._counts[place] = len(data)
            self._end += len(whole)
        if self._end - self._sent >= _SENT_BYTES:
            self._send()

    def _send(self) -> None:
        """Has the disk begin with what was written, without waiting for it."""
        file, self._sent, begin = self._opened, self._end, self._sent
        if hasattr(os, "posix_fadvise"):
            file.flush()
            length = self._end - begin
            with contextlib.suppress(OSError):  # a file system may have no use for the hint
                os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_DONTNEED)

    def framed(self, data: bytes) -> bytes:
        """A tile with what stands before and behind it in the file, as much as before."""
        return data

    @property
    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise RuntimeError("the TIFF is closed")
        return self._file

    def sync(self) -> dict[str, NDArray[Any]]:
        self._opened.flush()
        os.fsync(self._opened.fileno())
        end = np.asarray(self._end, np.uint64)
        return {"offsets": self._offsets, "counts": self._counts, "end": end}

    def _pages(self) -> list[TiledLevel]:
        """What the directories say."""
        pages = []
        for index, size in enumerate(self._sizes):
            of_level = slice(int(self._starts[index]), int(self._starts[index + 1]))
            mpp = self.raster.mpp
            # What a pixel of the level spans; exactly a power of two except for odd sizes.
            span = None if mpp is None else mpp * self.raster.width / size.width
            page = TiledLevel(
                size.width,
                size.height,
                self.tile,
                span,
                self.codec.tiff or 0,
                self.raster.bands,
                index > 0,
                self._offsets[of_level],
                self._counts[of_level].astype(np.uint64),
            )
            pages.append(page)
        pages[0].more = self._image_tags()
        return pages

    def _image_tags(self) -> list[Tag]:
        text = self.description if self.kind == "tif" else ome_xml(self.raster, self.description)
        return [Tag.text(_IMAGE_DESCRIPTION, text)]

    def finish(self) -> None:
        from ssldiff_fast import __version__

        file = self._opened
        position = self._end + -self._end % 8
        packed = directories(
            self._pages(),
            software=f"ssldiff_fast {__version__}",
            position=position,
            chain=self.kind != "ome",
            tree=self.kind != "tif",
        )
        file.seek(self._end)
        file.write(b"\0" * (position - self._end))
        file.write(packed)
        file.truncate()
        file.seek(0)
        file.write(file_header(position))
        file.seek(self._end)
        file.flush()
        os.fsync(file.fileno())

    def publish(self, path: Path) -> None:
        publish(self._part, path)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # a full disk, said before, at bytes in the buffer
                file.close()

    def drop(self) -> None:
        self._part.unlink(missing_ok=True)
