# SPDX-License-Identifier: Apache-2.0
"""Deep Zoom: OUT.dzi and a folder OUT_files with a JPEG or PNG for every tile.

OpenSeadragon and every other web viewer reads it, and libvips (and so anything by its tiles); it
holds no mpp but in the comment with the recipe. Tiles do not overlap. A resumed output equals the
uninterrupted one byte for byte, file by file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .codecs import DZI_CODECS, choose
from .folder_sink import FolderSink
from .output import atomic_bytes, check_output
from .raster import Raster, Rows

TILE = 256


class DziSink(FolderSink):
    """Levels down to one pixel, as viewers count on."""

    pads = False
    smallest = 1

    def __init__(
        self,
        raster: Raster,
        description: str,
        *,
        codec: str | None = None,
        quality: int | None = None,
        tile: int | None = None,
    ) -> None:
        super().__init__(raster, description)
        self.tile = TILE if tile is None else tile
        self.codec, self.quality = choose(DZI_CODECS, codec or "jpeg", quality, raster.bands)

    @property
    def settings(self) -> dict[str, Any]:
        return {"format": "dzi", "codec": self.codec.name, "quality": self.quality}

    @property
    def bytes_needed(self) -> int:
        return int(self.codec.bytes_per_px * self.raster.width * self.raster.height)

    def check(self, path: Path, *, overwrite: bool) -> None:
        check_output(path, overwrite=overwrite)
        self.check_files(path)
        tiles = tiles_folder(path)
        if tiles.exists() and not (overwrite and tiles.is_dir() and path.exists()):
            raise FileExistsError(
                f"the folder {tiles} exists and is kept: choose another name, or remove it"
            )

    def prepare(self) -> None:
        (self._part / "files").mkdir()

    def tile_path(self, level: int, row: int, column: int) -> str:
        number = len(self._sizes) - 1 - level
        return f"{self._part}/files/{number}/{column}_{row}.{self.codec.name}"

    def encode(self, level: int, pixels: Rows) -> bytes:
        return self.codec.encode(pixels, self.quality)

    def finish(self) -> None:
        raster = self.raster
        # Two hyphens would end the comment; inside JSON's strings they may be written otherwise.
        says = f"{self.description}\n{json.dumps({'mpp': raster.mpp})}".replace("--", "-\\u002d")
        text = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<!-- {says} -->\n"
            '<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" '
            f'Format="{self.codec.name}" Overlap="0" TileSize="{self.tile}">\n'
            f'  <Size Width="{raster.width}" Height="{raster.height}"/>\n'
            "</Image>\n"
        )
        atomic_bytes(self._part / "image.dzi", text.encode("ascii"), kept=True)
        self.sync()

    def publish(self, path: Path) -> None:
        if (self._part / "files").exists():
            path.unlink(missing_ok=True)  # of the output that is replaced: its tiles go first
        self.move(self._part / "files", tiles_folder(path))
        (self._part / "image.dzi").replace(path)
        self.drop()


def tiles_folder(path: Path) -> Path:
    """The folder of tiles of a .dzi."""
    return path.with_name(f"{path.stem}_files")
