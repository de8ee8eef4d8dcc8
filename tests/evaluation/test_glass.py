# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from ssldiff_fast.evaluation import measure_glass

CELL = 32
TISSUE = np.zeros((4, 6), bool)
TISSUE[:, 0] = True


def slide() -> np.ndarray:
    """Cells of tissue at the left, of which the right half is glass, and glass."""
    image = np.full((4 * CELL, 6 * CELL, 3), 240, np.uint8)
    image[:, : CELL // 2] = (180, 90, 150)
    return image


def test_even_glass_has_no_steps() -> None:
    figures = measure_glass(slide(), TISSUE)
    assert (figures.colour, figures.step, figures.beyond) == (0, 0, 0)


def test_a_box_of_another_white_is_a_step() -> None:
    image = slide()
    image[:, 3 * CELL :] += 6
    figures = measure_glass(image, TISSUE)
    # The cells from the third on have no tissue beside them; of their four columns three differ.
    assert figures.beyond == 6
    assert figures.colour == pytest.approx(6 * 3 / 4)
    assert figures.step == 6  # more than 1 % of the pairs of squares lie across its border
    image[:, 3 * CELL :, 0] -= 3  # a step in hue counts by its mean
    assert measure_glass(image, TISSUE).beyond == pytest.approx(5)


def test_tissue_is_no_step() -> None:
    image = slide()
    image[CELL : 2 * CELL, 4 * CELL : 5 * CELL] = (120, 60, 140)
    assert measure_glass(image, TISSUE).beyond == 0


def test_without_glass_there_is_no_figure() -> None:
    figures = measure_glass(np.zeros((4 * CELL, 6 * CELL, 3), np.uint8), TISSUE)
    assert all(math.isnan(value) for value in vars(figures).values())
    figures = measure_glass(slide(), np.ones_like(TISSUE))
    assert math.isnan(figures.step)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((128, 192, 3), np.float32), "image is float32"),
        (np.zeros((128, 192), np.uint8), r"expected uint8 \[H, W, 3\]"),
        (np.zeros((120, 192, 3), np.uint8), "has no 6 x 4 cells of whole squares of 16"),
    ],
)
def test_what_cannot_be_measured_is_said(image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_glass(image, TISSUE)
