# SPDX-License-Identifier: Apache-2.0
"""From a slide to its grid of embeddings."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .grid import Grid, spec_dict
from .grid_file import needed_bytes
from .images import ImageSlide
from .mask import cell_fractions, slide_mask
from .output import check_output
from .reader import open_slide
from .slide import Slide, check_mpp

# Cells are read in square blocks of about this side, which share the slide's compressed tiles and
# stay small in a container's shared memory (3 MiB each).
BLOCK_PX = 1024
# A cell is valid when this share of it is tissue.
MIN_TISSUE = 0.1
# A cell may be read from this much coarser pixels; beyond, detail would be invented.
MAX_UPSAMPLING = 1.1
MAX_WORKERS = 4
# glibc's numbers of settings, and what is more than a block's pixels in all their forms.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**25


def encode(
    slide: str | os.PathLike[str] | Slide | NDArray[np.uint8],
    encoder: Any,
    *,
    mpp: float | None = None,
    source_mpp: float | None = None,
    region: tuple[int, int, int, int] | None = None,
    mask: bool | str | os.PathLike[str] = True,
    batch_size: int = 64,
    workers: int | None = None,
    progress: bool = True,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Grid:
    """Encodes the cells of a slide, an image or a region of either.

    A cell is `encoder.spec.patch_px` pixels at `mpp`, rounded to whole level-0 pixels, so that
    grids lie on the integer lattice that MIL tools expect. What remains of the region at its right
    and lower border is left out.

    Args:
        slide: a file, an open slide, or RGB pixels, uint8 [H, W, 3].
        encoder: called with uint8 [N, H, W, 3], which are overwritten after the call, returns
            [N, T, D]; has a `spec` with `tokens`, `width`, `patch_px`, `mpp`, `name`.
        mpp: micrometres per pixel at which to encode; by default the encoder's own.
        source_mpp: micrometres per level-0 pixel of the slide, for images that do not say it (the
            command line calls this one --mpp).
        region: (x, y, width, height) in level-0 pixels; by default the whole slide.
        mask: True to find tissue, False to encode every cell, or a mask file (GeoJSON in level-0
            pixels, or an image of the whole slide). Cells outside are not valid and hold zeros,
            "no condition".
        batch_size: cells given to the encoder at once.
        workers: processes that read ahead; by default up to 4, and none for a handful of cells.
            Where processes are spawned (Windows, macOS) a script needs the usual
            `if __name__ == "__main__":`.
        progress: show a progress bar.
        out: also write the grid to this HDF5 file.
        overwrite: replace an existing `out`.

    Returns:
        The grid, on the CPU.

    Raises:
        FileNotFoundError, OSError, ValueError, TypeError: before the encoder runs.
        RuntimeError: when the encoder returns another shape than its spec says, or NaN.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 or more")
    if not hasattr(encoder, "spec"):
        raise TypeError(
            f"encoder is a {type(encoder).__name__}, which does not say what patches it wants: "
            "give a model's own, `model.encoder`, or an `Encoder`"
        )
    if not isinstance(mask, bool | str | os.PathLike):
        raise TypeError(f"mask is {mask!r}, expected True, False or a mask file")
    if out is not None:
        check_output(out, overwrite=overwrite)
    source = _as_slide(slide, source_mpp)
    try:
        layout = _layout(source, spec_dict(encoder.spec), mpp, region)
        layout.valid[:] = _valid_cells(source, layout, mask)
        source.close()  # with the tiles that its reader keeps; it opens again when it is read
        if out is not None:
            check_output(out, overwrite=overwrite, needs=layout.needed_bytes)
        embeddings = _encode_cells(source, layout, encoder, batch_size, workers, progress)
        grid = layout.grid(source, embeddings)
    finally:
        if source is not slide:
            source.close()
    if out is not None:
        grid.save(out, overwrite=overwrite)
    return grid


