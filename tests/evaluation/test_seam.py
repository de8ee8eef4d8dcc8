# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from ssldiff_fast.evaluation import measure_seam, seam_figure

WINDOW = 32


def smooth_field(seed: int = 0, size: tuple[int, int] = (256, 320)) -> np.ndarray:
    """A random texture whose neighbours are alike, without borders of any kind."""
    noise = np.random.default_rng(seed).normal(size=(*size, 3))
    for axis in (0, 1):
        noise = sum(np.roll(noise, shift, axis) for shift in range(-3, 4))
    return np.clip(128 + 30 * noise / noise.std(), 0, 255).astype(np.uint8)


def with_blocks(
    image: np.ndarray, step: int | np.ndarray, *, axes: tuple[int, ...] = (0, 1)
) -> np.ndarray:
    """The image with a constant added to every second window."""
    parity = sum(np.indices(image.shape[:2])[axis] // WINDOW for axis in axes) % 2
    return np.clip(image + step * parity[..., None], 0, 255).astype(np.uint8)


def by_hand(image: np.ndarray, window: int) -> float:
    """The definition, place by place."""
    grey = image.astype(float)
    at, expected = 0.0, 0.0
    for axis in (0, 1):
        profile = np.abs(np.diff(grey, axis=axis)).mean((1 - axis, 2))
        border = (np.arange(len(profile)) + 1) % window == 0
        at += profile[border].sum()
        expected += border.sum() * profile[~border].mean()
    return at / expected


def test_a_texture_without_seams_gives_about_one() -> None:
    for seed in range(5):
        seam = measure_seam(smooth_field(seed), WINDOW)
        assert seam.figure == pytest.approx(1, abs=0.04)
        assert seam.deviations < 4


def test_windows_of_another_brightness_give_more_than_one_and_more_the_larger_the_step() -> None:
    figures = [seam_figure(with_blocks(smooth_field(), step), WINDOW) for step in (0, 10, 20, 40)]
    assert figures == sorted(figures)
    assert figures[1] > 1.05
    assert measure_seam(with_blocks(smooth_field(), 20), WINDOW).deviations > 5


def test_a_step_in_hue_alone_counts() -> None:
    tinted = with_blocks(smooth_field(), np.array([20, -20, 0]))
    assert seam_figure(tinted, WINDOW) > 1.1


def test_borders_blurred_by_averaging_give_less_than_one() -> None:
    image = smooth_field()
    for border in range(WINDOW, image.shape[1], WINDOW):
        image[:, border] = image[:, border - 1]
    seam = measure_seam(image, WINDOW)
    assert seam.horizontal < 0.1
    assert seam.figure < 0.7


def test_each_direction_is_told_apart() -> None:
    seam = measure_seam(with_blocks(smooth_field(), 40, axes=(1,)), WINDOW)
    assert seam.horizontal > 1.3
    assert seam.vertical == pytest.approx(1, abs=0.06)
    assert seam.horizontal > seam.figure > seam.vertical


def test_the_figure_is_the_ratio_of_means_as_defined() -> None:
    for image in (smooth_field(3, (600, 130)), with_blocks(smooth_field(4), 25)):
        assert seam_figure(image, WINDOW) == pytest.approx(by_hand(image, WINDOW), rel=1e-12)


def test_a_direction_with_stronger_texture_does_not_look_like_a_seam() -> None:
    """Wide images have more vertical borders than horizontal ones."""
    stripes = np.random.default_rng(0).integers(0, 256, (64, 1))
    image = np.broadcast_to(stripes[..., None], (64, 640, 3)).astype(np.uint8)
    weak = np.random.default_rng(1).integers(0, 3, image.shape)
    seam = measure_seam(
        np.clip(image + weak, 0, 255).astype(np.uint8), rows=[], columns=range(32, 640, 32)
    )
    assert seam.figure == pytest.approx(1, abs=0.1)
    assert seam.noise > 0


def test_borders_may_lie_anywhere() -> None:
    image = smooth_field()
    image[100:] = np.clip(image[100:] + 60.0, 0, 255)
    image[:, 37:] = np.clip(image[:, 37:] - 60.0, 0, 255)
    found = measure_seam(image, rows=[100], columns=[37])
    assert found.borders == 2
    assert found.figure > 2
    assert math.isnan(found.noise)
    assert measure_seam(image, rows=[101], columns=[38]).figure < 1.2


def test_comparing_with_what_is_near_ignores_texture_that_changes_slowly() -> None:
    image = smooth_field(size=(320, 320)).astype(float)
    strength = np.linspace(0.05, 1.5, 320) ** 2
    image = np.clip(128 + (image - 128) * strength[:, None], 0, 255).astype(np.uint8)
    whole, near = measure_seam(image, WINDOW), measure_seam(image, WINDOW, near=4)
    assert near.noise < whole.noise
    assert near.figure == pytest.approx(1, abs=0.04)
    assert measure_seam(with_blocks(image, 20), WINDOW, near=4).figure > 1.1


def test_near_and_period_go_together() -> None:
    image = np.repeat(np.repeat(smooth_field(size=(64, 80)), 4, 0), 4, 1)
    assert measure_seam(image, WINDOW, period=4, near=8).figure == pytest.approx(1, abs=0.15)


def test_a_texture_with_a_period_of_its_own_is_no_seam_when_the_period_is_given() -> None:
    """As of a decoder that repeats pixels, whose blocks end where windows end."""
    image = np.repeat(np.repeat(smooth_field(size=(64, 80)), 4, 0), 4, 1)
    assert seam_figure(image, WINDOW) > 2
    assert measure_seam(image, WINDOW, period=4).figure == pytest.approx(1, abs=0.15)


def test_an_even_image_has_no_seam_and_two_even_halves_have_nothing_else() -> None:
    image = np.full((64, 64, 3), 200, np.uint8)
    assert seam_figure(image, WINDOW) == 1
    image[:, 32:] = 100
    assert math.isinf(seam_figure(image, WINDOW))


def test_the_image_is_not_changed() -> None:
    image = smooth_field()
    before = image.copy()
    measure_seam(image, WINDOW)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"window_px": 400}, "no border lies inside"),
        ({}, "no border lies inside"),
        ({"window_px": 1}, "expected at least 2"),
        ({"window_px": 32, "rows": [3]}, "exclude each other"),
        ({"rows": [0]}, "from 1 to 255"),
        ({"columns": [320]}, "from 1 to 319"),
        ({"window_px": 32, "period": 0}, "period is 0"),
        ({"window_px": 32, "period": 8, "near": 4}, "near is 4"),
        ({"window_px": 32, "period": 32}, "nothing is left to compare with"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure_seam(smooth_field(), **arguments)  # type: ignore[arg-type]


def test_only_rgb_of_eight_bits_is_measured() -> None:
    with pytest.raises(TypeError, match="float64, expected a uint8"):
        measure_seam(np.zeros((8, 8, 3)), 4)
    with pytest.raises(ValueError, match=r"expected RGB \[H, W, 3\]"):
        measure_seam(np.zeros((8, 8), np.uint8), 4)
