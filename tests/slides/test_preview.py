# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slide_files import tissue_image
from ssldiff_fast.slides import write_preview
from ssldiff_fast.slides.preview import _bar_length


def test_the_panels_stand_side_by_side_in_their_order(tmp_path: Path) -> None:
    reference = np.full((300, 400, 3), (200, 30, 30), np.uint8)
    result = np.full((300, 400, 3), (30, 30, 200), np.uint8)
    mask = np.zeros((3, 4), bool)
    mask[:, :2] = True
    write_preview(tmp_path / "p.png", reference, mask, result, mpp=0.5, title="a title")
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 3 * 400
        assert image.height > 300
        row = np.asarray(image)[image.height // 2]
    reds, blues = (row == (200, 30, 30)).all(-1), (row == (30, 30, 200)).all(-1)
    assert reds.sum() == blues.sum() == 400
    assert np.flatnonzero(reds).max() < np.flatnonzero(blues).min()


def test_large_images_become_panels_of_1024_pixels(tmp_path: Path) -> None:
    image = np.full((200, 2600, 3), 200, np.uint8)
    write_preview(tmp_path / "p.png", image[::2, ::2], np.ones((2, 26), bool), image, mpp=0.5)
    with Image.open(tmp_path / "p.png") as preview:
        assert preview.width == 3 * 1024 + 4 * 24


def test_a_preview_without_mask_has_two_panels(tmp_path: Path) -> None:
    image = tissue_image(200, 150)
    write_preview(tmp_path / "p.png", image, None, image, mpp=0.5)
    with Image.open(tmp_path / "p.png") as preview:
        assert preview.width == 2 * 200 + 3 * 24


@pytest.mark.parametrize(
    ("width_um", "bar"), [(512, 100), (100, 20), (10_000, 2000), (26, 5), (4.9, 0.5)]
)
def test_the_scale_bar_has_a_round_length(width_um: float, bar: float) -> None:
    assert _bar_length(width_um) == pytest.approx(bar)


def test_wrong_panels_and_existing_files_are_refused(tmp_path: Path) -> None:
    image = tissue_image(64, 64)
    with pytest.raises(ValueError, match=r"result must be uint8 \[h, w, 3\], not float64"):
        write_preview(tmp_path / "p.png", image, None, image.astype(float), mpp=0.5)
    write_preview(tmp_path / "p.png", image, None, image, mpp=0.5)
    with pytest.raises(FileExistsError, match="exists and is kept"):
        write_preview(tmp_path / "p.png", image, None, image, mpp=0.5)
