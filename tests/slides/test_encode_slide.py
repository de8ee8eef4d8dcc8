# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slide_files import (
    FakeEncoder,
    FakeSpec,
    blank_image,
    refuse,
    tissue_image,
    unwritable_folder,
    write_slide,
)
from ssldiff_fast.slides import Grid, open_slide
from ssldiff_fast.slides import encode as module
from ssldiff_fast.slides.encode import encode


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "slide.tif", tissue_image(), levels=2)


def expected(pixels: np.ndarray) -> torch.Tensor:
    return FakeEncoder()(torch.from_numpy(np.ascontiguousarray(pixels))[None])[0]


def test_every_cell_holds_the_embedding_of_its_pixels(slide: Path) -> None:
    grid = encode(slide, FakeEncoder(), mask=False, progress=False)
    assert grid.shape == (8, 10)
    assert grid.valid.all()
    image = tissue_image()
    for row, col in ((0, 0), (3, 7), (7, 9)):
        cell = image[row * 64 : row * 64 + 64, col * 64 : col * 64 + 64]
        assert torch.equal(grid.embeddings[row, col], expected(cell))
    assert (grid.mpp, grid.cell_px, grid.cell_level0_px) == (0.5, 64, 64)
    assert grid.encoder["name"] == "fake"
    assert grid.source["name"] == "slide"
    assert grid.source["hash"].startswith("quickhash-1:")
    grid.check_for(FakeSpec())


def test_the_mask_leaves_background_cells_zero_and_unread(slide: Path) -> None:
    encoder = FakeEncoder()
    grid = encode(slide, encoder, progress=False)
    assert not grid.valid[0, 0]
    assert grid.valid[4, 5]
    assert (grid.embeddings[~grid.valid] == 0).all()
    assert sum(encoder.batches) == int(grid.valid.sum()) < 80


