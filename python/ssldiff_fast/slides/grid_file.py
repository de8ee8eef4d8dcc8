# SPDX-License-Identifier: Apache-2.0
"""Grids as HDF5: written as CLAM, TRIDENT and torchmil expect it, read from ours and theirs.

`features` [N, D] float32 and `coords` [N, 2] int64 hold the valid cells in row-major order, with
the attributes that those tools look for. What only we know lies in the group `ssldiff_fast`:
the valid mask, further tokens, region, mpp, encoder and source.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .grid import Grid
from .output import atomic, check_output, write_error

GROUP = "ssldiff_fast"
VERSION = 1
# TRIDENT's table: mpp below the bound has the magnification.
MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.4, 40), (0.6, 20), (1.2, 10), (2.4, 5))
# Rounding of a lattice whose step is no whole number of level-0 pixels.
LATTICE_SLACK_PX = 2
# Scattered coordinates make a huge empty lattice; a slide of 300,000 px in patches of 64 is 2e7.
MAX_CELLS = 50_000_000


def magnification(mpp: float | None) -> int | None:
    """The objective's magnification that TRIDENT names for an mpp; None beyond its table."""
    return next((mag for bound, mag in MAGNIFICATIONS if mpp and mpp < bound), None)


def feature_folder(grid: Grid) -> str:
    """TRIDENT's folder for a grid, to hold `{slide}.h5`."""
    mag = magnification(grid.mpp)
    return f"{mag}x_{grid.cell_px}px_0px_overlap/features_{grid.encoder.get('name')}"


def needed_bytes(cells: int, tokens: int, width: int) -> int:
    """About the size of the file of a grid with that many valid cells."""
    return 4 * cells * tokens * width


