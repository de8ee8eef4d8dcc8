# SPDX-License-Identifier: Apache-2.0
"""What a format is to the writer of pyramids: somewhere to put encoded tiles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .levels import LevelSize
from .raster import Raster, Rows


class TileSink(ABC):
    """A format. `encode` is called from many threads, and so is `put` of formats that are not
    `ordered`; the rest from one at a time.

    Attributes:
        raster: the image.
        tile: side of a tile.
        smallest: the coarsest level fits a square of this side.
        pads: tiles at the right and lower border are whole, their image's last pixel repeated.
        ordered: tiles are put in one order, by one thread.
        description: what `raster.describe` returned, with the recipe.
    """

    tile: int
    smallest: int
    pads: bool
    ordered: bool = True

    def __init__(self, raster: Raster, description: str) -> None:
        self.raster, self.description = raster, description

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides the bytes, besides the image and the tile, for the saved state."""

    @property
    @abstractmethod
    def bytes_needed(self) -> int:
        """Estimated bytes on the disk, what is needed for a while only included."""

    @abstractmethod
    def check(self, path: Path, *, overwrite: bool) -> None:
        """Raises OSError if `path` cannot become the output, before anything is written."""

    @abstractmethod
    def begin(
        self, part: Path, levels: Sequence[LevelSize], saved: Mapping[str, NDArray[Any]] | None
    ) -> None:
        """Opens the part anew, or as it was when `saved` was returned by `sync`."""

    @abstractmethod
    def encode(self, level: int, pixels: Rows) -> bytes:
        """A tile, uint8 [h, w, bands], contiguous."""

    @abstractmethod
    def put(self, level: int, row: int, column: int, tiles: Sequence[bytes]) -> None:
        """Takes neighbouring encoded tiles, from a column on; of an `ordered` format always in the
        same order."""

    @abstractmethod
    def sync(self) -> dict[str, NDArray[Any]]:
        """Makes all tiles durable; returns what `begin` needs to go on from here."""

    @abstractmethod
    def finish(self) -> None:
        """Completes the part, durably; may be called again after an interruption."""

    @abstractmethod
    def publish(self, path: Path) -> None:
        """Gives the part its final name; may be called again after an interruption."""

    @abstractmethod
    def close(self) -> None:
        """Closes the part and keeps it; may be called twice."""

    @abstractmethod
    def drop(self) -> None:
        """Removes the part."""
