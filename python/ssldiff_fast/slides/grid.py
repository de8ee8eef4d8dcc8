# SPDX-License-Identifier: Apache-2.0
"""The grid of embeddings that describes a large image, and its file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A grid and a model agree on scale within this factor; scales are augmented wider in training.
SCALE_TOLERANCE = 1.1


def spec_dict(spec: Any) -> dict[str, Any]:
    """An encoder's specification as plain data: name, width, tokens, patch_px, mpp, ..."""
    if isinstance(spec, Mapping):
        return dict(spec)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        return dataclasses.asdict(spec)
    return dict(vars(spec))


@dataclass(frozen=True, eq=False)
class Grid:
    """Embeddings of the cells of a region, one cell beside the next.

    Attributes:
        embeddings: float32 [R, K, T, D]; zero where not valid ("no condition").
        valid: bool [R, K], the cells that were encoded.
        mpp: micrometres per pixel at which the cells were encoded.
        cell_px: side of a cell in pixels at that mpp.
        encoder: the encoder's specification (`name`, `width`, `weights_hash`, preprocessing);
            what a foreign file does not say is missing.
        region_px: (x, y, width, height) that the cells cover, in level-0 pixels of the source.
        cell_level0_px: side of a cell in level-0 pixels of the source.
        source: `name`, `path`, `hash`, `mpp`, `width`, `height` of the slide.
    """

    embeddings: Tensor  # [R, K, T, D] fp32
    valid: Tensor  # [R, K] bool
    mpp: float
    cell_px: int
    encoder: Mapping[str, Any] = field(default_factory=dict)
    region_px: tuple[int, int, int, int] = (0, 0, 0, 0)
    cell_level0_px: int = 0
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        embeddings = torch.as_tensor(self.embeddings, dtype=torch.float32)
        valid = torch.as_tensor(self.valid, dtype=torch.bool)
        if embeddings.ndim != 4 or min(embeddings.shape) < 1:
            raise ValueError(
                f"a grid's embeddings must be [R, K, T, D], none of them 0, not "
                f"{list(embeddings.shape)}"
            )
        if valid.shape != embeddings.shape[:2]:
            raise ValueError(
                f"a grid's valid mask must be [R, K] = {list(embeddings.shape[:2])}, not "
                f"{list(valid.shape)}"
            )
        if self.cell_px < 1 or not 0 < self.mpp < float("inf"):
            raise ValueError(
                f"a grid needs a positive cell_px and mpp, not {self.cell_px} and {self.mpp}"
            )
        object.__setattr__(self, "embeddings", embeddings)
        object.__setattr__(self, "valid", valid)
        if not self.cell_level0_px:
            object.__setattr__(self, "cell_level0_px", self.cell_px)
        if not self.region_px[2]:
            rows, cols = valid.shape
            size = (cols * self.cell_level0_px, rows * self.cell_level0_px)
            object.__setattr__(self, "region_px", (*self.region_px[:2], *size))

    @property
    def shape(self) -> tuple[int, int]:
        """(R, K), rows and columns of cells."""
        return self.embeddings.shape[0], self.embeddings.shape[1]

    @property
    def tokens(self) -> int:
        return self.embeddings.shape[2]

    @property
    def width(self) -> int:
        """D, the width of an embedding."""
        return self.embeddings.shape[3]

    def __str__(self) -> str:
        rows, cols = self.shape
        return (
            f"grid of {rows} x {cols} cells of {self.cell_px} px at {self.mpp:g} um "
            f"({int(self.valid.sum())} with tissue), {self.tokens} token(s) of width {self.width} "
            f"by {self.encoder.get('name', 'an unknown encoder')}"
        )

    def crop(self, rows: slice, cols: slice) -> Grid:
        """A rectangle of cells, for example `grid.crop(slice(0, 8), slice(4, 12))`."""
        picked_rows, picked_cols = range(self.shape[0])[rows], range(self.shape[1])[cols]
        if picked_rows.step != 1 or picked_cols.step != 1:
            raise ValueError("grid.crop: rows and cols must be slices with step 1")
        if not picked_rows or not picked_cols:
            raise ValueError(
                f"grid.crop: rows {rows} and cols {cols} leave no cell of the {self.shape[0]} x "
                f"{self.shape[1]} in the grid"
            )
        cell = self.cell_level0_px
        region = (
            self.region_px[0] + picked_cols.start * cell,
            self.region_px[1] + picked_rows.start * cell,
            len(picked_cols) * cell,
            len(picked_rows) * cell,
        )
        return dataclasses.replace(
            self,
            embeddings=self.embeddings[rows, cols].clone(),
            valid=self.valid[rows, cols].clone(),
            region_px=region,
        )

    def shuffled(self, seed: int = 0) -> Grid:
        """The same embeddings at other valid cells: a control whose layout means nothing."""
        order = np.random.default_rng(seed).permutation(int(self.valid.sum()))
        embeddings = self.embeddings.clone()
        embeddings[self.valid] = self.embeddings[self.valid][torch.from_numpy(order)]
        return dataclasses.replace(self, embeddings=embeddings)

    def check_for(self, spec: Any, *, min_cells: tuple[int, int] = (1, 1)) -> None:
        """Checks that a model conditioned on an encoder can be given this grid.

        Args:
            spec: the model's encoder specification, any object with its attributes, or a mapping
                of what is known of it: `tokens` and `width` at least.
            min_cells: (rows, columns) that one window spans.

        Raises:
            ValueError: another encoder, width, tokens or scale; too few cells; NaN; no valid cell.
        """
        want = spec_dict(spec)
        self._check_encoder(want)
        if (self.tokens, self.width) != (want["tokens"], want["width"]):
            right = want.get("name", "the encoder that the model was trained with")
            raise ValueError(
                f"the grid holds {self.tokens} token(s) of width {self.width} and the model takes "
                f"{want['tokens']} of width {want['width']}: encode the slide with {right}"
            )
        if "mpp" in want:
            self._check_scale(want["mpp"], want["patch_px"])
        if self.shape[0] < min_cells[0] or self.shape[1] < min_cells[1]:
            raise ValueError(
                f"the grid has {self.shape[0]} x {self.shape[1]} cells, fewer than one window "
                f"({min_cells[0]} x {min_cells[1]}): encode a larger region"
            )
        if not bool(self.valid.any()):
            raise ValueError("the grid has no valid cell: encode a region with tissue")
        bad = ~torch.isfinite(self.embeddings).all(-1).all(-1)
        if bool((bad & self.valid).any()):
            row, col = (int(v) for v in torch.nonzero(bad & self.valid)[0])
            raise ValueError(
                f"the grid holds NaN or infinity in {int((bad & self.valid).sum())} cell(s), first "
                f"at row {row}, column {col}: encode the slide again"
            )

    def _check_scale(self, mpp: float, patch_px: int) -> None:
        if not 1 / SCALE_TOLERANCE <= self.mpp / mpp <= SCALE_TOLERANCE:
            raise ValueError(
                f"the grid was made at {self.mpp:g} um per pixel and the model works at {mpp:g}: "
                "encode the slide at the model's mpp"
            )
        mine, wanted = self.mpp * self.cell_px, mpp * patch_px
        if not 1 / SCALE_TOLERANCE <= mine / wanted <= SCALE_TOLERANCE:
            raise ValueError(
                f"the grid's cells are {self.cell_px} px ({mine:g} um) wide and the model takes "
                f"{patch_px} px ({wanted:g} um): encode the slide in cells of that size"
            )

    def _check_encoder(self, want: Mapping[str, Any]) -> None:
        name, known = self.encoder.get("name"), want.get("name")
        if name is not None and known is not None and name != known:
            raise ValueError(
                f"the grid was made by the encoder {name} and the model is conditioned on {known}: "
                f"encode the slide with {known}"
            )
        mine, theirs = self.encoder.get("weights_hash"), want.get("weights_hash")
        if mine and theirs and mine != theirs:
            raise ValueError(
                f"the grid was made by {name} with other weights ({mine[:12]}) than the model's "
                f"({theirs[:12]}): encode the slide with the model's encoder"
            )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Writes the HDF5 file that CLAM, TRIDENT and torchmil read; whole or not at all.

        Args:
            path: the file, usually ending in .h5.
            overwrite: replace an existing file.
        """
        from .grid_file import write_grid

        return write_grid(self, path, overwrite=overwrite)

    def save_pt(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Writes CLAM's `pt_files/{slide}.pt`: a bare float32 [N, D] of the valid cells.

        Further tokens are joined to the width, as [N, T * D].
        """
        from .output import atomic, check_output

        path = check_output(path, overwrite=overwrite)
        with atomic(path) as part:
            torch.save(self.embeddings[self.valid].flatten(1).clone(), part)
        return path

    @staticmethod
    def open(
        path: str | os.PathLike[str], *, mpp: float | None = None, cell_px: int | None = None
    ) -> Grid:
        """Reads a grid of ours, or features and coordinates of CLAM, TRIDENT and their kin.

        Args:
            path: an HDF5 file.
            mpp: um per pixel of the encoded patches, where a foreign file does not say it.
            cell_px: side of the encoded patches in pixels, where a foreign file does not say it.

        Raises:
            FileNotFoundError, OSError: no such file, or not HDF5.
            ValueError: no features, coordinates off a regular lattice, overlapping patches.
        """
        from .grid_file import read_grid

        return read_grid(path, mpp=mpp, cell_px=cell_px)
