# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ssldiff_fast.slides.tissue as tissue_module
from slide_files import blank_image, tissue_image
from ssldiff_fast.slides import ImageSlide, slide_mask, tissue_mask
from ssldiff_fast.slides.mask import cell_fractions


def test_stained_tissue_is_found_and_glass_is_not() -> None:
    mask = tissue_mask(tissue_image(300, 200))
    assert mask[100, 150]
    assert not mask[:20].any()
    assert 0.3 < mask.mean() < 0.38  # an ellipse of 0.33 half-axes covers 0.342


def test_a_slide_that_is_all_tissue_is_all_mask() -> None:
    generator = np.random.default_rng(0)
    image = (np.array([200, 120, 170]) + generator.normal(0, 25, (200, 200, 3))).clip(0, 255)
    assert tissue_mask(image.astype(np.uint8)).all()


def test_a_slide_that_is_nearly_one_colour_has_a_mask() -> None:
    image = np.full((64, 64, 3), (200, 130, 180), np.uint8)
    image[::2, ::2] += 1  # smoothed, rounding is all that differs
    assert tissue_mask(image).all()
    assert tissue_mask(image[:1, :1]).all()


def test_a_blank_slide_has_no_tissue() -> None:
    assert not tissue_mask(blank_image(200, 200)).any()
    assert not tissue_mask(np.full((50, 50, 3), 255, np.uint8)).any()


def test_black_pen_dust_and_small_holes_are_no_matter() -> None:
    image = np.full((200, 200, 3), 243, np.uint8)
    image[20:40, 20:180] = 5  # black pen
    image[100:102, 10:12] = (200, 100, 160)  # a speck
    image[60:180, 60:180] = (200, 100, 160)
    image[100:102, 100:102] = 243  # a hole
    mask = tissue_mask(image)
    assert not mask[:50].any()
    assert not mask[:, :40].any()
    assert mask[65:175, 65:175].all()


def test_cell_fractions_count_the_tissue_of_each_cell() -> None:
    mask = np.zeros((50, 100), bool)
    mask[:25, :30] = True
    fractions = cell_fractions(mask, (400, 200), (0, 0), 100, (2, 4))
    np.testing.assert_allclose(fractions, [[1, 0.2, 0, 0], [0, 0, 0, 0]])
    shifted = cell_fractions(mask, (400, 200), (60, 40), 100, (1, 3))
    np.testing.assert_allclose(shifted, [[0.6 * 0.6, 0, 0]])


def test_a_mask_image_of_any_size_is_read(tmp_path: Path) -> None:
    drawn = np.zeros((64, 80), np.uint8)
    drawn[:, :40] = 1
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    mask = slide_mask(ImageSlide(tissue_image(640, 512), 0.5), tmp_path / "mask.png")
    assert mask.shape == (64, 80)
    assert mask[:, :40].all()
    assert not mask[:, 40:].any()


def spotted(width: int, height: int) -> np.ndarray:
    """Tissue with specks, holes, snakes across many rows, and ink."""
    image, random = tissue_image(width, height), np.random.default_rng(0)
    for _ in range(400):
        y, x = random.integers(height), random.integers(width)
        colour = ((243, 243, 243), (200, 100, 160), (5, 5, 5))[random.integers(3)]
        rows, columns = random.integers(1, (90, 6)), random.integers(1, (6, 90))
        image[y : y + rows[0], x : x + columns[0]] = colour
        image[y : y + rows[1], x : x + columns[1]] = colour
    return image


