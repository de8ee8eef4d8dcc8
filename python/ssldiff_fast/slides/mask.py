# SPDX-License-Identifier: Apache-2.0
"""Tissue masks: found on a thumbnail, or read from an image or a GeoJSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .slide import Slide, fit
from .tissue import MASK_MPP, Mask, tissue_of_rows

MASK_PX = 4096
# A mask file may be this much off the slide's aspect ratio.
ASPECT_TOLERANCE = 0.03


def slide_mask(slide: Slide, source: str | os.PathLike[str] | None = None) -> Mask:
    """The tissue mask of a whole slide.

    Args:
        slide: an open slide.
        source: None to find tissue on a thumbnail; otherwise a file: GeoJSON polygons in level-0
            pixels (QuPath's export), or an image of the whole slide where not black is tissue.

    Returns:
        bool [h, w], any size, covering the whole slide.

    Raises:
        FileNotFoundError, OSError, ValueError: for a mask file that cannot be used.
    """
    width, height = slide.size_px
    longest_um = max(width, height) * slide.mpp
    size = fit(width, height, max(1, min(MASK_PX, round(longest_um / MASK_MPP))))
    if source is None:
        return tissue_of_rows(
            lambda rows: slide.thumbnail_rows(size, rows), size[::-1], width * slide.mpp / size[0]
        )
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no mask file {path}: check the name")
    if path.suffix.lower() in (".geojson", ".json"):
        return _rasterise(path, slide.size_px, size)
    mask = _read_mask(path)
    aspect = (mask.shape[1] / mask.shape[0]) / (width / height)
    if abs(aspect - 1) > ASPECT_TOLERANCE:
        raise ValueError(
            f"the mask {path} has {mask.shape[1]} x {mask.shape[0]} pixels, another shape than "
            f"the slide's {width} x {height}: a mask covers the whole slide"
        )
    return mask


def _read_mask(path: Path) -> Mask:
    try:
        with Image.open(path) as image:
            mask: Mask = np.asarray(image.convert("L")) > 0
    except (OSError, SyntaxError) as error:  # Pillow's for a broken PNG
        raise OSError(f"the mask {path} is neither GeoJSON nor an image ({error})") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"the mask {path} has more pixels than fit in memory: scale it down, it need only have "
            "the shape of the slide"
        ) from None
    return mask


def _rasterise(path: Path, slide_px: tuple[int, int], size: tuple[int, int]) -> Mask:
    scale = np.array(size) / np.array(slide_px)
    try:
        polygons = [
            [_ring(ring) * scale for ring in rings]
            for rings in _polygons(json.loads(path.read_text(encoding="utf-8")))
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the mask {path} is not GeoJSON ({error})") from None
    if not polygons:
        raise ValueError(f"the mask {path} has no Polygon or MultiPolygon: draw one around tissue")
    mask = np.zeros(size[::-1], bool)
    for rings in polygons:
        image = Image.new("1", size)
        draw = ImageDraw.Draw(image)
        for index, points in enumerate(rings):  # the outline, then its holes
            if len(points) > 2:
                draw.polygon([tuple(p) for p in points], fill=int(index == 0))
        mask |= np.asarray(image)
    return mask


def _ring(points: Any) -> NDArray[np.float64]:  # [N, 2]
    ring = np.asarray(points, float)
    if ring.ndim != 2 or ring.shape[1] < 2 or not np.isfinite(ring).all():
        raise ValueError("a ring must be a list of [x, y]")
    return ring[:, :2]


def _polygons(node: Any) -> Any:
    """Every polygon (a list of rings) of a GeoJSON object, however deep; a list counts too."""
    if isinstance(node, list):
        for item in node:
            yield from _polygons(item)
        return
    if node is None:  # a Feature without a geometry
        return
    kind = node["type"]
    if kind == "FeatureCollection":
        yield from _polygons(node["features"])
    elif kind == "Feature":
        yield from _polygons(node["geometry"])
    elif kind == "GeometryCollection":
        yield from _polygons(node["geometries"])
    elif kind == "Polygon":
        yield node["coordinates"]
    elif kind == "MultiPolygon":
        yield from node["coordinates"]


def cell_fractions(
    mask: Mask,  # [h, w] over the whole slide
    slide_px: tuple[int, int],
    origin: tuple[int, int],
    cell: int,
    shape: tuple[int, int],
) -> NDArray[np.float64]:
    """The share of each cell that is tissue.

    Args:
        mask: bool [h, w], covering the whole slide.
        slide_px: (width, height) of the slide at level 0.
        origin: (x, y) of the first cell.
        cell: side of a cell in level-0 pixels.
        shape: (R, K) of the grid.

    Returns:
        float64 [R, K] in 0..1.
    """
    tops, bottoms = _bounds(origin[1], cell, shape[0], slide_px[1], mask.shape[0])
    lefts, rights = _bounds(origin[0], cell, shape[1], slide_px[0], mask.shape[1])
    fractions = np.empty(shape)
    total = np.zeros(mask.shape[1] + 1)
    for row, (top, bottom) in enumerate(zip(tops, bottoms)):
        total[1:] = mask[top:bottom].sum(0).cumsum()
        inside = total[rights] - total[lefts]
        fractions[row] = inside / ((bottom - top) * (rights - lefts))
    return fractions


def _bounds(
    start: int, cell: int, count: int, slide_px: int, mask_px: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    edges = (start + cell * np.arange(count + 1)) * mask_px / slide_px
    low = np.minimum(np.floor(edges[:-1] + 0.5), mask_px - 1).astype(np.int64)
    high = np.floor(edges[1:] + 0.5).astype(np.int64)
    return low, np.maximum(high, low + 1)  # a cell sees at least one mask pixel