class _Layout:
    """Where the cells lie."""

    def __init__(
        self,
        spec: dict[str, Any],
        mpp: float,
        region: tuple[int, int, int, int],
        cell: int,
    ) -> None:
        self.spec, self.mpp, self.region, self.cell = spec, mpp, region, cell
        self.cell_px = int(spec["patch_px"])
        self.shape = (region[3] // cell, region[2] // cell)
        self.valid = np.ones(self.shape, bool)

    @property
    def needed_bytes(self) -> int:
        """About the size of the grid's file."""
        return needed_bytes(int(self.valid.sum()), self.spec["tokens"], self.spec["width"])

    def grid(self, slide: Slide, embeddings: Tensor) -> Grid:
        rows, cols = self.shape
        source = {
            "name": slide.name,
            "path": None if slide.path is None else slide.path.name,
            "hash": slide.hash,
            "mpp": slide.mpp,
            "width": slide.size_px[0],
            "height": slide.size_px[1],
        }
        return Grid(
            embeddings=embeddings,
            valid=torch.from_numpy(self.valid),
            mpp=self.mpp,
            cell_px=self.cell_px,
            encoder=self.spec,
            region_px=(*self.region[:2], cols * self.cell, rows * self.cell),
            cell_level0_px=self.cell,
            source=source,
        )


def _as_slide(slide: Any, source_mpp: float | None) -> Slide:
    if isinstance(slide, (str, os.PathLike)):
        return open_slide(slide, mpp=source_mpp)
    if isinstance(slide, Slide):
        if source_mpp is not None and source_mpp != slide.mpp:
            raise ValueError(
                f"{slide} is open with mpp {slide.mpp:g}, not source_mpp {source_mpp:g}: give it "
                "to open_slide(path, mpp=...)"
            )
        return slide
    if isinstance(slide, (np.ndarray, Tensor)):
        if source_mpp is None:
            raise ValueError("an image array has no mpp: give it as source_mpp, for example 0.5")
        return ImageSlide(np.asarray(slide), source_mpp)
    raise TypeError(f"slide must be a file, an open slide or an array, not {type(slide).__name__}")


def _layout(
    slide: Slide,
    spec: dict[str, Any],
    mpp: float | None,
    region: tuple[int, int, int, int] | None,
) -> _Layout:
    target = check_mpp(spec["mpp"] if mpp is None else mpp, "the cells")
    if slide.mpp > target * MAX_UPSAMPLING:
        raise ValueError(
            f"{slide} has {slide.mpp:g} um per pixel and {target:g} is wanted, which would invent "
            f"detail: use a slide scanned at {target:g} or finer, or a model for {slide.mpp:g}"
        )
    cell = max(1, round(spec["patch_px"] * target / slide.mpp))
    whole = (0, 0, *slide.size_px)
    region = whole if region is None else slide.check_region(region)
    if region[2] < cell or region[3] < cell:
        what = "" if region == whole else "the region of "
        raise ValueError(
            f"{what}{slide} has {region[2]} x {region[3]} level-0 pixels, smaller than one window "
            f"of {cell} x {cell} ({spec['patch_px']} px at {target:g} um): take a larger one"
        )
    return _Layout(spec, target, region, cell)


def _valid_cells(
    slide: Slide, layout: _Layout, mask: bool | str | os.PathLike[str]
) -> NDArray[np.bool_] | bool:
    if mask is False:
        return True
    file = None if mask is True else Path(mask)
    tissue = slide_mask(slide, file)
    fractions = cell_fractions(tissue, slide.size_px, layout.region[:2], layout.cell, layout.shape)
    valid: NDArray[np.bool_] = fractions >= MIN_TISSUE
    if not valid.any():
        where = "the mask found on" if file is None else f"the mask {file} of"
        raise ValueError(
            f"{where} {slide} has no tissue in the region: choose another region, give a mask "
            "file, or encode every cell with mask=False (command line: --no-mask)"
        )
    return valid


class _Blocks(Dataset[tuple[NDArray[np.uint8], NDArray[np.int64]]]):
    """Square blocks of cells: the pixels of the valid ones, and their (row, column)."""

    def __init__(self, slide: Slide, layout: _Layout) -> None:
        self.slide, self.layout = slide, layout
        side = max(1, BLOCK_PX // layout.cell_px)
        corners = itertools.product(*(range(0, count, side) for count in layout.shape))
        self.blocks: list[tuple[int, int, int, int]] = []  # rows and columns of the valid cells
        for top, left in corners:
            rows, cols = np.nonzero(layout.valid[top : top + side, left : left + side])
            if len(rows):
                low = (top + int(rows.min()), left + int(cols.min()))
                high = (top + int(rows.max()) + 1, left + int(cols.max()) + 1)
                self.blocks.append((*low, *high))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        top, left, bottom, right = self.blocks[index]
        rows, cols = bottom - top, right - left
        cell, px = self.layout.cell, self.layout.cell_px
        pixels = self.slide.read_region_at(
            self.layout.region[0] + left * cell,
            self.layout.region[1] + top * cell,
            cols * cell,
            rows * cell,
            out_size=(cols * px, rows * px),
        )
        cells = pixels.reshape(rows, px, cols, px, 3).swapaxes(1, 2)  # [rows, cols, px, px, 3]
        inside = self.layout.valid[top:bottom, left:right]
        position = np.argwhere(inside) + np.array([top, left])
        return cells[inside], position


def _usable_cores() -> int:
    """Cores of this process: fewer than the machine's in a container or a batch job."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_pieces(_: int) -> None:
    """In a process that reads ahead: what a block took is kept for the next.

    glibc gives pieces of megabytes back to the system and takes them anew, all pages of them: of a
    block of 1024 x 1024 pixels that was a fifth of its time.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # other C libraries have no such settings
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


def _loader(blocks: _Blocks, workers: int | None) -> DataLoader[Any]:
    if workers is None:
        spare = max(1, _usable_cores() - 1)
        small = blocks.slide.in_memory or len(blocks) < 3
        workers = 0 if small else min(MAX_WORKERS, spare)
    # Fork where it is native: spawned workers would import the caller's script again.
    context = None if not workers else "fork" if sys.platform == "linux" else "spawn"
    return DataLoader(
        blocks,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=_keep_pieces,
        generator=torch.Generator(),  # the loader draws a seed; not from the caller's generator
    )


def _encode_cells(
    slide: Slide,
    layout: _Layout,
    encoder: Any,
    batch_size: int,
    workers: int | None,
    progress: bool,
) -> Tensor:
    from tqdm import tqdm

    spec = layout.spec
    embeddings = torch.zeros(*layout.shape, int(spec["tokens"]), int(spec["width"]))
    loader = _loader(_Blocks(slide, layout), workers)
    total = int(layout.valid.sum())
    with tqdm(total=total, desc="encode", unit="cell", disable=not progress) as bar:
        for cells, position in _batches(loader, min(batch_size, total)):
            with torch.inference_mode():
                tokens = encoder(cells).detach().to("cpu", torch.float32)
            expected = (len(cells), *embeddings.shape[2:])
            if tuple(tokens.shape) != expected:
                raise RuntimeError(
                    f"the encoder {spec.get('name')} returned {list(tokens.shape)} for "
                    f"{len(cells)} cells, expected {list(expected)} as its spec says"
                )
            if not bool(torch.isfinite(tokens).all()):
                raise RuntimeError(
                    f"the encoder {spec.get('name')} returned NaN or infinity near row "
                    f"{int(position[0, 0])}, column {int(position[0, 1])}: try float32"
                )
            embeddings[position[:, 0], position[:, 1]] = tokens
            bar.update(len(cells))
    return embeddings


def _batches(loader: DataLoader[Any], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of any size as batches of one size, the last one smaller, all in the same memory.

    Pieces of megabytes that come and go between small objects would leave holes that the allocator
    cannot give back: a hundred megabytes after some hundred blocks. numpy copies, in one thread:
    PyTorch's others would take the core from whoever reads ahead.
    """
    cells = positions = torch.empty(0)
    filled = 0
    for block, places in loader:
        if not len(cells):
            cells = block.new_empty((batch_size, *block.shape[1:]))
            positions = places.new_empty((batch_size, *places.shape[1:]))
        taken = 0
        while taken < len(block):
            count = min(batch_size - filled, len(block) - taken)
            here, there = slice(filled, filled + count), slice(taken, taken + count)
            cells.numpy()[here] = block.numpy()[there]
            positions.numpy()[here] = places.numpy()[there]
            filled, taken = filled + count, taken + count
            if filled == batch_size:
                yield cells, positions
                filled = 0
    if filled:
        yield cells[:filled], positions[:filled]
