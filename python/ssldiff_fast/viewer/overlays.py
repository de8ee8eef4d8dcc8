# SPDX-License-Identifier: Apache-2.0
"""What is laid over the images: tissue masks, a grid's cells, and similarities cell by cell."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .align import Alignment, Rect, check_grid_shape, made_from
from .image import ViewedImage

if TYPE_CHECKING:
    from ..evaluation.similarity_file import CellSimilarity
    from ..slides.grid import Grid

# The colours run between these shares of the cells: one odd cell does not flatten all others.
LEGEND_QUANTILES = (0.02, 0.98)
# A range narrower than this would show rounding as a pattern.
LEGEND_SPAN = 0.02


@dataclass(frozen=True, eq=False)
class Cells:
    """A value for each cell of a grid, and where the cells lie on the images.

    Attributes:
        name: `grid` or `similarity`.
        values: [R, K] fp32; NaN where there is nothing to say.
        rects: for each image, what the cells cover together in its level-0 pixels, or None.
        facts: about the values, for the page.
    """

    name: str
    values: np.ndarray  # [R, K] fp32
    rects: tuple[Rect | None, ...]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All but the values."""
        rows, columns = self.values.shape
        return {
            "name": self.name,
            "rows": rows,
            "columns": columns,
            "rects": [rect and list(rect) for rect in self.rects],
            **self.facts,
        }

    def to_bytes(self) -> bytes:
        """The values, row after row, as little-endian float32."""
        return self.values.astype("<f4").tobytes()


def mask_png(image: ViewedImage, source: str | os.PathLike[str] | None = None) -> bytes:
    """The tissue mask of an image: a PNG of one bit a pixel, tissue white.

    Args:
        image: with an mpp, which scales specks and holes.
        source: a mask file, as `slide_mask` takes it; by default tissue is found.

    Raises:
        ValueError: the image has no mpp.
    """
    from ..slides.mask import slide_mask

    if image.mpp is None and source is None:
        raise ValueError(f"tissue is not looked for in {image.name}, whose mpp is not known")
    file = io.BytesIO()
    Image.fromarray(slide_mask(image.slide, source)).convert("1").save(file, "PNG")
    return file.getvalue()


def grid_cells(grid: Grid, images: Sequence[ViewedImage], alignment: Alignment | None) -> Cells:
    """The valid cells of a grid: 1 where valid, 0 elsewhere.

    Args:
        grid: that the first image was made from, or that was encoded from the first image.
        images: the image, and its reference where there is one.
        alignment: of the image on its reference.

    Raises:
        ValueError: a grid of another shape than the image, or from elsewhere.
    """
    rects: list[Rect | None] = []
    if len(images) == 1 and made_from(grid, images[0]):
        x, y, width, height = images[0].slide.check_region(grid.region_px)
        rects.append((x, y, width, height))
    else:
        check_grid_shape(grid, images[0])
        width, height = images[0].size_px
        rects.append((0.0, 0.0, float(width), float(height)))
    if alignment is not None:
        rects.append(alignment.region)
    facts = {"valid": int(grid.valid.sum()), "encoder": grid.encoder.get("name")}
    return Cells("grid", grid.valid.numpy().astype(np.float32), tuple(rects), facts)


def similarity_cells(cells: CellSimilarity, images: Sequence[ViewedImage]) -> Cells:
    """Similarities to be drawn over the images that they were measured on.

    Raises:
        ValueError: they were measured on other files.
    """
    rects: list[Rect | None] = []
    for image, side in zip(images, (cells.image, cells.reference)):
        if side.get("hash") and side["hash"] != image.slide.hash and "rect" in side:
            raise ValueError(
                f"the similarities were measured on {side.get('name') or 'another file'}, which is "
                f"not {image.name} (their hashes differ): remove the file to measure them again"
            )
        rect = side.get("rect")
        rects.append(None if rect is None else (rect[0], rect[1], rect[2], rect[3]))
    values = cells.similarity
    low, high = (values.quantile(share) for share in LEGEND_QUANTILES)
    middle, span = (low + high) / 2, max(high - low, LEGEND_SPAN)
    facts = {
        "range": [max(-1.0, middle - span / 2), min(1.0, middle + span / 2)],
        "summary": values.summary(),
        "encoder": cells.encoder,
        "against": cells.reference.get("name", ""),
    }
    return Cells("similarity", values.cells.astype(np.float32), tuple(rects), facts)
