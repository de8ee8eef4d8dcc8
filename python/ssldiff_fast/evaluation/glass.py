# SPDX-License-Identifier: Apache-2.0
"""How even the glass of a masked slide is, where the figure of seams sees tissue alone.

Steps between neighbouring squares of glass show boxes and lines, whatever makes them; and what the
mask left out should be of the colour that glass has beside tissue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssldiff_fast.canvas.glass import CHROMA, DARKEST
from ssldiff_fast.slides.slide import RGB

_SQUARE = 16  # pixels
_SHARE = 0.7  # of a square that is glass, at least, to be compared


@dataclass(frozen=True)
class GlassFigures:
    """Grey levels, channels averaged; NaN where there is nothing to compare.

    Attributes:
        colour: between the mean glass in cells of tissue and that of cells that have no tissue
            beside them.
        step: between neighbouring squares of glass outside cells of tissue, exceeded by 1 % of
            them.
        beyond: the largest such step among cells that have no tissue beside them.
    """

    colour: float
    step: float
    beyond: float


def measure_glass(
    image: RGB,  # [H, W, 3]
    tissue: NDArray[np.bool_],  # [R, K]
) -> GlassFigures:
    """Measure the glass of an image.

    Args:
        image: uint8 RGB.
        tissue: which cells hold tissue, spread evenly over the image; cells of whole squares of 16
            pixels.

    Raises:
        ValueError: the image is not RGB uint8, or its sides are not whole squares in each cell.
    """
    height, width = _checked(image, tissue)
    squares = image[:height, :width].reshape(height // _SQUARE, _SQUARE, -1, _SQUARE, 3)
    bright = squares.min(-1) >= DARKEST
    glass = bright & (squares.max(-1) - squares.min(-1) < CHROMA)
    share = glass.mean((1, 3))
    total = (squares * glass[..., None]).sum((1, 3), dtype=np.float64)
    mean = total / np.maximum(1, glass.sum((1, 3)))[..., None]
    scale = [square // cell for square, cell in zip(share.shape, tissue.shape)]
    inside = tissue.repeat(scale[0], 0).repeat(scale[1], 1)
    beyond = ~_grown(tissue).repeat(scale[0], 0).repeat(scale[1], 1)
    steps = _steps(mean, (share >= _SHARE) & ~inside)
    of_beyond = _steps(mean, (share >= _SHARE) & beyond)

    def colour(where: NDArray[np.bool_]) -> NDArray[np.float64]:
        count = glass.sum((1, 3))[where].sum()
        return total[where].sum(0) / count if count else np.full(3, np.nan)

    return GlassFigures(
        colour=float(np.abs(colour(inside) - colour(beyond)).mean()),
        step=float(np.quantile(steps, 0.99)) if len(steps) else float("nan"),
        beyond=float(of_beyond.max()) if len(of_beyond) else float("nan"),
    )


def _checked(image: RGB, tissue: NDArray[np.bool_]) -> tuple[int, int]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"measure_glass: image is {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3]"
        )
    height, width = image.shape[:2]
    rows, columns = tissue.shape
    if min(rows, columns) < 1 or height % (rows * _SQUARE) or width % (columns * _SQUARE):
        raise ValueError(
            f"measure_glass: an image of {width} x {height} pixels has no {columns} x {rows} cells "
            f"of whole squares of {_SQUARE} pixels; give the tissue that it was made with"
        )
    return height, width


def _grown(tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The cells with tissue in them or in one of their eight neighbours."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(tissue, 1), (3, 3))
    return np.asarray(around.any((2, 3)))


def _steps(
    mean: NDArray[np.float64],  # [h, w, 3]
    valid: NDArray[np.bool_],  # [h, w]
) -> NDArray[np.float64]:
    """Between neighbours of which both are valid."""
    return np.concatenate(
        [
            np.abs(np.diff(mean, axis=axis)).mean(2)[
                np.take(valid, range(1, valid.shape[axis]), axis)
                & np.take(valid, range(valid.shape[axis] - 1), axis)
            ]
            for axis in (0, 1)
        ]
    )
