# SPDX-License-Identifier: Apache-2.0
"""One image per embedding, many at a time (the paper's patch model, section 3.1)."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ssldiff_fast._checks import check_count
from ssldiff_fast.canvas.noise import check_seed
from ssldiff_fast.canvas.presets import Preset
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.threads import measured_threads
from ssldiff_fast.patch_sampler import PatchSampler
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.slides.output import atomic_bytes, check_output, make_folder
from ssldiff_fast.slides.patch_files import (
    JPEG_QUALITY,
    Patch,
    PatchFolder,
    is_patch_file,
    patch_name,
)
from ssldiff_fast.synthesis_inputs import loaded_model, opened_grid, wanted_grid
from ssldiff_fast.synthesis_plan import digest, settle

RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class PatchSynthesis:
    """What a run of patches made.

    Attributes:
        folder: where they are.
        made: patches made by this run.
        kept: patches that were there already.
        size_px: (width, height) of each.
        mpp: micrometres per pixel.
        seconds: of the run.
        recipe: everything besides the seeds that decides the bytes.
    """

    folder: Path
    made: int
    kept: int
    size_px: tuple[int, int]
    mpp: float
    seconds: float
    recipe: Mapping[str, Any]


def synthesize_patches(
    model: LatentDiffusion | str | os.PathLike[str],
    grid: Grid | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    seeds: int = 1,
    preset: str | Preset = "fast",
    steps: int | None = None,
    guidance_scale: float | None = None,
    eta: float | None = None,
    batch_size: int = 16,
    format: str = "png",
    quality: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    decoder_dtype: str | None = None,
    execution: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PatchSynthesis:
    """Make one image of every valid cell of a grid, in full batches.

    Files are named `SLIDE_X_Y_sSEED`, X and Y in level-0 pixels of the source. A run that stopped
    goes on where it was when it is called again: what is there is kept. `recipe.json` in the
    folder says how the patches were made; another recipe needs another folder, or `overwrite`.

    The noise of a patch is a function of seed, X and Y, and its place in a batch one of seed and
    cell; every batch has `batch_size` windows. So a patch does not depend on which others of the
    grid are made with it, before or after. The recipe fixes what its rounding depends on: grid,
    batch size, precision and solver; beyond it there are the kind of processor and the version of
    PyTorch.

    Args:
        model: a loaded model, or what `sf.load` takes.
        grid: a grid, or the path of its HDF5 file.
        folder: made if it is not there.
        seed: the first seed.
        seeds: how many images of each cell, with seeds `seed`, `seed` + 1, ...
        preset: solver, steps, eta and guidance: "fast", "paper", "authors" or a `Preset`.
        steps, guidance_scale, eta: in place of the preset's own.
        batch_size: windows of one network call; on a GPU halved before the run starts until one
            fits into memory.
        format: "png", "jpeg", or "shards": tar files of 1,000 PNGs, each with its JSON beside,
            as WebDataset reads them.
        quality: of JPEG, 90 by default.
        device, dtype, decoder_dtype, execution: for a model that is loaded here, as `sf.load` takes
            them; load it yourself for anything else.
        overwrite: make all patches anew.
        progress: show progress with the time that remains.

    Returns:
        What was made and what was there, with the recipe.

    Raises:
        ValueError: the grid is of another encoder, has NaN or no valid cell; a setting is out of
            range; the folder holds patches of another recipe. Nothing has been written then.
        MemoryError: not even one window fits into the GPU's memory. Nothing has been written then.
        OSError: the folder cannot be made or written, or the disk is full; the patches that are
            there are whole, and the same call goes on.
        RuntimeError: NaN or infinity appeared; the message names the patch.
    """
    call = "synthesize_patches"
    chosen = settle(preset, steps=steps, guidance_scale=guidance_scale, eta=eta)
    for name, off in (("guidance_interval", None), ("reuse", 1)):
        if getattr(chosen, name) != off:
            raise ValueError(
                f"{call}: the preset's {name} is {getattr(chosen, name)}, but that is for large "
                "images alone; use a preset without it."
            )
    batch_size = check_count("batch_size", batch_size, call=call)
    all_seeds = range(check_seed(seed), check_seed(seed) + check_count("seeds", seeds, call=call))
    check_seed(all_seeds[-1])
    cells = opened_grid(grid)
    loaded = loaded_model(model, device, dtype, decoder_dtype, execution)
    cells.check_for(wanted_grid(loaded, cells))
    sampler = PatchSampler(loaded, cells, chosen, batch_size)
    if format == "jpeg" and quality is None:
        quality = JPEG_QUALITY
    recipe = {**sampler.recipe(), "format": format, "quality": quality}
    metadata = {"synthetic": True, "recipe_hash": digest(recipe), "mpp": sampler.mpp}
    # The writer checks format and quality before a folder is made.
    writer = PatchFolder(Path(folder), format, quality=quality, mpp=sampler.mpp, metadata=metadata)
    files = writer.files(_patches(cells, all_seeds))
    target = make_folder(folder)
    todo = _todo(target, files, recipe, overwrite)
    count = sum(map(len, todo.values()))
    needs = writer.needs(count, sampler.size_px)
    check_output(target / RECIPE_FILE, overwrite=True, needs=needs)
    if overwrite:
        _clear(target)
    _write_recipe(target, recipe, {**metadata, "size_px": list(sampler.size_px)})
    start = time.perf_counter()
    images = sampler.images(list(itertools.chain.from_iterable(todo.values())))
    total = sum(map(len, files.values()))
    with (
        measured_threads(loaded),
        tqdm(
            total=total,
            initial=total - count,
            desc="patches",
            unit="patch",
            disable=not progress,
        ) as bar,
    ):
        for made in writer.write(todo, images):
            bar.update(made)
    seconds = time.perf_counter() - start
    return PatchSynthesis(
        target, count, total - count, sampler.size_px, sampler.mpp, seconds, recipe
    )


def _patches(grid: Grid, seeds: Sequence[int]) -> list[Patch]:
    slide = Path(str(grid.source.get("name") or "grid")).stem
    side, (left, top) = grid.cell_level0_px, grid.region_px[:2]
    places = [
        (row, column, left + column * side, top + row * side)
        for row, column in torch.nonzero(grid.valid).tolist()
    ]
    return [
        Patch(patch_name(slide, x, y, seed), row, column, x, y, seed)
        for seed in seeds
        for row, column, x, y in places
    ]


def _todo(
    folder: Path,
    files: Mapping[Path, Sequence[Patch]],
    recipe: Mapping[str, Any],
    overwrite: bool,
) -> dict[Path, Sequence[Patch]]:
    """The files that are not there yet, or all of them with `overwrite`."""
    if overwrite:
        return dict(files)
    there = {entry.name for entry in os.scandir(folder)}
    present = [path for path in files if path.name in there]
    if RECIPE_FILE in there:
        _check_recipe(folder / RECIPE_FILE, recipe)
    elif present:
        raise FileExistsError(
            f"synthesize_patches: {folder} has {present[0].name} but no {RECIPE_FILE}, so how it "
            "was made is not known; choose another folder, or overwrite=True (command line: "
            "--overwrite)."
        )
    return {path: patches for path, patches in files.items() if path.name not in there}


def _clear(folder: Path) -> None:
    """Removes patches of earlier runs, before any is made: no recipe stands beside another's."""
    for entry in list(os.scandir(folder)):
        if is_patch_file(entry.name):
            os.unlink(entry.path)


def _check_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text())["recipe"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"synthesize_patches: {path} cannot be read as a recipe; remove it together with the "
            "patches beside it, choose another folder, or overwrite=True (--overwrite)."
        ) from None
    difference = _difference(before, json.loads(json.dumps(recipe)))
    if difference is not None:
        name, was, now = difference
        raise ValueError(
            f"synthesize_patches: the patches in {path.parent} were made with {name} = {was!r}, "
            f"and {now!r} is wanted now; choose another folder, the same settings, or "
            "overwrite=True (command line: --overwrite)."
        )


def _difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first setting in which two recipes differ: its name, and both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return None if before == now else (name or "recipe", before, now)
    for key in sorted({*before, *now}):
        below = f"{name}.{key}" if name else key
        found = _difference(before.get(key), now.get(key), below)
        if found is not None:
            return found
    return None


def _write_recipe(folder: Path, recipe: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    from ssldiff_fast import __version__

    about = {**metadata, "recipe": recipe, "made_by": f"ssldiff_fast {__version__}"}
    text = json.dumps(about, indent=1, sort_keys=True) + "\n"
    atomic_bytes(folder / RECIPE_FILE, text.encode())
