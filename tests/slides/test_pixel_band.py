# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from slide_files import tissue_image
from ssldiff_fast.slides import open_writer
from ssldiff_fast.slides.pixel_band import BLOCK, PixelBand

OFFSET = 4096


def band_of(image: np.ndarray, cuts: list[int]) -> PixelBand:
    """A band written in pieces that end at these columns."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the band keeps it
    file.truncate(OFFSET + image.size)
    band = PixelBand(file.fileno(), OFFSET, image.shape, file)
    for begin, end in zip([0, *cuts], [*cuts, image.shape[1]]):
        band[:, begin:end] = image[:, begin:end]
    return band


@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("cuts", [[], [1], [BLOCK], [5, 2 * BLOCK]], ids=str)
def test_a_band_reads_what_was_written_in_any_pieces(width: int, cuts: list[int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, width, 3)).astype(np.uint8)
    band = band_of(image, [cut for cut in cuts if cut < width])
    np.testing.assert_array_equal(np.asarray(band), image)
    for rows in (slice(None), slice(2, 5), slice(4, 4), slice(7, 99)):
        for columns in (slice(None), slice(3, 300), slice(width - 1, None), slice(2, 2)):
            part = band[rows, columns]
            assert part.shape == image[rows, columns].shape
            np.testing.assert_array_equal(np.asarray(part), image[rows, columns])
            np.testing.assert_array_equal(np.asarray(part[1:]), image[rows, columns][1:])
    assert len(band[3:]) == 6


def test_other_parts_stay_when_one_is_written() -> None:
    image = tissue_image(600, 40)
    band = band_of(image, [])
    band[3:7, 250:270] = image[3:7, 250:270][::-1]
    image[3:7, 250:270] = image[3:7, 250:270][::-1].copy()
    np.testing.assert_array_equal(np.asarray(band), image)


def test_what_does_not_fit_is_refused() -> None:
    band = band_of(tissue_image(60, 40), [])
    with pytest.raises(ValueError, match=r"pixels are \[40, 3, 3\], expected \[40, 4, 3\]"):
        band[:, 0:4] = np.zeros((40, 3, 3), np.uint8)
    with pytest.raises(ValueError, match="has no steps"):
        band[::2]
    with pytest.raises(ValueError, match="can only be copied"):
        np.asarray(band, copy=False)


@pytest.mark.parametrize("name", ["a.tif", "a.dzi", "a.png"])
@pytest.mark.parametrize("reduction", ["box", "lanczos"])
def test_a_writer_takes_bands_like_arrays(tmp_path: Path, name: str, reduction: str) -> None:
    image = tissue_image(700, 601)
    options = {} if name == "a.png" else {"reduction": reduction, "tile": 32}
    for folder, band in (("array", image), ("file", band_of(image, [77]))):
        (tmp_path / folder).mkdir()
        with open_writer(tmp_path / folder / name, 700, 601, 0.5, **options) as writer:
            for begin, end in ((0, 100), (100, 128), (128, 601)):
                writer.write_rows(band[begin:end])
    files = [p.relative_to(tmp_path / "array") for p in (tmp_path / "array").rglob("*.*")]
    assert len(files) >= 2
    for file in files:
        if (tmp_path / "array" / file).is_file():
            ours = (tmp_path / "file" / file).read_bytes()
            assert ours == (tmp_path / "array" / file).read_bytes()
