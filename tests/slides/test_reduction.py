# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from slide_files import tissue_image
from ssldiff_fast import _C
from ssldiff_fast.slides.reduction import LANCZOS_LOBES, REDUCTIONS, halve_reference

SIZES = [(1, 1), (1, 2), (2, 1), (3, 5), (16, 16), (17, 30), (255, 257), (256, 256)]


def noise(height: int, width: int, bands: int) -> np.ndarray:
    """Values of all kinds, and areas of the extremes, where weighted sums overshoot."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (height, width, bands)).astype(np.uint8)
    pixels[: height // 2] = 255 * (pixels[: height // 2] > 127)
    return pixels


@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_box_is_the_mean_rounded_to_nearest(
    cpu_path: str, size: tuple[int, int], bands: int
) -> None:
    pixels = noise(*size, bands)
    halved = REDUCTIONS["box"].halve(pixels)
    np.testing.assert_array_equal(halved, halve_reference(pixels))
    assert halved[0, 0].tolist() == [
        (int(total) + 2) // 4
        for total in sum(
            pixels[y % size[0], x % size[1]].astype(int) for y in (0, 1) for x in (0, 1)
        )
    ]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_pixels_may_lie_in_a_larger_image_and_be_read_only(name: str) -> None:
    image = noise(60, 50, 3)
    for part in (image[3:43, 4:44], image[3:43, 44:4:-1], image[::-1][3:43, 4:44]):
        expected = REDUCTIONS[name].halve(part.copy())
        np.testing.assert_array_equal(REDUCTIONS[name].halve(part), expected)
        part.flags.writeable = False
        np.testing.assert_array_equal(REDUCTIONS[name].halve(part), expected)
        part.flags.writeable = True


@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("size", [(12, 12), (14, 40), (138, 266)], ids=str)
def test_lanczos_has_the_bits_of_its_reference(
    cpu_path: str, size: tuple[int, int], bands: int
) -> None:
    lanczos, pixels = REDUCTIONS["lanczos"], noise(*size, bands)
    halved = lanczos.halve(pixels)
    assert halved.shape == (size[0] // 2 - 5, size[1] // 2 - 5, bands)
    np.testing.assert_array_equal(halved, halve_reference(pixels, lanczos.weights))


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


@pytest.mark.parametrize(
    ("shape", "dtype", "weights", "message"),
    [
        ((4, 4), torch.uint8, [], r"must be uint8 \[h, w, 3\]"),
        ((4, 4, 2), torch.uint8, [], r"must be uint8 \[h, w, 3\]"),
        ((4, 4, 3), torch.float32, [], r"must be uint8 \[h, w, 3\]"),
        ((4, 4, 3), torch.uint8, [0.5, 0.5, 0.5], "3 weights for 4 x 4 pixels"),
        ((4, 5, 3), torch.uint8, [0.5, 0.5], "2 weights for 4 x 5 pixels"),
        ((2, 4, 3), torch.uint8, [0.25] * 4, "4 weights for 2 x 4 pixels"),
    ],
)
def test_the_raw_operator_checks_for_itself(
    shape: tuple[int, ...], dtype: torch.dtype, weights: list[float], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssldiff.halve(torch.zeros(shape, dtype=dtype), weights)


def test_without_the_compiled_operators_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_C, "CPU_PROBLEM", "libssldiff_cpu.so is not in here")
    with pytest.raises(RuntimeError, match="compiled operators cannot be used"):
        REDUCTIONS["box"].halve(np.zeros((2, 2, 3), np.uint8))
