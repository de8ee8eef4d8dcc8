# SPDX-License-Identifier: Apache-2.0
"""Which part of a reference an image lies on, so that two views move as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .image import ViewedImage

if TYPE_CHECKING:
    from ..slides.grid import Grid

Rect = tuple[float, float, float, float]  # x, y, width, height in level-0 pixels

# Sizes and shapes that differ by less are taken as the same: cells are whole pixels.
SIZE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Alignment:
    """Where an image lies on its reference.

    Attributes:
        region: x, y, width and height in the reference's level-0 pixels that the whole image
            covers; it may reach beyond the reference.
        how: what this follows from, one sentence.
        certain: False where the two were only put corner to corner.
    """

    region: Rect
    how: str
    certain: bool = True


def align(
    image: ViewedImage,
    reference: ViewedImage,
    *,
    region: tuple[int, int, int, int] | None = None,
    grid: Grid | None = None,
) -> Alignment:
    """Finds the part of the reference that an image covers.

    In this order: the region given; the grid's; what the image's own metadata say, where they
    name this reference; the whole of both, where they have one size; the upper left corner.

    Args:
        image: usually synthetic.
        reference: what it was made after.
        region: in the reference's level-0 pixels.
        grid: that the image was made from.

    Raises:
        ValueError: a region outside the reference, or of another shape than the image; a grid of
            another shape, or made from another slide.
    """
    if region is not None:
        rect = reference.slide.check_region(region)
        _check_shape(image, rect[2], rect[3], f"region {','.join(map(str, rect))}")
        return Alignment(rect, "the region given")
    if grid is not None:
        _check_source(grid, reference)
        check_grid_shape(grid, image)
        check_grid_shape(grid, image)
        return Alignment(grid.region_px, "the grid's region")
    noted = _noted_region(image.metadata, reference)
    if noted is not None:
        return Alignment(noted, "the region noted in the image's metadata")
    return _by_size(image, reference)


def check_grid_shape(grid: Grid, image: ViewedImage) -> None:
    """Checks that a grid has the shape of an image made from it."""
    rows, columns = grid.shape
    _check_shape(image, columns, rows, f"grid of {rows} x {columns} cells")


def made_from(grid: Grid, image: ViewedImage) -> bool:
    """Whether a grid says that it was encoded from this very image."""
    known = grid.source.get("hash")
    return bool(known) and known == image.slide.hash


def _check_source(grid: Grid, reference: ViewedImage) -> None:
    if grid.source.get("hash") and not made_from(grid, reference):
        raise ValueError(
            f"the grid was made from {grid.source.get('name') or 'another slide'}, not from "
            f"{reference.name} (their hashes differ): give the slide that it was made from"
        )


def _check_shape(image: ViewedImage, width: float, height: float, what: str) -> None:
    own_w, own_h = image.size_px
    if abs((own_w / own_h) / (width / height) - 1) > SIZE_TOLERANCE:
        raise ValueError(
            f"the {what} has another shape than {image.name}, which has {own_w} x {own_h} pixels: "
            "give the one that the image was made from"
        )


def _noted_region(metadata: Mapping[str, Any], reference: ViewedImage) -> Rect | None:
    noted = metadata.get("source_region_px")
    recipe = metadata.get("recipe")
    grid = recipe.get("grid") if isinstance(recipe, dict) else None
    if not isinstance(noted, list) or not isinstance(grid, dict):
        return None
    whole = len(noted) == 4 and all(type(value) is int for value in noted)
    if not whole or noted[2] < 1 or noted[3] < 1:
        return None
    if grid.get("source_hash") != reference.slide.hash:
        return None
    return noted[0], noted[1], noted[2], noted[3]


def _by_size(image: ViewedImage, reference: ViewedImage) -> Alignment:
    (own_w, own_h), (ref_w, ref_h) = image.size_px, reference.size_px
    both = image.mpp is not None and reference.mpp is not None
    scale = image.mpp / reference.mpp if image.mpp and reference.mpp else 1.0
    width, height = own_w * scale, own_h * scale
    same_shape = abs((width / height) / (ref_w / ref_h) - 1) <= SIZE_TOLERANCE
    if same_shape and (not both or abs(width / ref_w - 1) <= SIZE_TOLERANCE):
        return Alignment((0.0, 0.0, float(ref_w), float(ref_h)), "both have one size")
    unit = "micrometre by micrometre" if both else "pixel by pixel"
    return Alignment(
        (0.0, 0.0, width, height),
        f"nothing says where {image.name} lies on {reference.name}, so they are locked {unit} "
        "from the upper left corner: give the region (--region x,y,width,height) or the grid "
        "(--grid) that it was made from",
        certain=False,
    )
