# SPDX-License-Identifier: Apache-2.0
"""What is opened to be looked at, and where an image lies on its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from slide_files import FakeSpec, tissue_image, write_slide
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.slides.writers import open_writer
from ssldiff_fast.viewer.align import align
from ssldiff_fast.viewer.image import open_image


def _synthetic(path: Path, width: int = 256, height: int = 128, **metadata: Any) -> Path:
    with open_writer(path, width, height, 0.5, metadata=metadata) as writer:
        writer.write_rows(tissue_image(width, height))
    return path


@pytest.mark.parametrize("name", ["out.tif", "out.png"])
def test_what_we_write_is_called_synthetic(tmp_path: Path, name: str) -> None:
    path = _synthetic(tmp_path / name, synthetic=True, seed=3)
    image = open_image(path, mpp=0.5)
    assert image.synthetic
    assert image.metadata["seed"] == 3


def test_the_file_itself_says_it_without_the_json_beside_it(tmp_path: Path) -> None:
    path = _synthetic(tmp_path / "out.tif", seed=3)
    (tmp_path / "out.tif.json").unlink()
    assert open_image(path).synthetic
    assert open_image(path).metadata == {"seed": 3}


def test_a_scan_is_not_called_synthetic(slide_file: Path) -> None:
    assert not open_image(slide_file).synthetic


@pytest.mark.parametrize("text", ["", "nonsense", "[1]", "{}", '{"synthetic": "no"}', "[" * 99_999])
def test_a_broken_json_beside_an_image_is_no_obstacle(tmp_path: Path, text: str) -> None:
    path = write_slide(tmp_path / "a.tif", tissue_image())
    (tmp_path / "a.tif.json").write_text(text)
    assert not open_image(path).synthetic


@pytest.mark.parametrize("mpp", [None, 500.0, (0.5, 0.8)])
def test_an_image_without_a_plausible_mpp_is_opened_and_says_so(tmp_path: Path, mpp: Any) -> None:
    path = write_slide(tmp_path / "a.tif", tissue_image(), mpp=mpp)
    image = open_image(path)
    assert image.mpp is None
    assert "--mpp" in image.no_mpp
    assert image.size_px == (640, 512)
    assert open_image(path, mpp=0.25).mpp == 0.25


def test_a_plain_picture_is_opened(tmp_path: Path) -> None:
    Image.fromarray(tissue_image()).save(tmp_path / "a.jpg")
    assert open_image(tmp_path / "a.jpg").mpp is None


def test_a_wrong_mpp_given_is_an_error(slide_file: Path) -> None:
    with pytest.raises(ValueError, match=r"mpp of .* is 500 um per pixel"):
        open_image(slide_file, mpp=500.0)


def test_what_is_no_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        open_image(tmp_path / "absent.tif")
    (tmp_path / "text.tif").write_text("text")
    with pytest.raises(OSError, match="neither a slide"):
        open_image(tmp_path / "text.tif")


def _grid(source_hash: str | None, shape: tuple[int, int] = (2, 4)) -> Grid:
    return Grid(
        torch.ones(*shape, 1, 6),
        torch.ones(shape, dtype=torch.bool),
        0.5,
        64,
        encoder=vars(FakeSpec()),
        region_px=(100, 200, shape[1] * 64, shape[0] * 64),
        cell_level0_px=64,
        source={"name": "slide", "hash": source_hash},
    )


def test_the_region_given_comes_first(tmp_path: Path, slide_file: Path) -> None:
    image, reference = open_image(_synthetic(tmp_path / "out.tif")), open_image(slide_file)
    grid = _grid(reference.slide.hash)
    found = align(image, reference, region=(10, 20, 512, 256), grid=grid)
    assert found.region == (10, 20, 512, 256)
    assert align(image, reference, grid=grid).region == (100, 200, 256, 128)


def test_the_metadata_of_an_image_say_where_it_lies(tmp_path: Path, slide_file: Path) -> None:
    reference = open_image(slide_file)
    recipe = {"grid": {"source_hash": reference.slide.hash}}
    options = {"recipe": recipe, "source_region_px": [100, 200, 256, 128]}
    image = open_image(_synthetic(tmp_path / "out.tif", **options))
    assert align(image, reference).region == (100, 200, 256, 128)
    recipe["grid"]["source_hash"] = "sha256:another"
    other = open_image(_synthetic(tmp_path / "other.tif", **options))
    assert not align(other, reference).certain


@pytest.mark.parametrize("noted", [None, [1, 2], [0, 0, 0, 0], ["a"] * 4, {"x": 1}, [0, 0, 1.5, 2]])
def test_nonsense_in_the_metadata_is_ignored(tmp_path: Path, slide_file: Path, noted: Any) -> None:
    reference = open_image(slide_file)
    recipe = {"grid": {"source_hash": reference.slide.hash}}
    path = _synthetic(tmp_path / "out.tif", recipe=recipe, source_region_px=noted)
    assert not align(open_image(path), reference).certain


def test_images_of_one_size_lie_on_each_other(tmp_path: Path, slide_file: Path) -> None:
    half = write_slide(tmp_path / "half.tif", tissue_image(650, 450), mpp=1.0)
    found = align(open_image(half), open_image(slide_file))
    assert found.certain
    assert found.region == (0, 0, 1300, 900)


def test_otherwise_they_are_locked_by_micrometres_and_it_is_said(
    tmp_path: Path, slide_file: Path
) -> None:
    small = open_image(write_slide(tmp_path / "a.tif", tissue_image(300, 200), mpp=1.0))
    found = align(small, open_image(slide_file))
    assert found.region == (0, 0, 600, 400)
    assert not found.certain
    assert "micrometre by micrometre" in found.how
    assert "--region" in found.how


def test_a_region_or_grid_that_does_not_fit_is_one_sentence(
    tmp_path: Path, slide_file: Path
) -> None:
    image, reference = open_image(_synthetic(tmp_path / "out.tif")), open_image(slide_file)
    with pytest.raises(ValueError, match=r"leaves .*slide.tif, which has 1300 x 900"):
        align(image, reference, region=(1200, 0, 256, 128))
    with pytest.raises(ValueError, match=r"region 0,0,256,256 has another shape than out.tif"):
        align(image, reference, region=(0, 0, 256, 256))
    with pytest.raises(ValueError, match=r"grid of 3 x 4 cells has another shape than out.tif"):
        align(image, reference, grid=_grid(None, (3, 4)))
    with pytest.raises(ValueError, match=r"the grid was made from slide, not from slide.tif"):
        align(image, reference, grid=_grid("sha256:another"))


def test_a_deep_zoom_image_of_ours_is_called_synthetic(tmp_path: Path) -> None:
    for level in range(7):
        (tmp_path / f"out_files/{level}").mkdir(parents=True)
        Image.new("RGB", (1 << level,) * 2).save(tmp_path / f"out_files/{level}/0_0.png")
    (tmp_path / "out.dzi").write_text(
        '<!-- SYNTHETIC image, not a scan of tissue\n{"seed": 3}\n{"mpp": 0.5} -->\n'
        '<Image TileSize="64" Format="png"><Size Width="64" Height="64"/></Image>'
    )
    image = open_image(tmp_path / "out.dzi")
    assert image.synthetic
    assert image.metadata == {"seed": 3}
    assert image.mpp == 0.5
