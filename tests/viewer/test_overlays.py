# SPDX-License-Identifier: Apache-2.0
"""What is laid over the images: masks, cells, and similarities measured or read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slide_files import FakeEncoder, FakeSpec, tissue_image, write_slide
from ssldiff_fast.evaluation.similarity_file import read_similarity, save_similarity
from ssldiff_fast.models import load as load_module
from ssldiff_fast.slides.encode import encode
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.viewer.align import align
from ssldiff_fast.viewer.image import open_image
from ssldiff_fast.viewer.measure import measure_similarity
from ssldiff_fast.viewer.open import open_scene
from ssldiff_fast.viewer.overlays import grid_cells, mask_png, similarity_cells


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """An image of 512 x 256 pixels, and the slide from whose region at (128, 64) it is."""
    whole = tissue_image(1024, 512)
    slide = write_slide(tmp_path / "slide.tif", whole)
    return write_slide(tmp_path / "out.tif", whole[64:320, 128:640]), slide


@pytest.fixture
def grid_file(tmp_path: Path, pair: tuple[Path, Path]) -> Path:
    path = tmp_path / "grid.h5"
    encode(pair[1], FakeEncoder(), region=(128, 64, 512, 256), out=path, progress=False)
    return path


def test_a_mask_is_one_bit_of_tissue(pair: tuple[Path, Path]) -> None:
    image = Image.open(io.BytesIO(mask_png(open_image(pair[1]))))
    assert image.mode == "1"
    assert abs(np.asarray(image).mean() - 0.34) < 0.06  # pi 0.33^2, the ellipse


def test_a_mask_file_takes_the_place_of_what_is_found(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    Image.fromarray(np.tile(np.uint8([[0, 255]]), (1, 1))).save(tmp_path / "mask.png")
    scene = open_scene(pair[1], mask=tmp_path / "mask.png")
    assert np.asarray(Image.open(io.BytesIO(scene.mask_png(0)))).tolist() == [[False, True]]


def test_a_mask_of_another_shape_is_said_before_anything_is_served(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    Image.fromarray(np.full((50, 10), 255, np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"has 10 x 50 pixels, another shape than the slide's"):
        open_scene(*pair, mask=tmp_path / "mask.png")


def test_without_an_mpp_no_mask_is_offered(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.tif", tissue_image(), mpp=None)
    scene = open_scene(path)
    assert not scene.to_json()["images"][0]["mask"]
    with pytest.raises(ValueError, match=r"tissue is not looked for in a.tif"):
        scene.mask_png(0)


def test_a_reference_without_mpp_is_told_its_own_option(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    path = write_slide(tmp_path / "a.tif", tissue_image(), mpp=None)
    first, second = open_scene(path, path).to_json()["images"]
    assert "command line: --mpp" in first["no_mpp"]
    assert "command line: --reference-mpp" in second["no_mpp"]


def test_a_grids_cells_lie_on_image_and_reference(pair: tuple[Path, Path], grid_file: Path) -> None:
    scene = open_scene(*pair, grid=grid_file)
    (cells,) = scene.cells
    assert cells.rects == ((0, 0, 512, 256), (128, 64, 512, 256))
    assert cells.values.shape == (4, 8)
    assert cells.facts["valid"] == int(cells.values.sum()) < 32
    assert np.frombuffer(cells.to_bytes(), "<f4").reshape(4, 8).tolist() == cells.values.tolist()


def test_a_grid_is_shown_on_the_slide_that_it_was_made_from(
    pair: tuple[Path, Path], grid_file: Path
) -> None:
    (cells,) = open_scene(pair[1], grid=grid_file).cells
    assert cells.rects == ((128, 64, 512, 256),)


def test_a_grid_of_another_shape_is_one_sentence(pair: tuple[Path, Path]) -> None:
    grid = Grid(torch.ones(3, 3, 1, 6), torch.ones(3, 3, dtype=torch.bool), 0.5, 64)
    with pytest.raises(ValueError, match=r"grid of 3 x 3 cells has another shape than out.tif"):
        grid_cells(grid, [open_image(pair[0])], None)


def test_an_image_is_wholly_similar_to_the_region_that_it_shows(pair: tuple[Path, Path]) -> None:
    image, reference = open_image(pair[0]), open_image(pair[1])
    alignment = align(image, reference, region=(128, 64, 512, 256))
    measured = measure_similarity(
        image, FakeEncoder(), reference=reference, alignment=alignment, progress=False
    )
    assert measured.similarity.cells.shape == (4, 8)
    assert measured.similarity.cells.min() > 0.9999
    assert measured.reference["rect"] == (128, 64, 512, 256)
    shown = similarity_cells(measured, [image, reference])
    assert shown.rects == ((0, 0, 512, 256), (128, 64, 512, 256))
    low, high = shown.facts["range"]
    assert 0.97 < low < high <= 1


def test_a_displaced_region_is_less_similar(pair: tuple[Path, Path]) -> None:
    image, reference = open_image(pair[0]), open_image(pair[1])
    alignment = align(image, reference, region=(512, 256, 512, 256))
    measured = measure_similarity(
        image, FakeEncoder(), reference=reference, alignment=alignment, progress=False
    )
    assert measured.similarity.mean < 0.999


def test_a_grid_alone_is_enough_to_compare_with(pair: tuple[Path, Path], grid_file: Path) -> None:
    grid = Grid.open(grid_file)
    measured = measure_similarity(open_image(pair[0]), FakeEncoder(), grid=grid, progress=False)
    assert measured.similarity.count == int(grid.valid.sum())
    assert "rect" not in measured.reference
    assert similarity_cells(measured, [open_image(pair[0])]).rects == ((0, 0, 512, 256),)


def test_a_reference_that_ends_early_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    pixels = tissue_image(512, 256)
    image = open_image(write_slide(tmp_path / "out.tif", pixels))
    reference = open_image(write_slide(tmp_path / "short.tif", pixels[:200, :400]))
    measured = measure_similarity(
        image,
        FakeEncoder(),
        reference=reference,
        alignment=align(image, reference),
        progress=False,
    )
    assert measured.similarity.cells.shape == (3, 6)
    assert measured.image["rect"] == (0, 0, 384, 192)
    assert measured.similarity.cells.min() > 0.9999


def test_similarity_needs_mpp_and_something_to_compare_with(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    image = open_image(write_slide(tmp_path / "a.tif", tissue_image(), mpp=None))
    grid = Grid(torch.ones(8, 10, 1, 6), torch.ones(8, 10, dtype=torch.bool), 0.5, 64)
    with pytest.raises(ValueError, match=r"similarity needs the mpp of a.tif: .*--mpp"):
        measure_similarity(image, FakeEncoder(), grid=grid)
    with pytest.raises(ValueError, match=r"there is nothing to compare out.tif with"):
        measure_similarity(open_image(pair[0]), FakeEncoder())


class _Model:
    encoder = FakeEncoder(FakeSpec())


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models loaded; each is the stand-in."""
    names: list[str] = []
    monkeypatch.setattr(load_module, "load", lambda name, **_: names.append(name) or _Model())
    return names


