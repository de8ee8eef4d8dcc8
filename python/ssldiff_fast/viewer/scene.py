# SPDX-License-Identifier: Apache-2.0
"""Everything that one viewer shows, as the page is told of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from .align import Alignment
from .image import ViewedImage
from .overlays import Cells, mask_png
from .tiles import DeepZoom, TileCache

# Keys of a recipe that say most about a synthetic image.
_RECIPE_FACTS = (("model", "name"), ("preset", "name"), ("grid", "source"))


@dataclass(eq=False)
class Scene:
    """The images of a viewer, and what is laid over them.

    Attributes:
        images: one, or an image and its reference.
        alignment: where the first lies on the second.
        cells: values for the cells of a grid.
        mask: a mask file of the last image, in place of the tissue found.
        cache: of rendered tiles.
    """

    images: tuple[ViewedImage, ...]
    alignment: Alignment | None = None
    cells: tuple[Cells, ...] = ()
    mask: str | os.PathLike[str] | None = None
    cache: TileCache = field(default_factory=TileCache)

    def __post_init__(self) -> None:
        self.zooms = tuple(DeepZoom(image.slide) for image in self.images)

    def tile(self, image: int, level: int, column: int, row: int) -> bytes:
        """A tile as JPEG, from the cache or rendered now."""
        key = (image, level, column, row)
        return self.cache.get(key, lambda: self.zooms[image].render(level, column, row))

    def mask_png(self, image: int) -> bytes:
        """An image's tissue mask; made once."""
        source = self.mask if image == len(self.images) - 1 else None
        return self.cache.get(("mask", image), lambda: mask_png(self.images[image], source))

    def has_mask(self, image: int) -> bool:
        """Whether an image's tissue can be shown."""
        given = self.mask is not None and image == len(self.images) - 1
        return given or self.images[image].mpp is not None

    def to_json(self) -> dict[str, Any]:
        """What the page needs to start."""
        alignment = self.alignment
        return {
            "images": [self._image(index) for index in range(len(self.images))],
            "alignment": alignment
            and {
                "region": list(alignment.region),
                "how": alignment.how,
                "certain": alignment.certain,
            },
            "cells": [cells.to_json() for cells in self.cells],
        }

    def _image(self, index: int) -> dict[str, Any]:
        image, zoom = self.images[index], self.zooms[index]
        width, height = image.size_px
        return {
            "name": image.name,
            "role": "image" if index == 0 else "reference",
            "width": width,
            "height": height,
            "tile": zoom.tile,
            "mpp": image.mpp,
            "no_mpp": image.no_mpp,
            "synthetic": image.synthetic,
            "facts": _facts(image),
            "mask": self.has_mask(index),
        }

    def close(self) -> None:
        """Closes the slides."""
        for image in self.images:
            image.slide.close()


def _facts(image: ViewedImage) -> dict[str, str]:
    """What is known of a synthetic image's making, as text."""
    recipe = image.metadata.get("recipe")
    if not image.synthetic or not isinstance(recipe, dict):
        return {}
    facts = {}
    for part, key in _RECIPE_FACTS:
        value = recipe[part].get(key) if isinstance(recipe.get(part), dict) else None
        if isinstance(value, str | int | float):
            facts["made after" if part == "grid" else part] = str(value)
    if "seed" in image.metadata:
        facts["seed"] = str(image.metadata["seed"])
    return facts
