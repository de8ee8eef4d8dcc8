# SPDX-License-Identifier: Apache-2.0
"""Cloud-Optimized GeoTIFF for scenes: directories first, coarse levels before fine ones.

GDAL and what is built on it (QGIS, rasterio, titiler) see CRS, transform and overviews; OpenSlide
and tifffile see all levels, OpenSlide with the mpp if one was given. The order that the format
wants is known only at the end: tiles are gathered in one file and then copied into another, so it
takes twice its room for a while. A resumed file equals the uninterrupted one byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .output import publish
from .raster import Raster
from .tiff import TiffSink
from .tiff_directory import HEADER_BYTES, Tag, directories, file_header

TILE = 512
# What GDAL's COG driver writes behind the header, so that readers trust the order.
_LAYOUT = (
    b"LAYOUT=IFDS_BEFORE_DATA\nBLOCK_ORDER=ROW_MAJOR\nBLOCK_LEADER=SIZE_AS_UINT4\n"
    b"BLOCK_TRAILER=LAST_4_BYTES_REPEATED\nKNOWN_INCOMPATIBLE_EDITION=NO\n "
)
_FRAME_BYTES = 4  # of the size before a tile, and of the trailer behind it
_GHOST = b"GDAL_STRUCTURAL_METADATA_SIZE=%06d bytes\n" % len(_LAYOUT) + _LAYOUT
_COPY_BYTES = 2**22
_DOUBLE, _SHORT = 12, 3
_GEO_TAGS = {33550: _DOUBLE, 33922: _DOUBLE, 34264: _DOUBLE, 34735: _SHORT, 34736: _DOUBLE}
_GEO_ASCII = 34737
_IMAGE_DESCRIPTION = 270


@dataclass(frozen=True)
class Georeference:
    """Where a scene lies.

    Attributes:
        crs: a coordinate reference system as PROJ knows it, for example "EPSG:32633", or WKT.
        transform: (a, b, c, d, e, f) with x = a column + b row + c, y = d column + e row + f, of
            the corners of pixels; an `affine.Affine` will do.
    """

    crs: str
    transform: tuple[float, ...]

    def __post_init__(self) -> None:
        values = tuple(float(value) for value in tuple(self.transform)[:6])
        object.__setattr__(self, "transform", values)
        if len(values) != 6 or not np.isfinite(values).all():
            raise ValueError(
                f"transform is {self.transform}, expected six finite numbers (a, b, c, d, e, f)"
            )
        if values[0] * values[4] == values[1] * values[3]:
            raise ValueError(
                f"transform is {values}, which maps all pixels onto one line: give the size of a "
                "pixel as a and -e"
            )


class CogSink(TiffSink):
    """Like a generic TIFF until all tiles are there."""

    smallest = TILE

    def __init__(
        self,
        raster: Raster,
        description: str,
        *,
        georeference: Georeference | None = None,
        codec: str | None = None,
        quality: int | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__(
            raster,
            description,
            kind="cog",
            codec=codec or ("jpeg" if raster.bands == 3 else "deflate"),
            quality=quality,
            tile=TILE if tile is None else tile,
        )
        self._georeference = georeference
        self._geo_tags = [] if georeference is None else geo_tags(georeference)

    @property
    def settings(self) -> dict[str, Any]:
        place = self._georeference
        return {**super().settings, "georeference": place and [place.crs, list(place.transform)]}

    @property
    def bytes_needed(self) -> int:
        return 2 * super().bytes_needed

    @property
    def _ordered(self) -> Path:
        return self._part.with_name(f"{self._part.name}.ordered")

    def _image_tags(self) -> list[Tag]:
        return [Tag.text(_IMAGE_DESCRIPTION, self.description), *self._geo_tags]

    def finish(self) -> None:
        from ssldiff_fast import __version__

        self._opened.flush()
        pages = self._pages()
        position = HEADER_BYTES + -(-len(_GHOST) // 8) * 8
        options: dict[str, Any] = {
            "software": f"ssldiff_fast {__version__}",
            "position": position,
            "chain": True,
            "tree": False,
        }
        sources = [page.offsets for page in pages]
        end = position + len(directories(pages, **options))
        for page in reversed(pages):
            counts = page.byte_counts
            framed = counts + np.uint64(2 * _FRAME_BYTES)
            ends = np.uint64(end) + np.cumsum(framed, dtype=np.uint64)
            page.offsets = ends - framed + np.uint64(_FRAME_BYTES)
            end = int(ends[-1])
        with open(self._ordered, "wb") as file:
            file.write(file_header(position) + _GHOST.ljust(position - HEADER_BYTES, b" "))
            file.write(directories(pages, **options))
            for page, offsets in zip(reversed(pages), reversed(sources)):
                self._copy(file, offsets, page.byte_counts)
            file.flush()
            os.fsync(file.fileno())

    def framed(self, data: bytes) -> bytes:
        """A reader that knows only where a tile begins gets its size with the tile."""
        return len(data).to_bytes(_FRAME_BYTES, "little") + data + data[-_FRAME_BYTES:]

    def _copy(self, file: Any, offsets: NDArray[np.uint64], counts: NDArray[np.uint64]) -> None:
        """Copies tiles, those that lie behind each other at once."""
        framed = counts + np.uint64(2 * _FRAME_BYTES)
        breaks = np.flatnonzero(offsets[1:] != offsets[:-1] + framed[:-1]) + 1
        for run in np.split(np.arange(len(offsets)), breaks):
            position = int(offsets[run[0]]) - _FRAME_BYTES
            left = int(framed[run].sum())
            while left:
                data = os.pread(self._opened.fileno(), min(left, _COPY_BYTES), position)
                if not data:
                    raise OSError(f"{self._part} has lost tiles: remove it and begin anew")
                file.write(data)
                position, left = position + len(data), left - len(data)

    def publish(self, path: Path) -> None:
        publish(self._ordered, path)
        self._part.unlink(missing_ok=True)

    def drop(self) -> None:
        super().drop()
        self._ordered.unlink(missing_ok=True)


def geo_tags(georeference: Georeference) -> list[Tag]:
    """The tags of a CRS and a transform, as GDAL writes them.

    Raises:
        ModuleNotFoundError: rasterio is missing.
        ValueError: a CRS that PROJ does not know.
    """
    try:
        import rasterio
        import rasterio.errors
        from rasterio.io import MemoryFile
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a CRS is written with rasterio, which is not installed: pip install "
            "'ssldiff_fast[geo]'"
        ) from None
    import tifffile

    try:
        crs = rasterio.CRS.from_user_input(georeference.crs)
    except rasterio.errors.CRSError:
        raise ValueError(
            f"the CRS {georeference.crs!r} is unknown, expected one such as 'EPSG:32633', or WKT"
        ) from None
    shape: dict[str, Any] = {"width": 1, "height": 1, "count": 1, "dtype": "uint8"}
    with MemoryFile() as memory:
        transform = rasterio.Affine(*georeference.transform)
        with memory.open(driver="GTiff", crs=crs, transform=transform, **shape) as dataset:
            dataset.write(np.zeros((1, 1, 1), np.uint8))
        with tifffile.TiffFile(memory) as tiff:
            tags: Sequence[Any] = list(tiff.pages[0].tags)
            geo = [
                Tag.of(tag.code, _GEO_TAGS[tag.code], *np.atleast_1d(tag.value).tolist())
                for tag in tags
                if tag.code in _GEO_TAGS
            ]
            return geo + [Tag.text(t.code, t.value) for t in tags if t.code == _GEO_ASCII]
