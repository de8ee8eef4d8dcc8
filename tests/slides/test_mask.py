# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ssldiff_fast.slides.mask as mask_module
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


def test_a_thumbnail_is_smoothed_in_bands_as_it_would_be_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thumbnail = tissue_image(300, 500)
    bands = tissue_mask(thumbnail), mask_module._smoothed(thumbnail)
    monkeypatch.setattr(mask_module, "_BAND_ROWS", 1000)
    np.testing.assert_array_equal(bands[0], tissue_mask(thumbnail))
    for made, whole in zip(bands[1], mask_module._smoothed(thumbnail)):
        np.testing.assert_array_equal(made, whole)


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
