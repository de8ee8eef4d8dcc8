# SPDX-License-Identifier: Apache-2.0
"""Opens everything that a viewer is asked to show, and checks that it fits together."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .align import Alignment, align
from .image import ViewedImage, open_image
from .overlays import Cells, grid_cells, similarity_cells
from .scene import Scene

if TYPE_CHECKING:
    from ..evaluation.similarity_file import CellSimilarity
    from ..slides.grid import Grid


def open_scene(
    out: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    *,
    grid: str | os.PathLike[str] | None = None,
    model: str | None = None,
    similarity: str | os.PathLike[str] | None = None,
    region: tuple[int, int, int, int] | None = None,
    mask: str | os.PathLike[str] | None = None,
    mpp: float | None = None,
    reference_mpp: float | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Scene:
    """Opens an image, alone or with its reference, and what is laid over them.

    Args:
        out: the image, usually synthetic.
        reference: what it was made after.
        grid: that the image was made from, or that was encoded from it: shows its cells.
        model: compares the image with the grid or, without one, the reference, by its encoder.
        similarity: a JSON file: read where it exists, otherwise written.
        region: part of the reference, in its level-0 pixels, that the image was made after.
        mask: a mask file of the reference (of the image, where it is alone).
        mpp, reference_mpp: micrometres per pixel, for files that do not say it.
        device: of the encoder.
        progress: show progress bars while encoding.

    Raises:
        ValueError, OSError, RuntimeError: for whatever does not exist, cannot be read, or does not
            fit to the rest.
    """
    _check_wanted(
        reference=reference is not None,
        grid=grid is not None,
        model=model is not None,
        missing=None if similarity is None or Path(similarity).exists() else similarity,
        region=region is not None,
        reference_mpp=reference_mpp is not None,
    )
    images = [open_image(out, mpp=mpp)]
    if reference is not None:
        second = open_image(reference, mpp=reference_mpp)
        advice = second.no_mpp.replace("line: --mpp", "line: --reference-mpp")
        images.append(dataclasses.replace(second, no_mpp=advice))
    cells = None if grid is None else _open_grid(grid)
    alignment = None
    if len(images) == 2:
        alignment = align(images[0], images[1], region=region, grid=cells)
    overlays: list[Cells] = []
    if cells is not None:
        overlays.append(grid_cells(cells, images, alignment))
    measured = _similarity(images, alignment, cells, similarity, model, device, progress)
    if measured is not None:
        overlays.append(similarity_cells(measured, images))
    scene = Scene(tuple(images), alignment, tuple(overlays), mask)
    if mask is not None:
        scene.mask_png(len(images) - 1)  # one that cannot be read is said now
    return scene


def _check_wanted(
    *,
    reference: bool,
    grid: bool,
    model: bool,
    missing: str | os.PathLike[str] | None,
    region: bool,
    reference_mpp: bool,
) -> None:
    """Options that need others, before anything is opened."""
    for name, given in (("--region", region), ("--reference-mpp", reference_mpp)):
        if given and not reference:
            raise ValueError(f"{name} is of REFERENCE, which is not given: give it after OUT")
    if model and not (reference or grid):
        raise ValueError(
            "--model compares OUT with a REFERENCE or a grid, and neither is given: give REFERENCE "
            "after OUT, or --grid"
        )
    if missing is not None and not model:
        raise FileNotFoundError(
            f"there is no file of similarities {missing}: check the name, or give --model to "
            "measure them"
        )


def _open_grid(path: str | os.PathLike[str]) -> Grid:
    from ..slides.grid import Grid

    return Grid.open(path)


def _similarity(
    images: list[ViewedImage],
    alignment: Alignment | None,
    grid: Grid | None,
    file: str | os.PathLike[str] | None,
    model: str | None,
    device: str,
    progress: bool,
) -> CellSimilarity | None:
    if file is not None and Path(file).exists():
        from ..evaluation.similarity_file import read_similarity

        return read_similarity(file)
    if model is None:
        return None
    from ..evaluation.similarity_file import save_similarity
    from ..models.load import load
    from ..slides.output import check_output
    from .measure import measure_similarity

    if file is not None:
        check_output(file)
    measured = measure_similarity(
        images[0],
        load(model, device=device).encoder,
        reference=images[1] if len(images) == 2 else None,
        alignment=alignment,
        grid=grid,
        progress=progress,
    )
    if file is not None:
        save_similarity(file, measured)
    return measured
