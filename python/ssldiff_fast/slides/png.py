# SPDX-License-Identifier: Apache-2.0
"""PNG for images of modest size, with the recipe in its text and mpp in its resolution."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from .output import RowWriter, atomic, atomic_bytes, check_output
from .pyramid import check_geometry, check_rows, describe, sidecar

# A PNG is compressed as one stream from the whole image in memory: 768 MiB at most.
MAX_PX = 2**28
BYTES_PER_PX = 2.2


class PngWriter(RowWriter):
    """Rows in, PNG out, with the interface of `PyramidWriter`; holds the image in memory."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        mpp: float,
        *,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        check_geometry(width, height, mpp)
        if width * height > MAX_PX:
            raise ValueError(
                f"a PNG of {width} x {height} pixels would need the whole image in memory: write "
                f".tif above {MAX_PX // 2**20} megapixels"
            )
        self._description = describe(metadata or {})
        needs = int(BYTES_PER_PX * width * height)
        self.path = check_output(path, overwrite=overwrite, needs=needs)
        check_output(sidecar(self.path), overwrite=overwrite)
        self.width, self.height, self.mpp = int(width), int(height), float(mpp)
        self.rows_written = 0
        self._pixels: np.ndarray | None = np.empty((height, width, 3), np.uint8)

    def write_rows(self, rows: Any) -> None:
        """Appends rows of pixels, uint8 [rows, width, 3], any number of them."""
        if self._pixels is None:
            raise RuntimeError(f"{self.path} is closed: no more rows can be written")
        rows = check_rows(rows, self.width, self.height, self.rows_written)
        self._pixels[self.rows_written : self.rows_written + len(rows)] = rows
        self.rows_written += len(rows)

    def finish(self) -> None:
        """Writes the file; needs all rows."""
        if self._pixels is None:
            return
        pixels, self._pixels = self._pixels, None
        if self.rows_written != self.height:
            raise RuntimeError(
                f"{self.path} has {self.rows_written} of {self.height} rows: it is not written"
            )
        text = PngImagePlugin.PngInfo()
        text.add_text("Description", self._description)
        dpi = 25_400 / self.mpp
        with atomic(self.path) as part:
            Image.fromarray(pixels).save(part, format="PNG", dpi=(dpi, dpi), pnginfo=text)
            atomic_bytes(sidecar(self.path), self._description.split("\n", 1)[1].encode())

    def abort(self) -> None:
        """Drops what was written."""
        self._pixels = None
