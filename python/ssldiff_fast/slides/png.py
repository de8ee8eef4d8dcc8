# SPDX-License-Identifier: Apache-2.0
"""PNG for images of modest size, with the recipe in its text and mpp in its resolution.

Everything reads it. Rows wait in a file beside it, and a resumed PNG equals the uninterrupted one
byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from .output import (
    RowWriter,
    atomic,
    atomic_bytes,
    check_output,
    check_there,
    part_path,
    write_error,
)
from .raster import Raster, describe, recipe_json, sidecar
from .writer_state import WriterState, remove_state

# A PNG is compressed as one stream from the whole image in memory: 768 MiB at most.
MAX_PX = 2**28
# The rows that wait, and the PNG.
BYTES_PER_PX = 3 + 2.2


class PngWriter(RowWriter):
    """Rows in, PNG out, as `PyramidWriter` does it; at its end the image is in memory."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        raster: Raster,
        *,
        description: str | None = None,
        overwrite: bool = False,
        state: str | os.PathLike[str] | None = None,
        more_bytes: int = 0,
    ) -> None:
        if raster.width * raster.height > MAX_PX:
            raise ValueError(
                f"a PNG of {raster.width} x {raster.height} pixels would need the whole image in "
                f"memory: write .tif above {MAX_PX // 2**20} megapixels"
            )
        self._raster = raster
        self._description = describe({}) if description is None else description
        self.path, self._state = Path(path), state
        saved = None if state is None else WriterState.load(state, self._settings)
        if saved is None or not saved.whole:
            needs = 0 if saved else int(BYTES_PER_PX * raster.width * raster.height)
            check_output(path, overwrite=overwrite, needs=needs + more_bytes)
            check_output(sidecar(self.path), overwrite=overwrite)
        self._part = part_path(self.path, kept=state is not None).with_suffix(".rows")
        self._rows = int(saved.levels[0][0]) if saved else 0
        held = self._rows * int(raster.width) * raster.bands
        there = self._part.stat().st_size if self._part.exists() else -1
        # The last run ended between giving the name and removing its state.
        self._published = bool(saved and saved.whole) and there < 0 and self.path.exists()
        if saved and there < held and not self._published:
            raise FileNotFoundError(
                f"{self._part} is gone, which the state in {state} goes on from: remove that state "
                "to begin the output anew"
            )
        self._file = open(self._part, "r+b" if there >= held else "wb", buffering=0)  # noqa: SIM115
        self._file.truncate(held)
        self._file.seek(held)

    @property
    def _settings(self) -> dict[str, Any]:
        raster = self._raster
        return {
            "output": os.path.abspath(self.path),
            "format": "png",
            "size": [int(raster.width), int(raster.height)],
            "mpp": raster.mpp,
            "description": hashlib.sha256(self._description.encode()).hexdigest(),
        }

    @property
    def rows_written(self) -> int:
        """Rows that the writer has: the next row that it needs has this number."""
        return self._rows

    def write_rows(self, rows: Any) -> None:
        """Appends rows of pixels, uint8 [rows, width, 3], any number of them."""
        if self._file.closed:
            raise RuntimeError(f"{self.path} is closed: no more rows can be written")
        rows = self._raster.check_rows(rows, self._rows)
        check_there(self.path, self._part)
        data = np.ascontiguousarray(rows).reshape(-1).data
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            kept = "" if self._state is None else str(self._part)
            raise write_error(self.path, error, f" near row {self._rows}", kept=kept) from None
        self._rows += len(rows)

    def checkpoint(self) -> None:
        """Saves the state, crash-safe: a run that dies later goes on from here."""
        if self._state is None:
            raise RuntimeError(
                f"{self.path} has no folder for its state: open it with open_writer(..., state=...)"
            )
        self._save(whole=False)

    def _save(self, *, whole: bool) -> None:
        if self._state is not None:
            os.fsync(self._file.fileno())
            WriterState(self._settings, [[self._rows, 0, 0]], whole).save(self._state)

    def finish(self) -> None:
        """Writes the file; needs all rows."""
        if self._file.closed:
            return
        try:
            if self._rows != self._raster.height:
                raise RuntimeError(
                    f"{self.path} has {self._rows} of {self._raster.height} rows: it is not written"
                )
            if not self._published:
                self._save(whole=True)
                self._write()
        except BaseException:
            self.suspend()
            raise
        self.abort()

    def _write(self) -> None:
        shape = (int(self._raster.height), int(self._raster.width), 3)
        pixels = np.memmap(self._part, np.uint8, "r", shape=shape)
        text = PngImagePlugin.PngInfo()
        text.add_text("Description", self._description)
        dpi = 25_400 / (self._raster.mpp or 1.0)
        kept = self._state is not None
        with atomic(self.path, kept=kept) as part:
            Image.fromarray(pixels).save(part, format="PNG", dpi=(dpi, dpi), pnginfo=text)
            recipe = recipe_json(self._description).encode()
            atomic_bytes(sidecar(self.path), recipe, kept=kept)

    def suspend(self) -> None:
        """Closes the rows and keeps them and the state, which is saved once more.

        Without a folder for the state everything is removed.
        """
        if self._state is None:
            self.abort()
        elif not self._file.closed:
            with contextlib.suppress(OSError):
                self.checkpoint()
            self._file.close()

    def abort(self) -> None:
        """Removes the rows and the state; a finished output stays."""
        if not self._file.closed:
            self._file.close()
            self._part.unlink(missing_ok=True)
            if self._state is not None:  # last, for it says that the part may be gone
                remove_state(self._state)