def test_batches_of_any_blocks_lie_in_one_place() -> None:
    blocks, first = [], 0
    for count in (5, 1, 17, 2, 8):
        numbers = torch.arange(first, first + count)
        blocks.append((numbers[:, None].to(torch.uint8), numbers[:, None].repeat(1, 2)))
        first += count
    places, seen = set(), []
    for cells, position in module._batches(blocks, 8):
        places.add(cells.data_ptr())
        assert (cells == position[:, :1]).all()
        seen.append(position[:, 0].tolist())
    assert [len(batch) for batch in seen] == [8, 8, 8, 8, 1]
    assert [number for batch in seen for number in batch] == list(range(33))
    assert len(places) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_blocks_and_workers_do_not_change_the_grid(
    slide: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = encode(slide, FakeEncoder(), workers=0, progress=False)
    monkeypatch.setattr(module, "BLOCK_PX", 192)
    encoder = FakeEncoder()
    grid = encode(slide, encoder, batch_size=7, workers=workers, progress=False)
    assert torch.allclose(grid.embeddings, plain.embeddings, atol=1e-6)
    assert set(encoder.batches[:-1]) == {7}


def test_spawned_workers_read_too(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    grid = encode(slide, FakeEncoder(), workers=1, progress=False)
    assert torch.equal(grid.embeddings, encode(slide, FakeEncoder(), progress=False).embeddings)


def test_cells_are_resampled_to_the_encoders_mpp(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "40x.tif", tissue_image(1280, 1024), mpp=0.25)
    grid = encode(path, FakeEncoder(), mask=False, progress=False)
    assert grid.shape == (8, 10)
    assert grid.cell_level0_px == 128
    coarse = encode(path, FakeEncoder(), mpp=1.0, mask=False, progress=False)
    assert coarse.shape == (4, 5)
    assert coarse.mpp == 1.0
    mean = grid.embeddings[:2, :2, 0, :3].mean((0, 1))
    assert torch.allclose(coarse.embeddings[0, 0, 0, :3], mean, atol=0.01)


def test_a_region_starts_where_it_says_and_keeps_whole_cells(slide: Path) -> None:
    grid = encode(slide, FakeEncoder(), region=(100, 50, 300, 200), mask=False, progress=False)
    assert grid.shape == (3, 4)
    assert grid.region_px == (100, 50, 256, 192)
    cell = tissue_image()[50 + 64 : 50 + 128, 100 : 100 + 64]
    assert torch.equal(grid.embeddings[1, 0], expected(cell))


def test_arrays_images_and_open_slides_are_taken(tmp_path: Path) -> None:
    pixels = tissue_image()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    grids = [
        encode(pixels, FakeEncoder(), source_mpp=0.5, progress=False),
        encode(tmp_path / "a.png", FakeEncoder(), source_mpp=0.5, progress=False),
        encode(open_slide(tmp_path / "a.png", mpp=0.5), FakeEncoder(), progress=False),
    ]
    for grid in grids[1:]:
        assert torch.equal(grid.embeddings, grids[0].embeddings)


def test_two_tokens_come_back_from_the_file(slide: Path, tmp_path: Path) -> None:
    encoder = FakeEncoder(FakeSpec(tokens=2))
    grid = encode(slide, encoder, out=tmp_path / "g.h5", progress=False)
    again = Grid.open(tmp_path / "g.h5")
    assert torch.equal(again.embeddings, grid.embeddings)
    assert torch.equal(again.valid, grid.valid)
    again.check_for(encoder.spec)


class Untouched(FakeEncoder):
    """An encoder that must not be called."""

    __call__ = refuse("the encoder")  # type: ignore[assignment]


def test_a_mask_without_tissue_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"has no tissue in the region: .*--no-mask"):
        encode(blank_image(), Untouched(), source_mpp=0.5, progress=False)


def test_a_slide_or_region_smaller_than_a_cell_is_an_error(slide: Path) -> None:
    small = tissue_image(63, 200)
    with pytest.raises(ValueError, match="63 x 200 level-0 pixels, smaller than one window of 64"):
        encode(small, Untouched(), source_mpp=0.5)
    with pytest.raises(ValueError, match=r"the region of .* smaller than one window"):
        encode(slide, Untouched(), region=(0, 0, 64, 63))


def test_a_region_outside_the_slide_is_an_error(slide: Path) -> None:
    with pytest.raises(ValueError, match=r"leaves .* 640 x 512 level-0 pixels"):
        encode(slide, Untouched(), region=(600, 0, 64, 64))


def test_a_slide_coarser_than_the_model_is_an_error(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "10x.tif", tissue_image(), mpp=1.0)
    with pytest.raises(ValueError, match=r"has 1 um per pixel and 0\.5 is wanted, which would"):
        encode(path, Untouched())
    nearly = write_slide(tmp_path / "20x.tif", tissue_image(), mpp=0.54)
    assert encode(nearly, FakeEncoder(), progress=False).cell_level0_px == 59


def test_missing_and_impossible_mpp_are_errors(tmp_path: Path) -> None:
    Image.fromarray(tissue_image()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="does not say its mpp"):
        encode(tmp_path / "a.png", Untouched())
    with pytest.raises(ValueError, match="an image array has no mpp"):
        encode(tissue_image(), Untouched())
    path = write_slide(tmp_path / "bad.tif", tissue_image(), mpp=352.8)
    with pytest.raises(ValueError, match=r"is 352\.8 um per pixel"):
        encode(path, Untouched())
    with pytest.raises(ValueError, match="mpp of the cells is 0"):
        encode(tissue_image(), Untouched(), source_mpp=0.5, mpp=0)


def test_an_output_that_cannot_be_written_is_found_first(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "g.h5").write_text("kept")
    with pytest.raises(FileExistsError, match="exists and is kept"):
        encode(slide, Untouched(), out=tmp_path / "g.h5")
    assert (tmp_path / "g.h5").read_text() == "kept"
    with pytest.raises(PermissionError, match="cannot be written"):
        encode(slide, Untouched(), out=unwritable_folder(tmp_path / "locked") / "g.h5")


def test_wrong_arguments_are_named(slide: Path) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        encode(slide, Untouched(), batch_size=0)
    with pytest.raises(ValueError, match="workers is -1"):
        encode(slide, Untouched(), workers=-1)
    with pytest.raises(TypeError, match="slide must be a file, an open slide or an array, not int"):
        encode(3, Untouched())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"encoder is a str, which .* `model\.encoder`"):
        encode(slide, "uni_v1")
    with pytest.raises(TypeError, match="mask is None, expected True, False or a mask file"):
        encode(slide, Untouched(), mask=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is open with mpp 0\.5, not source_mpp 1"):
        encode(open_slide(slide), Untouched(), source_mpp=1.0)


def test_an_encoder_that_breaks_its_spec_is_named(slide: Path) -> None:
    class Wide(FakeEncoder):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 1, 9)

    class Broken(FakeEncoder):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 1, 6), float("nan"))

    with pytest.raises(RuntimeError, match=r"returned \[.*, 1, 9\] for"):
        encode(slide, Wide(), progress=False)
    with pytest.raises(RuntimeError, match="returned NaN or infinity near row"):
        encode(slide, Broken(), progress=False)


def test_the_grid_says_which_encoder_and_preprocessing(slide: Path, tmp_path: Path) -> None:
    encode(slide, FakeEncoder(), out=tmp_path / "g.h5", progress=False)
    said = dict(Grid.open(tmp_path / "g.h5").encoder)
    want = dataclasses.asdict(FakeSpec())
    assert said == {**want, "mean": list(want["mean"]), "std": list(want["std"])}


def test_encoding_leaves_the_callers_random_state_alone(slide: Path) -> None:
    before = torch.get_rng_state()
    encode(slide, FakeEncoder(), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
