# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from slide_files import FakeSpec, unwritable_folder
from ssldiff_fast.slides import Grid
from ssldiff_fast.slides.grid_file import feature_folder, magnification


def make_grid(tokens: int = 1, **changes: object) -> Grid:
    generator = torch.Generator().manual_seed(0)
    valid = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.bool)
    embeddings = torch.randn(3, 4, tokens, 6, generator=generator)
    embeddings[~valid] = 0
    fields = {
        "embeddings": embeddings,
        "valid": valid,
        "mpp": 0.5,
        "cell_px": 64,
        "encoder": {**dataclasses.asdict(FakeSpec()), "tokens": tokens, "mean": [0.5, 0.5, 0.5]},
        "region_px": (128, 256, 512, 384),
        "cell_level0_px": 128,
        "source": {"name": "slide", "hash": "h", "mpp": 0.25, "width": 4000, "height": 3000},
    }
    return Grid(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_saved_grid_opens_as_it_was(tmp_path: Path, tokens: int) -> None:
    grid = make_grid(tokens)
    again = Grid.open(grid.save(tmp_path / "a.h5"))
    assert torch.equal(again.embeddings, grid.embeddings)
    assert torch.equal(again.valid, grid.valid)
    assert again.encoder["mean"] == list(grid.encoder["mean"])
    for name in ("mpp", "cell_px", "region_px", "cell_level0_px", "source"):
        assert getattr(again, name) == getattr(grid, name)


def test_the_file_is_what_clam_and_trident_read(tmp_path: Path) -> None:
    grid = make_grid(2)
    with h5py.File(grid.save(tmp_path / "a.h5")) as file:
        assert file["features"].dtype == np.float32
        np.testing.assert_array_equal(
            file["features"][:], grid.embeddings[grid.valid][:, 0].numpy()
        )
        assert file["coords"].dtype == np.int64
        assert file["coords"][:4].tolist() == [[128, 256], [256, 256], [512, 256], [256, 384]]
        said = dict(file["coords"].attrs)
        assert (said["patch_size"], said["patch_size_level0"], said["overlap"]) == (64, 128, 0)
        assert (said["level0_magnification"], said["target_magnification"]) == (40, 20)
        assert (said["level0_width"], said["level0_height"]) == (4000, 3000)
        assert said["level_dim"].tolist() == said["downsampled_level_dim"].tolist() == [4000, 3000]
        assert said["patch_level"] == 0
        assert {"name", "savetodir", "save_path", "downsample"} <= said.keys()
        assert dict(file["features"].attrs) == {"name": "slide", "encoder": "fake"}


def test_what_is_not_known_is_stored_as_the_text_none(tmp_path: Path) -> None:
    with h5py.File(make_grid(source={}).save(tmp_path / "a.h5")) as file:
        assert file["features"].attrs["name"] == "None"
        assert file["coords"].attrs["level0_width"] == "None"


def test_magnifications_are_tridents() -> None:
    assert [magnification(v) for v in (0.1, 0.18, 0.25, 0.5, 1.0, 2.0, 5.0)] == [
        *(80, 60, 40, 20, 10, 5),
        None,
    ]
    assert feature_folder(make_grid()) == "20x_64px_0px_overlap/features_fake"


def foreign(path: Path, grid: Grid, *, features: str = "features", **attributes: object) -> Path:
    rows, cols = np.nonzero(grid.valid.numpy())
    with h5py.File(path, "w") as file:
        file[features] = grid.embeddings[grid.valid][:, 0].numpy()
        file["coords"] = np.stack([1000 + cols * 128, 2000 + rows * 128], 1)
        file["coords"].attrs.update(attributes)
    return path


def test_a_trident_file_becomes_a_grid_with_its_holes(tmp_path: Path) -> None:
    grid = make_grid()
    path = foreign(
        tmp_path / "t.h5",
        grid,
        patch_size=64,
        patch_size_level0=128,
        target_magnification=20,
        level0_magnification="None",
        overlap=0,
        name="TCGA",
    )
    again = Grid.open(path)
    assert torch.equal(again.embeddings, grid.embeddings)
    assert torch.equal(again.valid, grid.valid)
    assert (again.mpp, again.cell_px, again.cell_level0_px) == (0.5, 64, 128)
    assert again.region_px == (1000, 2000, 512, 384)
    assert again.source["name"] == "TCGA"


def test_a_file_without_attributes_needs_its_mpp(tmp_path: Path) -> None:
    grid = make_grid()
    path = foreign(tmp_path / "m.h5", grid, features="feats")
    with pytest.raises(ValueError, match=r"does not say at which mpp .*Grid\.open"):
        Grid.open(path)
    again = Grid.open(path, mpp=0.5, cell_px=64)
    assert torch.equal(again.embeddings, grid.embeddings)
    assert (again.cell_px, again.cell_level0_px) == (64, 128)


def test_coordinates_off_a_lattice_are_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path / "t.h5", make_grid(), patch_size_level0=128, target_magnification=20)
    with h5py.File(path, "r+") as file:
        file["coords"][3] += 40
    with pytest.raises(ValueError, match="overlap or lie on no common lattice of 128"):
        Grid.open(path)


