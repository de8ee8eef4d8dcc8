# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

FOLDER = Path(__file__).parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    runpy.run_path(str(FOLDER / name), run_name="__main__")


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    assert [path.name for path in FOLDER.glob("*.py") if f'"{path.name}"' not in tested] == []


def test_the_diffusers_panorama_is_four_windows_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    run(monkeypatch, "diffusers_panorama.py", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.width == 4 * image.height


def test_the_k_diffusion_sampler_makes_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "k_diffusion_sampler.py", tmp_path / "out.png")
    pixels = np.asarray(Image.open(tmp_path / "out.png"))
    assert pixels.shape == (128, 256, 3)
    assert pixels.std() > 5


def test_the_masked_slide_is_white_where_its_mask_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "masked_slide.py", "-", tmp_path / "out.tif")
    pixels = tifffile.imread(tmp_path / "out.tif")
    assert pixels.shape == (384, 384, 3)
    assert pixels[-60:].mean() > pixels[100:200, 80:200].mean() + 20