@pytest.mark.parametrize("rows", [1, 7, 64, 500])
def test_tissue_is_found_in_bands_as_it_would_be_whole(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    thumbnail = spotted(300, 500)
    whole = _tissue_of_a_whole(thumbnail)
    monkeypatch.setattr(tissue_module, "_BAND_PX", 300 * rows)
    np.testing.assert_array_equal(tissue_mask(thumbnail), whole)


def _tissue_of_a_whole(thumbnail: np.ndarray) -> np.ndarray:
    """The same by scikit-image's own functions, on a thumbnail in memory."""
    from skimage.filters import gaussian, threshold_otsu
    from skimage.measure import label

    def without_small(mask: np.ndarray, area: float) -> np.ndarray:
        labels = label(mask, connectivity=1)
        keep = np.bincount(labels.ravel()) >= area
        keep[0] = False
        return keep[labels]

    smooth = gaussian(thumbnail.astype(np.float32), sigma=1, truncate=4, channel_axis=-1)
    chroma, black = smooth.max(-1) - smooth.min(-1), smooth.max(-1) < tissue_module.BLACK
    threshold = np.clip(threshold_otsu(chroma), *tissue_module.CHROMA_RANGE)
    mask = (chroma > threshold) & ~(black & (chroma < tissue_module.CHROMA_RANGE[1]))
    mask = without_small(mask, tissue_module.SPECK_UM2 / 64)
    return ~without_small(~mask, tissue_module.HOLE_UM2 / 64)


PEAK = """
import numpy as np
from PIL import Image
from ssldiff_fast.bench.timing import peak_resident
from ssldiff_fast.slides.mask import cell_fractions, slide_mask
from ssldiff_fast.slides.slide import Slide

class Large(Slide):
    path, mpp, hash = None, 0.5, ""

    def __init__(self, side):
        self.size_px, self.levels_px = (side, side), [(side // 16, side // 16)]

    def _read_level(self, level, x, y, width, height):
        random = np.random.default_rng(y)
        return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))

def tissue(side):
    mask = slide_mask(Large(side))
    assert mask.shape == (side // 16, side // 16)
    cell_fractions(mask, (side, side), (0, 0), 128, (side // 128, side // 128))

tissue(8192)
before = peak_resident()
tissue(32768)
print(peak_resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others tell the peak in other ways")
def test_of_a_large_slide_only_the_mask_is_in_memory() -> None:
    command = [sys.executable, "-c", PEAK]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 32  # MiB: 15 measured, the mask has 4; labels of the whole have 32


def test_geojson_polygons_are_filled_without_their_holes(tmp_path: Path) -> None:
    ring = [[0, 0], [320, 0], [320, 512], [0, 512], [0, 0]]
    hole = [[80, 128], [240, 128], [240, 384], [80, 384], [80, 128]]
    shape = {"type": "Polygon", "coordinates": [ring, hole]}
    feature = {"type": "Feature", "geometry": shape, "properties": {}}
    path = tmp_path / "tissue.geojson"
    for content in (feature, [feature], {"type": "FeatureCollection", "features": [feature]}):
        path.write_text(json.dumps(content))
        mask = slide_mask(ImageSlide(tissue_image(640, 512), 2.0), path)
        height, width = mask.shape
        assert mask[height // 8, width // 8]
        assert not mask[height // 2, width // 4]
        assert not mask[:, width * 5 // 8 :].any()


def test_features_without_a_geometry_are_passed_over(tmp_path: Path) -> None:
    ring = [[0, 0], [640, 0], [640, 512], [0, 512], [0, 0]]
    polygon = {"type": "Polygon", "coordinates": [ring, ring[:1]]}
    shapes = [None, {"type": "Point", "coordinates": [3, 4]}, polygon]
    features = [{"type": "Feature", "geometry": shape} for shape in shapes]
    path = tmp_path / "tissue.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert slide_mask(ImageSlide(tissue_image(640, 512), 2.0), path).all()


@pytest.mark.parametrize("ring", [[1, 2, 3], [[1], [2]], "no ring", [[0, 0], [1, None]], [{}]])
def test_outlines_that_are_none_are_refused(tmp_path: Path, ring: object) -> None:
    path = tmp_path / "bad.geojson"
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    with pytest.raises(ValueError, match=r"bad\.geojson is not GeoJSON"):
        slide_mask(ImageSlide(tissue_image(64, 64), 2.0), path)


def test_a_mask_beyond_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "mask.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="more pixels than fit in memory: scale it down"):
        slide_mask(ImageSlide(tissue_image(64, 64), 2.0), tmp_path / "mask.png")


def test_mask_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    slide = ImageSlide(tissue_image(640, 512), 0.5)
    with pytest.raises(FileNotFoundError, match="there is no mask file"):
        slide_mask(slide, tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OSError, match="neither GeoJSON nor an image"):
        slide_mask(slide, tmp_path / "text.png")
    Image.new("L", (100, 10)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="another shape than the slide's"):
        slide_mask(slide, tmp_path / "wide.png")
    (tmp_path / "bad.geojson").write_text("{")
    with pytest.raises(ValueError, match="is not GeoJSON"):
        slide_mask(slide, tmp_path / "bad.geojson")
    (tmp_path / "empty.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(ValueError, match="has no Polygon"):
        slide_mask(slide, tmp_path / "empty.geojson")