def write_grid(grid: Grid, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes a grid; see `Grid.save`."""
    import h5py

    count = int(grid.valid.sum())
    path = check_output(
        path, overwrite=overwrite, needs=needed_bytes(count, grid.tokens, grid.width)
    )
    with atomic(path) as part:
        try:
            with h5py.File(part, "w") as file:
                _write(file, grid, path)
        except (OSError, RuntimeError) as error:  # the latter when HDF5 cannot close a file
            raise write_error(path, error) from None
    return path


def _write(file: Any, grid: Grid, path: Path) -> None:
    rows, cols = np.nonzero(grid.valid.numpy())
    x, y, *_ = grid.region_px
    cell = grid.cell_level0_px
    features = grid.embeddings[grid.valid].numpy()  # [N, T, D]
    _set(file.create_dataset("features", data=features[:, 0]), _features_attributes(grid))
    coords = np.stack([x + cols * cell, y + rows * cell], 1).astype(np.int64)
    _set(file.create_dataset("coords", data=coords), _coords_attributes(grid, path))
    ours = file.create_group(GROUP)
    ours.create_dataset("valid", data=grid.valid.numpy(), compression="gzip")
    if grid.tokens > 1:
        ours.create_dataset("tokens", data=features[:, 1:])
    _set(
        ours,
        {
            "version": VERSION,
            "shape": grid.embeddings.shape,
            "mpp": grid.mpp,
            "cell_px": grid.cell_px,
            "cell_level0_px": cell,
            "region_px": grid.region_px,
            "encoder": json.dumps(dict(grid.encoder)),
            "source": json.dumps(dict(grid.source)),
        },
    )


def _set(node: Any, attributes: dict[str, Any]) -> None:
    for key, value in attributes.items():
        node.attrs[key] = "None" if value is None else value  # as TRIDENT stores it


def _features_attributes(grid: Grid) -> dict[str, Any]:
    return {"name": grid.source.get("name"), "encoder": grid.encoder.get("name")}


def _coords_attributes(grid: Grid, path: Path) -> dict[str, Any]:
    width, height = grid.source.get("width"), grid.source.get("height")
    size = None if width is None or height is None else np.array([width, height])
    return {
        "patch_size": grid.cell_px,
        "patch_size_level0": grid.cell_level0_px,
        "level0_magnification": magnification(grid.source.get("mpp")),
        "target_magnification": magnification(grid.mpp),
        "overlap": 0,
        "name": grid.source.get("name"),
        "savetodir": str(path.parent),
        "level0_width": width,
        "level0_height": height,
        "patch_level": 0,
        "downsample": np.array([1.0, 1.0]),
        "downsampled_level_dim": size,
        "level_dim": size,
        "save_path": str(path.parent),
    }


def read_grid(
    path: str | os.PathLike[str], *, mpp: float | None = None, cell_px: int | None = None
) -> Grid:
    """Reads a grid; see `Grid.open`."""
    import h5py

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no grid file {path}: check the name")
    try:
        file = h5py.File(path, "r")
    except OSError:
        raise OSError(
            f"{path} is not an HDF5 file, or truncated: give a grid made by `ssldiff encode`, or "
            "features of CLAM or TRIDENT"
        ) from None
    with file:
        try:
            return _read_ours(file) if GROUP in file else _read_foreign(file, path, mpp, cell_px)
        except (KeyError, OSError, RuntimeError) as error:  # the last is HDF5's for broken links
            raise OSError(f"the grid {path} is damaged ({error}): make it again") from None


def _read_ours(file: Any) -> Grid:
    ours = file[GROUP]
    if int(ours.attrs["version"]) > VERSION:
        raise ValueError(
            f"the grid {file.filename} is of version {ours.attrs['version']}, newer than this "
            f"package reads ({VERSION}): update ssldiff_fast"
        )
    shape = tuple(int(v) for v in ours.attrs["shape"])
    valid = torch.from_numpy(ours["valid"][:])
    features = file["features"][:][:, None]
    if "tokens" in ours:
        features = np.concatenate([features, ours["tokens"][:]], 1)
    if features.shape != (int(valid.sum()), *shape[2:]) or valid.shape != shape[:2]:
        raise ValueError(
            f"the grid {file.filename} holds features {list(features.shape)} for "
            f"{int(valid.sum())} valid cells of {list(shape)}: make it again"
        )
    embeddings = torch.zeros(shape)
    embeddings[valid] = torch.from_numpy(features)
    x, y, width, height = (int(v) for v in ours.attrs["region_px"])
    return Grid(
        embeddings=embeddings,
        valid=valid,
        mpp=float(ours.attrs["mpp"]),
        cell_px=int(ours.attrs["cell_px"]),
        encoder=json.loads(ours.attrs["encoder"]),
        region_px=(x, y, width, height),
        cell_level0_px=int(ours.attrs["cell_level0_px"]),
        source=json.loads(ours.attrs["source"]),
    )


def _read_foreign(file: Any, path: Path, mpp: float | None, cell_px: int | None) -> Grid:
    features, coords = _features_and_coords(file, path)
    said = _attributes(file)
    level0 = _patch_level0(said, coords)
    if level0 is None:
        raise ValueError(
            f"the size of the patches of {path} cannot be told from one patch without attributes: "
            "give features with TRIDENT's `patch_size_level0`"
        )
    index, origin, step = _lattice(coords, level0, path)  # [N, 2] of (column, row)
    cols, rows = (int(v) + 1 for v in index.max(0))
    if rows * cols > MAX_CELLS:
        raise ValueError(f"the coordinates of {path} span {rows} x {cols} cells: too many")
    mag = said.get("target_magnification")
    if mpp is None and mag is None:
        raise ValueError(
            f"{path} does not say at which mpp its patches were encoded: give it, for example "
            "Grid.open(path, mpp=0.5)"
        )
    embeddings = torch.zeros(rows, cols, 1, features.shape[1])
    valid = torch.zeros(rows, cols, dtype=torch.bool)
    row_index, col_index = torch.from_numpy(index[:, 1]), torch.from_numpy(index[:, 0])
    embeddings[row_index, col_index, 0] = torch.from_numpy(features)
    valid[row_index, col_index] = True
    name = said.get("name")
    source = {
        "name": name if name is not None else path.stem,
        "width": _int(said.get("level0_width")),
        "height": _int(said.get("level0_height")),
    }
    encoder = {"name": said.get("encoder"), "width": features.shape[1], "tokens": 1}
    return Grid(
        embeddings=embeddings,
        valid=valid,
        mpp=float(mpp if mpp is not None else 10.0 / float(said["target_magnification"])),
        cell_px=int(cell_px or said.get("patch_size") or step),
        encoder={k: v for k, v in encoder.items() if v is not None},
        region_px=(int(origin[0]), int(origin[1]), cols * step, rows * step),
        cell_level0_px=step,
        source={k: v for k, v in source.items() if v is not None},
    )


def _int(value: Any) -> int | None:
    return None if value is None else int(value)


def _features_and_coords(file: Any, path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    name = next((key for key in ("features", "feats") if key in file), None)
    if name is None or "coords" not in file:
        raise ValueError(
            f"{path} holds {sorted(file)}, expected `features` with `coords` of each patch: a grid "
            "needs to know where its embeddings lie"
        )
    features = np.asarray(file[name][:], np.float32)
    if features.ndim == 3 and features.shape[0] == 1:  # some writers keep a batch axis
        features = features[0]
    coords = np.asarray(file["coords"][:])
    if features.ndim != 2 or coords.shape != (len(features), 2) or not len(features):
        raise ValueError(
            f"{path} holds {name} {list(features.shape)} and coords {list(coords.shape)}, expected "
            "[N, D] and [N, 2] with N at least 1"
        )
    unit = str(file.attrs.get("unit", "px"))
    if unit not in ("px", "pixel", "pixels"):
        raise ValueError(
            f"the coords of {path} are in {unit} (STAMP's layout), expected level-0 pixels: export "
            "the features in TRIDENT's layout"
        )
    return features, np.rint(coords).astype(np.int64)


def _attributes(file: Any) -> dict[str, Any]:
    """Attributes of coords and features without the ones stored as the text 'None'."""
    both: dict[str, Any] = {}
    for name in ("features", "coords"):
        if name in file:
            both.update({k: v for k, v in file[name].attrs.items() if not _is_none(v)})
    return both


def _is_none(value: Any) -> bool:
    return isinstance(value, (str, bytes)) and value in ("None", b"None")


def _patch_level0(said: dict[str, Any], coords: NDArray[np.int64]) -> int | None:
    if "patch_size_level0" in said:
        return int(said["patch_size_level0"])
    gaps = [np.diff(np.unique(coords[:, axis])) for axis in (0, 1)]
    smallest = [int(gap.min()) for gap in gaps if len(gap)]
    return min(smallest) if smallest else _int(said.get("patch_size"))


def _lattice(
    coords: NDArray[np.int64],  # [N, 2] (x, y)
    level0: int,
    path: Path,
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """(column, row) of every patch, the origin, and the lattice's step."""
    origin = coords.min(0)
    index = np.rint((coords - origin) / level0).astype(np.int64)
    off = np.abs(coords - origin - index * level0).max()
    if off > min(LATTICE_SLACK_PX, level0 // 4):
        raise ValueError(
            f"the patches of {path} overlap or lie on no common lattice of {level0} level-0 pixels "
            f"(off by up to {off}): encode the slide again without overlap"
        )
    if len(np.unique(index, axis=0)) != len(index):
        raise ValueError(
            f"{path} holds several patches at one place: encode the slide again without overlap"
        )
    return index, origin, level0
