# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from slide_files import tissue_image, write_slide
from ssldiff_fast.slides import ImageSlide, open_slide, slide


@pytest.fixture
def pixels() -> np.ndarray:
    return tissue_image(640, 512)


def test_a_pyramid_gives_its_size_mpp_and_pixels(tmp_path: Path, pixels: np.ndarray) -> None:
    with open_slide(write_slide(tmp_path / "a.tif", pixels, mpp=0.25, levels=3)) as opened:
        assert opened.size_px == (640, 512)
        assert opened.levels_px == [(640, 512), (320, 256), (160, 128)]
        assert opened.mpp == pytest.approx(0.25, rel=1e-6)
        region = opened.read_region_at(100, 50, 200, 120, out_size=(200, 120))
        np.testing.assert_array_equal(region, pixels[50:170, 100:300])
        assert opened.hash.startswith("quickhash-1:")


def test_a_region_at_a_level_resolution_comes_from_that_level(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    path = write_slide(tmp_path / "a.tif", pixels, levels=2)
    level1 = tifffile.imread(path, key=1)
    region = open_slide(path).read_region_at(64, 32, 256, 128, out_size=(128, 64))
    np.testing.assert_array_equal(region, level1[16:80, 32:160])


def test_resampling_antialiases_a_checkerboard_to_grey() -> None:
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    source = ImageSlide(np.repeat(board[..., None], 3, 2), 0.25)
    small = source.read_region_at(0, 0, 256, 256, out_size=(100, 100))
    assert np.abs(small[5:-5, 5:-5].astype(float) - 127.5).max() < 12


@pytest.mark.parametrize("size", [(311, 250), (97, 77), (640, 512)], ids=str)
def test_reading_in_parts_gives_the_pixels_of_reading_whole(
    tmp_path: Path, pixels: np.ndarray, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_slide(write_slide(tmp_path / "a.tif", pixels, levels=2))
    whole = opened.thumbnail(640) if size == (640, 512) else None
    expected = opened.read_region_at(0, 0, 640, 512, out_size=size)
    monkeypatch.setattr(slide, "PIECE_PX", 5_000)
    parts = opened.read_region_at(0, 0, 640, 512, out_size=size)
    assert np.abs(parts.astype(int) - expected).max() <= 1
    if whole is not None:
        np.testing.assert_array_equal(whole, pixels)


def test_a_pickled_slide_opens_itself_again(tmp_path: Path, pixels: np.ndarray) -> None:
    opened = open_slide(write_slide(tmp_path / "a.tif", pixels))
    again = pickle.loads(pickle.dumps(opened))
    np.testing.assert_array_equal(again.thumbnail(100), opened.thumbnail(100))
    again.close()
    np.testing.assert_array_equal(again.thumbnail(100), opened.thumbnail(100))


def test_the_given_mpp_overrules_the_slides_own(tmp_path: Path, pixels: np.ndarray) -> None:
    assert open_slide(write_slide(tmp_path / "a.tif", pixels), mpp=0.25).mpp == 0.25


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_plain_image_opens_with_its_mpp_given(
    tmp_path: Path, pixels: np.ndarray, suffix: str
) -> None:
    path = tmp_path / f"plain{suffix}"
    Image.fromarray(pixels).save(path)
    opened = open_slide(path, mpp=0.5)
    np.testing.assert_array_equal(
        opened.read_region_at(3, 5, 20, 10, out_size=(20, 10)), pixels[5:15, 3:23]
    )
    assert opened.hash.startswith("sha256:")


def test_a_plain_tiff_tells_a_plausible_mpp_itself(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "plain.tif"
    tifffile.imwrite(
        path, pixels, photometric="rgb", resolution=(20_000, 20_000), resolutionunit="CENTIMETER"
    )
    assert open_slide(path).mpp == pytest.approx(0.5)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_images_of_other_modes_become_rgb_on_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    colour = (10, 20, 30, 0) if mode == "RGBA" else None
    image = Image.new("RGBA", (32, 32), colour) if colour else Image.new(mode, (32, 32))
    image.save(path)
    first = open_slide(path, mpp=1).thumbnail(32)[0, 0].tolist()
    assert first == ([255] * 3 if mode in ("RGBA", "CMYK") else [0] * 3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.svs"):
        open_slide(tmp_path / "nothing.svs")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        open_slide(tmp_path)


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.svs"
    path.write_text("not a slide")
    with pytest.raises(OSError, match="neither a slide that OpenSlide reads nor"):
        open_slide(path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_truncated_image_is_refused(tmp_path: Path, pixels: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(OSError, match="cannot be read"):
        open_slide(path, mpp=0.5)


def test_whatever_is_damaged_in_a_tiff_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(path, tissue_image(96, 80), resolution=(20_000, 20_000), resolutionunit=3)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        content = np.frombuffer(whole, np.uint8).copy()
        content[generator.integers(4, 300, 8)] = generator.integers(0, 256, 8)
        path.write_bytes(content.tobytes())
        said = ""
        try:
            open_slide(path).close()
        except (OSError, ValueError) as error:
            said = str(error)
        assert not said or str(path) in said
        assert "\n" not in said
        assert len(said) < 200 + 2 * len(str(path))


def test_a_slide_with_damaged_tiles_says_where_reading_failed(
    tmp_path: Path, pixels: np.ndarray
) -> None:
    path = write_slide(tmp_path / "a.tif", pixels)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"could not be read at level 0, x=0, y=0"):
        open_slide(path).read_region_at(0, 0, 64, 64, out_size=(64, 64))


def test_a_slide_without_mpp_says_how_to_give_it(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"does not say its mpp .*--mpp 0\.5"):
        open_slide(write_slide(tmp_path / "a.tif", pixels, mpp=None))


def test_a_plain_image_without_mpp_says_how_to_give_it(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"plain image and does not say its mpp .*--mpp 0\.5"):
        open_slide(tmp_path / "a.png")


def test_an_impossible_mpp_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    path = write_slide(tmp_path / "a.tif", pixels, mpp=352.8)
    with pytest.raises(ValueError, match=r"352\.8 um per pixel, expected 0\.05 to 20"):
        open_slide(path)
    assert open_slide(path, mpp=0.5).mpp == 0.5
    with pytest.raises(ValueError, match="mpp of"):
        open_slide(path, mpp=float("nan"))


def test_pixels_that_are_not_square_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"pixels of 0\.5 x 0\.6 um"):
        open_slide(write_slide(tmp_path / "a.tif", pixels, mpp=(0.5, 0.6)))
    nearly = write_slide(tmp_path / "b.tif", pixels, mpp=(0.5, 0.5005))
    assert open_slide(nearly).mpp == pytest.approx(0.50025, rel=1e-4)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((600, 0, 100, 10), "leaves"),
        ((-1, 0, 10, 10), "leaves"),
        ((0, 500, 10, 20), "has 640 x 512 level-0 pixels"),
        ((0, 0, 0, 10), "positive width and height"),
        ((0, 0, 10), "x,y,width,height"),
    ],
    ids=str,
)
def test_a_region_outside_is_refused(region: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSlide(tissue_image(640, 512), 0.5).check_region(region)  # type: ignore[arg-type]


def test_images_deeper_than_8_bits_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint16), photometric="rgb")
    with pytest.raises(ValueError, match="expected 8-bit RGB"):
        open_slide(tmp_path / "a.tif", mpp=0.5)
    with pytest.raises(TypeError, match="must be uint8"):
        ImageSlide(np.zeros((64, 64, 3), np.float32), 0.5)  # type: ignore[arg-type]
