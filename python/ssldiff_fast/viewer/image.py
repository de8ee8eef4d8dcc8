# SPDX-License-Identifier: Apache-2.0
"""What is viewed: a slide or image, its mpp where it has one, and whether it is synthetic."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..slides.reader import open_slide
from ..slides.slide import MppError, Slide

# What our writers put first into the description of a file; the next line is JSON.
SYNTHETIC = "SYNTHETIC image"
_DESCRIPTIONS = ("tiff.ImageDescription", "openslide.comment", "description")
# A larger file beside an image is no recipe of ours.
SIDECAR_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class ViewedImage:
    """An open image.

    Attributes:
        slide: reads regions; its mpp is a stand-in where `mpp` is None.
        mpp: micrometres per level-0 pixel, or None where the file says none that can be.
        no_mpp: why there is none, one sentence.
        synthetic: whether the file, or the JSON beside it, says that it is synthetic.
        metadata: what either holds besides: recipe, seed, region of the source.
    """

    slide: Slide
    mpp: float | None
    no_mpp: str = ""
    synthetic: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name."""
        return str(self.slide) if self.slide.path is None else self.slide.path.name

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) at level 0."""
        return self.slide.size_px


def open_image(path: str | os.PathLike[str], *, mpp: float | None = None) -> ViewedImage:
    """Opens a slide or image to be looked at; it need not have an mpp.

    Args:
        path: anything that `open_slide` opens.
        mpp: overrules what the file says.

    Raises:
        OSError, ValueError: as `open_slide`, except that a missing or implausible mpp in the file
            is no error.
    """
    path = Path(path)
    try:
        slide = open_slide(path, mpp=mpp)
        known, why = slide.mpp, ""
    except MppError as error:
        if mpp is not None:
            raise
        slide, known, why = open_slide(path, mpp=1.0), None, str(error)
    synthetic, metadata = _synthetic(slide, path)
    return ViewedImage(slide, known, why, synthetic, metadata)


def _synthetic(slide: Slide, path: Path) -> tuple[bool, Mapping[str, Any]]:
    """Whether an image says that it is synthetic, and its metadata."""
    beside = _sidecar(path)
    for name in _DESCRIPTIONS:
        text = slide.properties.get(name, "")
        if text.startswith(SYNTHETIC):
            return True, _json((text.splitlines()[1:] or [""])[0]) or beside
    return beside.get("synthetic") is True, beside


def _sidecar(path: Path) -> Mapping[str, Any]:
    """The JSON beside an output (`out.tif.json`), where it is one of ours."""
    file = path.with_name(f"{path.name}.json")
    try:
        if file.stat().st_size > SIDECAR_BYTES:
            return {}
        return _json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):  # a label is missing then, and nothing else
        return {}


def _json(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