def test_similarities_are_kept_and_read_again(
    tmp_path: Path, pair: tuple[Path, Path], models: list[str]
) -> None:
    file = tmp_path / "similarity.json"
    options: dict[str, Any] = {"region": (128, 64, 512, 256), "similarity": file}
    first = open_scene(*pair, model="mine", progress=False, **options)
    assert json.loads(file.read_text())["summary"]["cells"] == 32
    again = open_scene(*pair, **options)
    assert models == ["mine"]
    assert np.abs(again.cells[0].values - first.cells[0].values).max() <= 1e-4
    assert again.cells[0].rects == first.cells[0].rects


def test_similarities_of_other_files_are_refused(
    tmp_path: Path, pair: tuple[Path, Path], models: list[str]
) -> None:
    file = tmp_path / "similarity.json"
    region = (128, 64, 512, 256)
    open_scene(*pair, model="mine", region=region, similarity=file, progress=False)
    other = write_slide(tmp_path / "other.tif", tissue_image(512, 256, seed=9))
    with pytest.raises(ValueError, match=r"measured on out.tif, which is not other.tif"):
        open_scene(other, pair[1], similarity=file)


WRONG: dict[str, Callable[[dict], Any]] = {
    "no json": lambda content: "nonsense",
    "a list": lambda content: [1],
    "another format": lambda content: content | {"format": "other"},
    "no cells": lambda content: {k: v for k, v in content.items() if k != "cells"},
    "ragged": lambda content: content | {"cells": [[0.5], [0.5, 0.5]]},
    "words": lambda content: content | {"cells": [["a"]]},
    "flat": lambda content: content | {"cells": [0.5]},
    "too large": lambda content: content | {"cells": [[1.5]]},
    "infinite": lambda content: content | {"cells": [[float("inf"), 0.5]]},
    "nothing measured": lambda content: content | {"cells": [[None]]},
    "no rectangle": lambda content: content | {"image": {"rect": [0, 0, 1]}},
    "an empty rectangle": lambda content: content | {"image": {"rect": [0, 0, 0, 4]}},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_a_broken_file_of_similarities_is_one_sentence(
    tmp_path: Path, change: Callable[[dict], Any]
) -> None:
    good = {
        "format": "ssldiff_fast similarity 1",
        "encoder": "e",
        "image": {"name": "a", "rect": [0, 0, 4, 4]},
        "reference": {},
        "cells": [[0.5, None]],
    }
    path = tmp_path / "s.json"
    path.write_text(json.dumps(good))
    kept = read_similarity(path)
    assert kept.similarity.count == 1
    save_similarity(path, kept, overwrite=True)
    assert read_similarity(path).image["rect"] == [0, 0, 4, 4]
    changed = change(good)
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=r"s.json (is no file|holds no table)"):
        read_similarity(path)


def test_options_that_need_others_say_so(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for option in ({"region": (0, 0, 1, 1)}, {"reference_mpp": 0.5}):
        with pytest.raises(ValueError, match="REFERENCE, which is not given"):
            open_scene(pair[0], **option)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--model compares OUT with a REFERENCE or a grid"):
        open_scene(pair[0], model="he-demo")
    with pytest.raises(FileNotFoundError, match="there is no file of similarities"):
        open_scene(*pair, similarity=tmp_path / "absent.json")
