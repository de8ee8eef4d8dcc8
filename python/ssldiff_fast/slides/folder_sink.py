# SPDX-License-Identifier: Apache-2.0
"""Formats that are a folder with a file for each tile.

Tiles of a later moment than the saved state are written again with the same bytes, so a file torn
by an interruption is replaced.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .levels import LevelSize, level_sizes
from .output import check_space
from .tile_sink import TileSink
from .writer_state import sync_names

# Names in one folder that common file systems and tools still cope with.
MOST_TILES = 4_000_000
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)


class FolderSink(TileSink):
    """Tiles are files of a hidden folder, which is renamed when it is whole."""

    ordered = False  # making a file takes as long as encoding a tile

    @abstractmethod
    def tile_path(self, level: int, row: int, column: int) -> str:
        """Where a tile lies, with "/" before its name."""

    @abstractmethod
    def prepare(self) -> None:
        """Makes what lies in the folder besides the tiles, when it is begun anew."""

    def check_files(self, path: Path) -> None:
        """Raises if the tiles are too many for a folder, or for the disk."""
        sizes = level_sizes(self.raster, self.tile, self.smallest)
        most = sizes[0].rows * sizes[0].columns
        if most > MOST_TILES:
            raise ValueError(
                f"{path} would have {most} tiles in one level, which are files of their own and at "
                f"most {MOST_TILES}: write .tif, or choose a larger tile"
            )
        check_space(path, 0, files=sum(size.rows * size.columns for size in sizes))

    def begin(
        self, part: Path, levels: Sequence[LevelSize], saved: Mapping[str, NDArray[Any]] | None
    ) -> None:
        self._part, self._sizes = part, levels
        self._made: set[str] = set()
        if saved is None:
            self.drop()
            part.mkdir()
            self.prepare()

    def put(self, level: int, row: int, column: int, tiles: Sequence[bytes]) -> None:
        for place, data in zip(itertools.count(column), tiles):
            path = self.tile_path(level, row, place)
            folder = path.rpartition("/")[0]
            if folder not in self._made:
                os.makedirs(folder, exist_ok=True)
                self._made.add(folder)
            write_file(path, data)

    def sync(self) -> dict[str, NDArray[Any]]:
        sync_disk(self._part)
        return {}

    def close(self) -> None:
        """Nothing is open between two tiles."""

    def drop(self) -> None:
        shutil.rmtree(self._part, ignore_errors=True)

    def move(self, new: Path, path: Path) -> None:
        """Puts a folder of the part in the place of an older one."""
        if new.exists():
            if path.exists():
                old = self._part.with_name(f"{self._part.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
                new.rename(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                new.rename(path)
            sync_names(path.parent)


def write_file(path: str, data: bytes) -> None:
    """Makes a file, or replaces it.

    `open` and a `Path` would take half as long again as all else that making a small file is, and
    ask the system twice more, after which a thread waits for its turn.
    """
    handle = os.open(path, _NEW_FILE, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
    finally:
        os.close(handle)


def sync_disk(folder: Path) -> None:
    """Makes all files of a folder's disk durable: one call, where fsync needs one for each."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if library is None or not hasattr(library, "syncfs"):
        if hasattr(os, "sync"):
            os.sync()
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        if library.syncfs(handle):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
    finally:
        os.close(handle)
