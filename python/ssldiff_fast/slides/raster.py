# SPDX-License-Identifier: Apache-2.0
"""What every writer of images checks, and what every file says about itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .pixel_band import PixelBand, Rows
from .slide import MPP_RANGE

# No scanner's image is wider.
MAX_SIDE_PX = 1_000_000


@dataclass(frozen=True)
class Raster:
    """An image to be written: its size in pixels, micrometres per pixel (None: unknown), bands."""

    width: int
    height: int
    mpp: float | None
    bands: int = 3

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"the {name} of the output must be an integer, not {value!r}")
            if not 1 <= value <= MAX_SIDE_PX:
                raise ValueError(
                    f"the {name} of the output is {value} pixels, expected 1 to {MAX_SIDE_PX}: "
                    "choose another size"
                )
        if self.mpp is not None and not MPP_RANGE[0] <= self.mpp <= MPP_RANGE[1]:
            raise ValueError(
                f"the output's mpp is {self.mpp} um per pixel, expected {MPP_RANGE[0]:g} to "
                f"{MPP_RANGE[1]:g}: a slide is never written without one"
            )
        if self.bands not in (3, 4):
            raise ValueError(f"the output has {self.bands} bands, expected 3 (or 4 for scenes)")

    def check_rows(self, rows: Any, written: int) -> Rows | PixelBand:
        """The rows, or an error when they do not continue the image."""
        rows = rows if isinstance(rows, PixelBand) else np.asarray(rows)
        if rows.ndim != 3 or rows.shape[1:] != (self.width, self.bands):
            raise ValueError(
                f"rows must be [rows, {self.width}, {self.bands}], not {list(rows.shape)}"
            )
        if rows.dtype != np.uint8:
            raise TypeError(f"rows must be uint8, not {rows.dtype}")
        if written + len(rows) > self.height:
            raise ValueError(
                f"{written} rows are written of {self.height}, and {len(rows)} more came"
            )
        return rows


def describe(metadata: Mapping[str, Any]) -> str:
    """The text that says in every file that it is synthetic, and its recipe as JSON (ASCII)."""
    from ssldiff_fast import __version__

    return f"SYNTHETIC image, not a scan of tissue; made by ssldiff_fast {__version__}\n" + (
        json.dumps(dict(metadata), sort_keys=True)
    )


def recipe_json(description: str) -> str:
    """The JSON in what `describe` returned."""
    return description.split("\n", 1)[1]


def sidecar(path: str | os.PathLike[str]) -> str:
    """The JSON beside an output: `out.tif` has `out.tif.json`."""
    return f"{os.fspath(path)}.json"
