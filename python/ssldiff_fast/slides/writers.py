# SPDX-License-Identifier: Apache-2.0
"""The writer for an output, chosen by its suffix."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .output import RowWriter
from .png import PngWriter
from .pyramid import PyramidWriter

_SUFFIXES = (".tif", ".tiff", ".png")
_WRITTEN = ".tif or .tiff (tiled pyramidal BigTIFF), .png"
# Named separately because ".ome.tif" would pass as ".tif", and OME readers would find no OME-XML.
_OME = (".ome.tif", ".ome.tiff", ".ome.tf2", ".ome.btf")


def open_writer(
    path: str | os.PathLike[str],
    width: int,
    height: int,
    mpp: float,
    *,
    codec: str | None = None,
    quality: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> RowWriter:
    """Opens a streaming writer; everything that can be wrong with the output is checked here.

    Args:
        path: the output; its suffix chooses the format.
        width, height: in pixels.
        mpp: micrometres per pixel.
        codec: of a TIFF, "jpeg" (by default) or "deflate".
        quality: of JPEG, 90 by default.
        metadata: model, seed, recipe and hashes, as JSON holds them.
        overwrite: replace an existing file.

    Returns:
        A context manager with `write_rows(uint8 [rows, width, 3])`.

    Raises:
        ValueError: an unsupported suffix, size, mpp or codec, or a codec or quality that the
            format does not have.
        OSError: an output that exists or cannot be written, or too little space.
    """
    suffix = check_suffix(path)
    if suffix == ".png" and (codec is not None or quality is not None):
        raise ValueError(
            f"codec and quality are of a TIFF, but the output is {Path(path).name}; leave them out "
            "or name a .tif"
        )
    if codec == "deflate" and quality is not None:
        raise ValueError("quality is of JPEG, but the codec is deflate, which is lossless")
    if suffix != ".png":
        return PyramidWriter(
            path,
            width,
            height,
            mpp,
            codec=codec or "jpeg",
            quality=90 if quality is None else quality,
            metadata=metadata,
            overwrite=overwrite,
        )
    return PngWriter(path, width, height, mpp, metadata=metadata, overwrite=overwrite)


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix of an output, in lower case, or an error when no writer has it."""
    path = Path(path)
    suffix = path.suffix.lower()
    if path.name.lower().endswith(_OME):
        raise ValueError(f"OME-TIFF ({path.name}) is not written: use one of {_WRITTEN}")
    if suffix not in _SUFFIXES:
        raise ValueError(f"the suffix of the output {path.name!r} must be one of {_WRITTEN}")
    return suffix
