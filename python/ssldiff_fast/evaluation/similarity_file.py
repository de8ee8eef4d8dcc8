# SPDX-License-Identifier: Apache-2.0
"""The file of per-cell similarities: JSON, so that it is read anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssldiff_fast.slides.output import atomic_bytes, check_output

from .similarity import Similarity

FORMAT = "ssldiff_fast similarity 1"
DECIMALS = 4
_SIDES = ("image", "reference")


@dataclass(frozen=True, eq=False)
class CellSimilarity:
    """Similarities with the places of their cells.

    Attributes:
        similarity: the cosine of each cell.
        image: `name`, `hash` of the image, and `rect`, the (x, y, width, height) in level-0
            pixels that the cells cover together.
        reference: the same of what it was compared with; a grid has no `rect`.
        encoder: the encoder's name.
    """

    similarity: Similarity
    image: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, Any] = field(default_factory=dict)
    encoder: str = ""


def save_similarity(
    path: str | os.PathLike[str], cells: CellSimilarity, *, overwrite: bool = False
) -> Path:
    """Writes the similarities as JSON, whole or not at all; cells not compared are null."""
    path = check_output(path, overwrite=overwrite)
    values = np.round(cells.similarity.cells.astype(np.float64), DECIMALS)
    content = {
        "format": FORMAT,
        "encoder": cells.encoder,
        "image": dict(cells.image),
        "reference": dict(cells.reference),
        "summary": cells.similarity.summary(),
        "cells": [[None if np.isnan(v) else float(v) for v in row] for row in values],
    }
    atomic_bytes(path, (json.dumps(content) + "\n").encode())
    return path


def read_similarity(path: str | os.PathLike[str]) -> CellSimilarity:
    """Reads similarities.

    Raises:
        FileNotFoundError, OSError: no such file.
        ValueError: another kind of file, rows of different lengths, values that are no cosines.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of similarities {path}: check the name")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        rows = [[np.nan if v is None else float(v) for v in row] for row in content["cells"]]
        values = np.array(rows, np.float32)
        sides = [_side(content[name]) for name in _SIDES]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is no file of similarities ({reason}): expected JSON with the format "
            f"{FORMAT!r}, as `ssldiff view --similarity` writes it"
        ) from None
    finite = values[np.isfinite(values)]
    if values.ndim != 2 or not finite.size or np.abs(finite).max() > 1 or np.isinf(values).any():
        raise ValueError(
            f"{path} holds no table of cosines from -1 to 1 with null for cells not compared: "
            "let `ssldiff view --similarity` write it again"
        )
    encoder = str(content.get("encoder", ""))
    return CellSimilarity(Similarity(values), sides[0], sides[1], encoder)


def _side(content: Any) -> dict[str, Any]:
    side = dict(content)
    if "rect" in side:
        side["rect"] = [float(value) for value in side["rect"]]
        _, _, width, height = side["rect"]
        if not (np.isfinite(side["rect"]).all() and width > 0 and height > 0):
            raise ValueError(f"rect is {side['rect']}")
    return side
