# SPDX-License-Identifier: Apache-2.0
"""Patches of a tiny model, as the tests of them make and compare them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import ssldiff_fast as sf
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.slides.grid import Grid
from tiny_models import tiny_grid


def grid_of(model: LatentDiffusion) -> Grid:
    """Five valid cells of six, somewhere in a slide."""
    grid = tiny_grid(model)
    valid = grid.valid.clone()
    valid[0, 1] = False
    return dataclasses.replace(
        grid,
        valid=valid,
        region_px=(1000, 2000, 3 * 64, 2 * 64),
        cell_level0_px=64,
        source={"name": "CMU 1.v2.svs"},
    )


def make(model: LatentDiffusion, folder: Path, **changes: Any) -> sf.PatchSynthesis:
    settings: dict[str, Any] = {"steps": 2, "batch_size": 3, "progress": False, **changes}
    grid = settings.pop("grid", None) or grid_of(model)
    return sf.synthesize_patches(model, grid, folder, **settings)


def hashes(folder: Path, pattern: str = "*.png") -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
    }
