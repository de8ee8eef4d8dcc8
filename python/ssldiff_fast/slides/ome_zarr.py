# SPDX-License-Identifier: Apache-2.0
"""OME-Zarr 0.4 (Zarr 2) and 0.5 (Zarr 3): a folder with an array for every level.

QuPath, Bio-Formats, OMERO, napari and neuroglancer read 0.4; 0.5 is newer, and read by zarr-python
3, recent napari plugins and neuroglancer. Axes are t, c, z, y, x, as Bio-Formats counts on. zarr
writes the metadata and names chunks and codecs; the chunks are encoded by numcodecs, as zarr does
it itself, and written here, because a chunk at a time is what streaming and resuming need. A
resumed output equals the uninterrupted one byte for byte, file by file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codecs import check_codec
from .folder_sink import FolderSink
from .levels import LevelSize
from .output import check_output
from .raster import Raster, Rows

TILE = 512
SMALLEST_LEVEL_PX = 512
VERSIONS = {"zarr": "0.4", "zarr-0.5": "0.5"}
_AXES = ("t", "c", "z", "y", "x")
# Bytes per level-0 pixel with all levels, measured on H&E and rounded up.
BYTES_PER_PX = {"blosc": 3.9, "deflate": 3.7, "zstd": 3.8}
_ZSTD_LEVEL, _BLOSC_LEVEL, _DEFLATE_LEVEL = 5, 5, 6


class OmeZarrSink(FolderSink):
    """Chunks of all bands of one tile."""

    pads = True
    smallest = SMALLEST_LEVEL_PX

    def __init__(
        self,
        raster: Raster,
        description: str,
        *,
        version: str = "0.4",
        codec: str | None = None,
        quality: int | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__(raster, description)
        self._require()
        check_codec(codec or "blosc", BYTES_PER_PX)
        if quality is not None:
            raise ValueError(f"quality is {quality}, but OME-Zarr is lossless: leave quality out")
        self.version, self.codec = version, codec or "blosc"
        self.tile = TILE if tile is None else tile
        self._encoder = self._numcodec()

    @staticmethod
    def _require() -> None:
        try:
            import numcodecs
            import zarr
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "OME-Zarr is written with zarr, which is not installed: pip install "
                "'ssldiff_fast[zarr]'"
            ) from None
        if int(zarr.__version__.split(".")[0]) < 3:
            raise ModuleNotFoundError(
                f"OME-Zarr needs zarr 3, but {zarr.__version__} is installed: pip install "
                f"'zarr>=3' (numcodecs {numcodecs.__version__} may stay)"
            )

    def _numcodec(self) -> Any:
        import numcodecs

        if self.codec == "blosc":
            return numcodecs.Blosc("zstd", _BLOSC_LEVEL, shuffle=numcodecs.Blosc.SHUFFLE)
        if self.codec == "zstd":
            return numcodecs.Zstd(_ZSTD_LEVEL)
        if self.version == "0.4":
            return numcodecs.Zlib(_DEFLATE_LEVEL)
        return numcodecs.GZip(_DEFLATE_LEVEL)

    def _zarr_codec(self) -> Any:
        """The same for zarr's metadata."""
        from zarr import codecs

        if self.version == "0.4":
            return self._encoder
        if self.codec == "blosc":
            return codecs.BloscCodec(
                typesize=1, cname="zstd", clevel=_BLOSC_LEVEL, shuffle="shuffle"
            )
        if self.codec == "zstd":
            return codecs.ZstdCodec(level=_ZSTD_LEVEL)
        return codecs.GzipCodec(level=_DEFLATE_LEVEL)

    @property
    def settings(self) -> dict[str, Any]:
        return {"format": f"zarr {self.version}", "codec": self.codec}

    @property
    def bytes_needed(self) -> int:
        return int(BYTES_PER_PX[self.codec] * self.raster.width * self.raster.height)

    def check(self, path: Path, *, overwrite: bool) -> None:
        self.check_files(path)
        check_zarr(path, overwrite=overwrite)

    def begin(
        self, part: Path, levels: Sequence[LevelSize], saved: Mapping[str, NDArray[Any]] | None
    ) -> None:
        super().begin(part, levels, saved)
        self._names = self._arrays()

    def prepare(self) -> None:
        """Nothing but the arrays, which `begin` makes or opens."""

    def _arrays(self) -> list[Any]:
        """Makes what is not yet there: groups and arrays without chunks; their metadata."""
        import zarr

        options: dict[str, Any] = {"dtype": "uint8", "fill_value": 0}
        options["compressors"] = self._zarr_codec()
        if self.version == "0.4":
            options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
        else:
            options["dimension_names"] = _AXES
        zarr_format: Any = 2 if self.version == "0.4" else 3
        group = zarr.open_group(str(self._part), mode="a", zarr_format=zarr_format)
        bands, tile = self.raster.bands, self.tile
        for number, size in enumerate(self._sizes):
            if str(number) not in group:
                shape = (1, bands, 1, size.height, size.width)
                chunks = (1, bands, 1, tile, tile)
                group.create_array(str(number), shape=shape, chunks=chunks, **options)
        group.attrs.put(self._attributes())
        arrays: list[Any] = [group[str(number)] for number in range(len(self._sizes))]
        return [array.metadata for array in arrays]

    def _attributes(self) -> dict[str, Any]:
        multiscales: dict[str, Any] = {
            "name": "synthetic image",
            "axes": [
                {"name": "t", "type": "time"},
                {"name": "c", "type": "channel"},
                *({"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"),
            ],
            "datasets": [self._dataset(number) for number in range(len(self._sizes))],
        }
        said, recipe = self.description.split("\n", 1)
        ours = {"synthetic": said, "recipe": json.loads(recipe)}
        if self.version == "0.5":
            ome = {"version": "0.5", "multiscales": [multiscales], "omero": self._omero()}
            return {"ome": ome, "ssldiff_fast": ours}
        multiscales["version"] = "0.4"
        omero = {**self._omero(), "version": "0.4"}
        return {"multiscales": [multiscales], "omero": omero, "ssldiff_fast": ours}

    def _dataset(self, number: int) -> dict[str, Any]:
        span = (self.raster.mpp or 1.0) * 2**number
        scale = {"type": "scale", "scale": [1.0, 1.0, 1.0, span, span]}
        # Level 1's first pixel is centred between two of level 0, a half pixel further on.
        half = (self.raster.mpp or 1.0) * (2**number - 1) / 2
        moved = {"type": "translation", "translation": [0.0, 0.0, 0.0, half, half]}
        transforms = [scale, moved] if number else [scale]
        return {"path": str(number), "coordinateTransformations": transforms}

    def _omero(self) -> dict[str, Any]:
        """Viewers show three channels in these colours, added."""
        window = {"min": 0, "max": 255, "start": 0, "end": 255}
        names = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
        channels = [
            {"label": name, "color": colour, "active": True, "window": window}
            for name, colour in names
        ]
        return {"channels": channels, "rdefs": {"model": "color"}}

    def tile_path(self, level: int, row: int, column: int) -> str:
        key = self._names[level].encode_chunk_key((0, 0, 0, row, column))
        return f"{self._part}/{level}/{key}"

    def encode(self, level: int, pixels: Rows) -> bytes:
        return bytes(self._encoder.encode(np.ascontiguousarray(pixels.transpose(2, 0, 1))))

    def finish(self) -> None:
        self.sync()

    def publish(self, path: Path) -> None:
        self.move(self._part, path)


def check_zarr(path: Path, *, overwrite: bool) -> None:
    """Like `check_output`, for an output that is a folder; only a Zarr is ever replaced."""
    if path.is_dir() and overwrite:
        if not any((path / name).exists() for name in (".zgroup", "zarr.json")):
            raise FileExistsError(
                f"the output {path} is a folder but no Zarr and is kept: choose another name"
            )
    elif path.exists():
        raise FileExistsError(
            f"the output {path} exists and is kept: choose another name, or overwrite it with "
            "overwrite=True (command line: --overwrite)"
        )
    else:
        check_output(path)