def test_overlapping_patches_are_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path / "t.h5", make_grid(), patch_size_level0=256, target_magnification=20)
    with pytest.raises(ValueError, match="overlap"):
        Grid.open(path)
    with h5py.File(path, "r+") as file:
        file["coords"].attrs["patch_size_level0"] = 128
        file["coords"][1] = file["coords"][0]
    with pytest.raises(ValueError, match="several patches at one place"):
        Grid.open(path)


def test_files_that_hold_no_grid_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no grid file"):
        Grid.open(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(OSError, match="is not an HDF5 file, or truncated"):
        Grid.open(tmp_path / "text.h5")
    with h5py.File(tmp_path / "names.h5", "w") as file:
        file["features"] = np.zeros((3, 4), np.float32)
        file["metadata"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"\['features', 'metadata'\], expected `features` with"):
        Grid.open(tmp_path / "names.h5")


def test_a_truncated_grid_is_refused(tmp_path: Path) -> None:
    path = make_grid().save(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(OSError, match="truncated"):
        Grid.open(path)


def test_a_grid_that_lost_cells_is_refused(tmp_path: Path) -> None:
    path = make_grid().save(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        kept = file["features"][:5]
        del file["features"]
        file["features"] = kept
    with pytest.raises(ValueError, match="for 9 valid cells"):
        Grid.open(path)
    with h5py.File(path, "r+") as file:
        del file["features"]
    with pytest.raises(OSError, match="is damaged"):
        Grid.open(path)


def test_an_existing_file_is_kept_unless_overwritten(tmp_path: Path) -> None:
    path = make_grid().save(tmp_path / "a.h5")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists and is kept"):
        make_grid(2).save(path)
    assert path.read_bytes() == before
    make_grid(2).save(path, overwrite=True)
    assert Grid.open(path).tokens == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="cannot be written to"):
        make_grid().save(unwritable_folder(tmp_path / "locked") / "a.h5")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_grid().save(tmp_path / "nowhere" / "a.h5")


def test_a_grid_that_fits_the_model_passes() -> None:
    make_grid().check_for(FakeSpec())
    make_grid(encoder={}).check_for(FakeSpec())  # of a file that does not say
    make_grid().check_for(FakeSpec(weights_hash=None), min_cells=(3, 4))


@pytest.mark.parametrize(
    ("changes", "spec", "message"),
    [
        ({"encoder": {"name": "uni"}}, FakeSpec(), "made by the encoder uni"),
        ({}, FakeSpec(weights_hash="ffff"), "with other weights"),
        ({}, FakeSpec(width=8), "of width 6 and the model takes 1 of width 8"),
        ({}, FakeSpec(tokens=2), r"1 token\(s\) of width 6 and the model takes 2"),
        ({"mpp": 0.25}, FakeSpec(), "made at 0.25 um per pixel and the model works at 0.5"),
        ({"cell_px": 128}, FakeSpec(), r"cells are 128 px \(64 um\) wide and the model takes 64"),
        ({"valid": torch.zeros(3, 4, dtype=torch.bool)}, FakeSpec(), "no valid cell"),
    ],
    ids=["encoder", "weights", "width", "tokens", "mpp", "cell", "empty"],
)
def test_a_grid_of_another_model_is_refused(
    changes: dict[str, object], spec: FakeSpec, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_grid(**changes).check_for(spec)


def test_a_grid_smaller_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 x 4 cells, fewer than one window \(4 x 4\)"):
        make_grid().check_for(FakeSpec(), min_cells=(4, 4))
    with pytest.raises(ValueError, match=r"must be \[R, K, T, D\], none of them 0"):
        Grid(torch.zeros(0, 4, 1, 6), torch.zeros(0, 4), mpp=0.5, cell_px=64)


def test_nan_counts_in_valid_cells_only() -> None:
    grid = make_grid()
    grid.embeddings[0, 2] = float("nan")  # not valid
    grid.check_for(FakeSpec())
    grid.embeddings[1, 3, 0, 2] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 cell\(s\), first at row 1, col"):
        grid.check_for(FakeSpec())


def test_a_crop_knows_where_it_lies() -> None:
    grid = make_grid().crop(slice(1, 3), slice(2, None))
    assert grid.shape == (2, 2)
    assert grid.region_px == (128 + 256, 256 + 128, 256, 256)
    assert torch.equal(grid.embeddings, make_grid().embeddings[1:, 2:])
    with pytest.raises(ValueError, match="leave no cell"):
        make_grid().crop(slice(3, 9), slice(0, 1))
    with pytest.raises(ValueError, match="step 1"):
        make_grid().crop(slice(0, 3, 2), slice(0, 1))


def test_shuffling_moves_valid_cells_only_and_by_the_seed() -> None:
    grid = make_grid()
    shuffled = grid.shuffled(1)
    assert not torch.equal(shuffled.embeddings, grid.embeddings)
    assert torch.equal(shuffled.valid, grid.valid)
    assert (shuffled.embeddings[~grid.valid] == 0).all()
    key = [grid.embeddings[grid.valid], shuffled.embeddings[grid.valid]]
    assert torch.equal(*(k.flatten().sort().values for k in key))
    assert torch.equal(grid.shuffled(1).embeddings, shuffled.embeddings)


def test_a_pt_file_is_clams_bare_tensor(tmp_path: Path) -> None:
    grid = make_grid()
    tensor = torch.load(grid.save_pt(tmp_path / "a.pt"), weights_only=True)
    assert torch.equal(tensor, grid.embeddings[grid.valid][:, 0])
