# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import ssldiff_fast
from slide_files import FakeEncoder, blank_image, refuse, tissue_image, write_slide
from ssldiff_fast.cli.encode import command
from ssldiff_fast.slides import Grid


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = SimpleNamespace(encoder=FakeEncoder())
    monkeypatch.setitem(vars(ssldiff_fast), "load", lambda name, *, device: model)
    return tmp_path


@pytest.fixture
def unloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where loading a model fails the test."""
    monkeypatch.setitem(vars(ssldiff_fast), "load", refuse("load"))
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def message(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code != 0
    return result.output if result.exit_code == 2 else str(result.exception)


def test_a_slide_becomes_a_grid_and_the_next_command_is_shown(folder: Path) -> None:
    write_slide(folder / "slide.tif", tissue_image())
    result = run("slide.tif")
    assert result.exit_code == 0, result.exception
    grid = Grid.open("slide.h5")
    assert grid.shape == (8, 10)
    assert "grid of 8 x 10 cells of 64 px at 0.5 um" in result.output
    assert "next: ssldiff synthesize slide.h5 --model he-demo -o slide.tif" in result.output


def test_every_option_reaches_the_grid(folder: Path) -> None:
    Image.fromarray(tissue_image(1280, 1024)).save(folder / "a.png")
    options = ["--mpp", "0.25", "--region", "128,0,1024,512", "--no-mask", "--batch-size", "5"]
    result = run("a.png", "-o", "g.h5", *options, "--workers", "0", "--device", "cpu")
    assert result.exit_code == 0, result.exception
    grid = Grid.open("g.h5")
    assert grid.region_px == (128, 0, 1024, 512)
    assert grid.shape == (4, 8)
    assert grid.valid.all()
    assert grid.source["mpp"] == 0.25


def test_a_mask_file_decides_the_valid_cells(folder: Path) -> None:
    write_slide(folder / "slide.tif", tissue_image())
    mask = Image.new("L", (10, 8))
    mask.putpixel((3, 2), 255)
    mask.save(folder / "mask.png")
    assert run("slide.tif", "--mask", "mask.png").exit_code == 0
    assert Grid.open("slide.h5").valid.nonzero().tolist() == [[2, 3]]


def test_what_is_wrong_with_the_slide_is_said_before_a_model_is_loaded(unloaded: Path) -> None:
    (unloaded / "notes.svs").write_text("not a slide")
    Image.fromarray(tissue_image()).save(unloaded / "a.png")
    write_slide(unloaded / "none.tif", tissue_image(), mpp=None)
    write_slide(unloaded / "bad.tif", tissue_image(), mpp=352.8)
    write_slide(unloaded / "good.tif", tissue_image())
    assert "there is no file nothing.svs" in message("nothing.svs")
    assert "neither a slide that OpenSlide reads nor" in message("notes.svs")
    assert "--mpp 0.5" in message("a.png")
    assert "none.tif does not say its mpp" in message("none.tif")
    assert "352.8 um per pixel" in message("bad.tif")
    assert "leaves good.tif" in message("good.tif", "--region", "600,0,64,64")
    assert "is not x,y,width,height" in message("good.tif", "--region", "1,2,3")
    assert "exclude each other" in message("good.tif", "--mask", "m.png", "--no-mask")


def test_an_existing_grid_is_kept_unless_overwritten(folder: Path) -> None:
    write_slide(folder / "slide.tif", tissue_image())
    (folder / "slide.h5").write_text("kept")
    assert "slide.h5 exists and is kept" in message("slide.tif")
    assert (folder / "slide.h5").read_text() == "kept"
    assert run("slide.tif", "--overwrite").exit_code == 0
    assert Grid.open("slide.h5").shape == (8, 10)


def test_a_blank_or_tiny_slide_writes_nothing(folder: Path) -> None:
    write_slide(folder / "blank.tif", blank_image())
    write_slide(folder / "tiny.tif", tissue_image(60, 60))
    assert "has no tissue in the region" in message("blank.tif")
    assert "smaller than one window" in message("tiny.tif")
    assert not list(folder.glob("*.h5"))
