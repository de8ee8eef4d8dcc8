# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from slide_files import tissue_image
from ssldiff_fast.slides.reduction import LANCZOS_LOBES, REDUCTIONS, halve


@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 5), (16, 16), (17, 30), (256, 255)], ids=str)
def test_the_box_is_the_mean_rounded_to_nearest(size: tuple[int, int], bands: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, bands)).astype(np.uint8)
    even = np.pad(pixels, ((0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge").astype(int)
    total = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    np.testing.assert_array_equal(halve(pixels), (total + 2) // 4)


def test_lanczos_is_what_pillow_calls_lanczos() -> None:
    image = tissue_image(300, 200)
    reduction = REDUCTIONS["lanczos"]
    margin = [(reduction.reach, reduction.reach)] * 2 + [(0, 0)]
    ours = reduction.halve(np.pad(image, margin, mode="edge")).astype(int)
    theirs = np.asarray(Image.fromarray(image).resize((150, 100), Image.Resampling.LANCZOS))
    # Pillow leaves out what lies beyond the border, and rounds its weights.
    inner = np.abs(ours - theirs)[LANCZOS_LOBES:-LANCZOS_LOBES, LANCZOS_LOBES:-LANCZOS_LOBES]
    assert inner.max() <= 1


@pytest.mark.parametrize("name", REDUCTIONS)
def test_one_colour_stays_that_colour(name: str) -> None:
    reduction = REDUCTIONS[name]
    side = 10 + 2 * reduction.reach
    for value in (0, 7, 255):
        pixels = np.full((side, side, 3), value, np.uint8)
        np.testing.assert_array_equal(reduction.halve(pixels), np.full((5, 5, 3), value))
