# SPDX-License-Identifier: Apache-2.0
"""The writer for an output, chosen by its suffix."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .cog import CogSink, Georeference
from .dzi import DziSink
from .ome_zarr import VERSIONS, OmeZarrSink, check_zarr
from .output import RowWriter, check_output
from .png import PngWriter
from .pyramid import PyramidWriter
from .raster import Raster, describe
from .tiff import TiffSink
from .tile_sink import TileSink

_TIFF = (".tif", ".tiff")
_OME = (".ome.tif", ".ome.tiff", ".ome.tf2", ".ome.tf8", ".ome.btf")
# The suffixes of each format; the first format of a suffix is its default. ".ome.tif" comes before
# ".tif", which would fit it too.
_SUFFIXES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    _OME: ("ome",),
    (".cog.tif", ".cog.tiff", ".geo.tif", ".geo.tiff", ".geotiff"): ("cog",),
    _TIFF: ("tif", "universal", "cog"),
    (".dzi",): ("dzi",),
    (".zarr",): ("zarr", "zarr-0.5"),
    (".png",): ("png",),
}
FORMATS = tuple(dict.fromkeys(name for names in _SUFFIXES.values() for name in names))
_WRITTEN = (
    ".tif or .tiff (tiled pyramidal BigTIFF), .ome.tif (OME-TIFF), .geo.tif (Cloud-Optimized "
    "GeoTIFF), .dzi (Deep Zoom), .zarr (OME-Zarr), .png"
)


@dataclass(frozen=True)
class _Options:
    """What the formats' own options are, None where they are left out."""

    codec: str | None
    quality: int | None
    tile: int | None


def open_writer(
    path: str | os.PathLike[str],
    width: int,
    height: int,
    mpp: float | None,
    *,
    format: str | None = None,
    codec: str | None = None,
    quality: int | None = None,
    tile: int | None = None,
    reduction: str = "box",
    bands: int = 3,
    georeference: Georeference | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    state: str | os.PathLike[str] | None = None,
    more_bytes: int = 0,
) -> RowWriter:
    """Opens a streaming writer; everything that can be wrong with the output is checked here.

    To go on after an interruption, give a folder as `state`, call `writer.checkpoint()` every
    minute or so, and open the writer again with the same arguments: `writer.rows_written` is the
    first row that it still needs. The result has the same bytes in every format.

    Args:
        path: the output; its suffix chooses the format.
        width, height: in pixels.
        mpp: micrometres per pixel; None for a GeoTIFF without one.
        format: "tif", "universal" or "cog" for .tif, "zarr" (OME-Zarr 0.4) or "zarr-0.5" for
            .zarr; by default the first. Who reads which: see `slides.tiff`, `slides.cog`,
            `slides.dzi`, `slides.ome_zarr`.
        codec: of a TIFF, "jpeg" (4:4:4, by default) or "deflate", which every reader opens, or
            "lzw", "zstd", "webp", "jpeg2000", "jpegxl"; of Deep Zoom "jpeg" or "png"; of OME-Zarr
            "blosc" (zstd, by default), "deflate" or "zstd". All but jpeg and webp are lossless.
        quality: of jpeg and webp, 90 by default.
        tile: side of a tile, a multiple of 16; 256, for GeoTIFF and OME-Zarr 512.
        reduction: "box" or "lanczos", from one level of the pyramid to the next.
        bands: 3, or 4 for a GeoTIFF.
        georeference: CRS and transform, for a GeoTIFF.
        metadata: model, seed, recipe and hashes, as JSON holds them.
        overwrite: replace an existing output.
        threads: that encode; the bytes do not depend on it.
        state: the folder of the saved state; made if it is not there.
        more_bytes: that something else needs on the same disk, beside the output and what the
            writer keeps for a while; all are checked against the free space.

    Returns:
        A context manager with `write_rows(uint8 [rows, width, bands])`.

    Raises:
        ValueError: an unsupported suffix, format, size, mpp, codec or tile, an option that the
            format does not have, or a state of another output.
        OSError: an output that exists or cannot be written, or too little space.
        ModuleNotFoundError: an optional library is missing; says which.
        RuntimeError: a codec that is not in this build of imagecodecs.
    """
    chosen = check_format(path, format)
    raster = Raster(width, height, mpp, bands)
    description = describe(metadata or {})
    _check_options(chosen, raster, georeference)
    options = _Options(codec, quality, tile)
    if chosen == "png":
        _refuse_options(path, options)
        return PngWriter(
            path,
            raster,
            description=description,
            overwrite=overwrite,
            state=state,
            more_bytes=more_bytes,
        )
    return PyramidWriter(
        path,
        _sink(chosen, raster, description, options, georeference),
        reduction=reduction,
        overwrite=overwrite,
        threads=threads,
        state=state,
        more_bytes=more_bytes,
    )


def _sink(
    chosen: str,
    raster: Raster,
    description: str,
    options: _Options,
    georeference: Georeference | None,
) -> TileSink:
    shared: dict[str, Any] = vars(options)
    sinks: dict[str, Callable[[], TileSink]] = {
        "cog": lambda: CogSink(raster, description, georeference=georeference, **shared),
        "dzi": lambda: DziSink(raster, description, **shared),
    }
    for name, version in VERSIONS.items():
        sinks[name] = partial(OmeZarrSink, raster, description, version=version, **shared)
    if chosen in sinks:
        return sinks[chosen]()
    return TiffSink(raster, description, kind=chosen, **shared)


def _check_options(chosen: str, raster: Raster, georeference: Georeference | None) -> None:
    if chosen == "cog":
        return
    if raster.mpp is None:
        raise ValueError("mpp is None: only a GeoTIFF is written without one")
    if raster.bands != 3:
        raise ValueError(f"bands is {raster.bands}, but only a GeoTIFF has 4: name a .geo.tif")
    if georeference is not None:
        raise ValueError(
            'georeference is of a GeoTIFF: name a .geo.tif, choose format="cog", or leave it out'
        )


def _refuse_options(path: str | os.PathLike[str], options: _Options) -> None:
    if options != _Options(None, None, None):
        raise ValueError(
            f"codec, quality and tile are of a TIFF, but the output is {Path(path).name}; leave "
            "them out or name a .tif"
        )


def check_format(path: str | os.PathLike[str], format: str | None = None) -> str:
    """The format of an output, or an error when no writer has its suffix, or not that format."""
    name = Path(path).name
    if format is not None and format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown, expected one of {', '.join(FORMATS)}")
    for suffixes, formats in _SUFFIXES.items():
        if name.lower().endswith(suffixes) and name.lower() not in suffixes:
            if format is None or format in formats:
                return format or formats[0]
            fits = [s for s, f in _SUFFIXES.items() if format in f][-1][0]
            raise ValueError(
                f"format {format!r} does not fit the output {name!r}: name it with {fits}, or "
                f"choose {' or '.join(formats)}"
            )
    raise ValueError(f"the suffix of the output {name!r} must be one of {_WRITTEN}")


def check_out(
    path: str | os.PathLike[str], *, format: str | None = None, overwrite: bool = False
) -> None:
    """Checks what is known of an output before its size is: suffix, folder, an existing file."""
    if check_format(path, format) in VERSIONS:
        check_zarr(Path(path), overwrite=overwrite)
    else:
        check_output(path, overwrite=overwrite)
