# SPDX-License-Identifier: Apache-2.0
"""Similarity between an image and its reference or grid, cell by cell, for the viewer."""

from __future__ import annotations

from typing import Any

from ssldiff_fast.evaluation.similarity import grid_similarity
from ssldiff_fast.evaluation.similarity_file import CellSimilarity
from ssldiff_fast.slides.encode import encode
from ssldiff_fast.slides.grid import Grid

from .align import Alignment, Rect
from .image import ViewedImage


def measure_similarity(
    image: ViewedImage,
    encoder: Any,
    *,
    reference: ViewedImage | None = None,
    alignment: Alignment | None = None,
    grid: Grid | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> CellSimilarity:
    """Encodes the image, and compares it with the grid or, without one, the reference's region.

    Args:
        image: usually synthetic.
        encoder: a model's `encoder`.
        reference: with `alignment`, what the image was made after.
        alignment: where the image lies on the reference.
        grid: that the image was made from; its embeddings are compared then.
        batch_size: cells given to the encoder at once.
        progress: show progress bars.

    Raises:
        ValueError: neither grid nor reference; an image without mpp; no common cells.
    """
    if grid is None and (reference is None or alignment is None):
        raise ValueError(
            f"there is nothing to compare {image.name} with: give a REFERENCE, or --grid"
        )
    options: dict[str, Any] = {"mask": False, "batch_size": batch_size, "progress": progress}
    own = encode(_with_mpp(image), encoder, **options)
    if grid is not None:
        similarity = grid_similarity(grid, own)
        rect = None if alignment is None else alignment.region
        name = "the grid" if reference is None else reference.name
        other = {"name": name, "hash": grid.source.get("hash"), "rect": rect}
    else:
        assert reference is not None
        assert alignment is not None
        region = _inside(alignment.region, reference)
        theirs = encode(_with_mpp(reference), encoder, region=region, **options)
        own, theirs = _common(own, theirs)
        similarity = grid_similarity(theirs, own)
        rect = _rect(theirs)
        other = {"name": reference.name, "hash": reference.slide.hash, "rect": rect}
    if other["rect"] is None:
        del other["rect"]
    return CellSimilarity(
        similarity,
        {"name": image.name, "hash": image.slide.hash, "rect": _rect(own)},
        other,
        str(own.encoder.get("name", "")),
    )


def _with_mpp(image: ViewedImage) -> Any:
    if image.mpp is None:
        raise ValueError(f"similarity needs the mpp of {image.name}: {image.no_mpp}")
    return image.slide


def _inside(region: Rect, reference: ViewedImage) -> tuple[int, int, int, int]:
    """The region in whole pixels, cut off where the reference ends."""
    x, y = round(region[0]), round(region[1])
    width, height = reference.size_px
    return x, y, min(round(region[2]), width - x), min(round(region[3]), height - y)


def _common(own: Grid, theirs: Grid) -> tuple[Grid, Grid]:
    """The cells that both have: rounding, or a reference's border, may cost one its last ones."""
    rows = slice(0, min(own.shape[0], theirs.shape[0]))
    columns = slice(0, min(own.shape[1], theirs.shape[1]))
    return own.crop(rows, columns), theirs.crop(rows, columns)


def _rect(grid: Grid) -> Rect:
    x, y, width, height = grid.region_px
    return float(x), float(y), float(width), float(height)
