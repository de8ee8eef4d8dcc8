# SPDX-License-Identifier: Apache-2.0
"""Deep-zoom tiles: as many as there are, in the right place, and a cache that stays small."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slide_files import tissue_image, write_slide
from ssldiff_fast.slides.images import ImageSlide
from ssldiff_fast.slides.reader import open_slide
from ssldiff_fast.viewer import tiles
from ssldiff_fast.viewer.tiles import DeepZoom, TileCache


def _pixels(data: bytes) -> np.ndarray:  # [h, w, 3] uint8
    return np.asarray(Image.open(io.BytesIO(data)))


def _ramp(width: int, height: int) -> np.ndarray:  # [height, width, 3] uint8
    """Position as colour, so that a shift of a tile shows."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    return np.stack([red, green, np.full_like(red, 128)], -1).round().astype(np.uint8)


SIZES = {
    "one pixel": (1, 1),
    "one tile": (64, 64),
    "one pixel more": (65, 65),
    "wide": (300, 7),
    "high": (1, 200),
    "odd": (201, 133),
    "power of two": (256, 128),
}


@pytest.mark.parametrize(("width", "height"), SIZES.values(), ids=SIZES.keys())
def test_the_tiles_of_every_level_make_the_whole_image(width: int, height: int) -> None:
    image = _ramp(width, height)
    zoom = DeepZoom(ImageSlide(image, 0.5), tile=64)
    assert zoom.level_px(zoom.levels - 1) == (width, height)
    assert zoom.level_px(0) == (1, 1)
    for level in range(zoom.levels):
        level_w, level_h = zoom.level_px(level)
        whole = np.zeros((level_h, level_w, 3), np.uint8)
        for row in range(-(-level_h // 64)):
            for column in range(-(-level_w // 64)):
                made = _pixels(zoom.render(level, column, row))
                top, left = row * 64, column * 64
                whole[top : top + made.shape[0], left : left + made.shape[1]] = made
        assert not zoom.has(level, -(-level_w // 64), 0)
        assert not zoom.has(level, 0, -(-level_h // 64))
        down = 2 ** (zoom.levels - 1 - level)
        red = 255 * _centres(width, level_w, down) / max(1, width - 1)
        green = 255 * _centres(height, level_h, down) / max(1, height - 1)
        # 6 levels of grey for JPEG and for the filter at the image's border.
        assert np.abs(whole[..., 0] - red[None, :]).max() <= 6 + 255 / level_w * (level_w > 1) / 4
        assert np.abs(whole[..., 1] - green[:, None]).max() <= 6 + 255 / level_h * (level_h > 1) / 4


def _centres(full: int, count: int, down: int, tile: int = 64) -> np.ndarray:
    """Centres of a level's pixels in the image's; the last tile is stretched over what is left."""
    index = np.arange(count)
    start = index // tile * tile
    pixels = np.minimum(tile, count - start)
    width = np.minimum(pixels * down, full - start * down)
    return start * down + (index - start + 0.5) * width / pixels - 0.5


def test_neighbouring_tiles_meet_without_a_step() -> None:
    zoom = DeepZoom(ImageSlide(_ramp(512, 512), 0.5), tile=64)
    level = zoom.levels - 2
    left, right = (_pixels(zoom.render(level, column, 1))[..., 0].astype(int) for column in (1, 2))
    assert abs((right[:, 0] - left[:, -1]).mean() - 255 / 256) <= 1


@pytest.mark.parametrize("where", [(-1, 0, 0), (99, 0, 0), (8, 4, 0), (8, 0, 4), (8, -1, 0)])
def test_a_tile_that_is_not_there_is_an_error(where: tuple[int, int, int]) -> None:
    zoom = DeepZoom(ImageSlide(_ramp(256, 256), 0.5), tile=64)
    assert not zoom.has(*where)
    with pytest.raises(ValueError, match="there is no tile"):
        zoom.render(*where)


def test_coarse_tiles_of_a_slide_without_levels_come_from_one_overview(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "DIRECT_PX", 300 * 300)
    monkeypatch.setattr(tiles, "OVERVIEW_PX", 256)
    image = tissue_image(1280, 1024)
    slide = open_slide(write_slide(tmp_path / "flat.tif", image))
    zoom = DeepZoom(slide, tile=64)
    read: list[int] = []
    real = slide._read_level
    monkeypatch.setattr(slide, "_read_level", lambda *a: read.append(a[3] * a[4]) or real(*a))
    made = [_pixels(zoom.render(level, 0, 0)) for level in range(7)]
    assert sum(read) < 1.1 * image.shape[0] * image.shape[1]  # the whole slide, once
    expected = Image.fromarray(image).resize((40, 32), Image.Resampling.BOX)
    assert zoom.level_px(6) == (40, 32)
    assert np.abs(made[6].astype(int) - np.asarray(expected)).mean() < 6


def test_the_cache_keeps_what_was_used_last_within_its_limit() -> None:
    cache = TileCache(limit=10)
    made: list[str] = []

    def make(name: str, size: int) -> bytes:
        return cache.get(name, lambda: made.append(name) or bytes(size))  # type: ignore[func-returns-value]

    for name, size in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4)):
        assert len(make(name, size)) == size
        assert cache.size <= 10
    assert made == ["a", "b", "c", "b"]
    assert len(make("huge", 11)) == 11
    assert cache.size <= 10
    assert len(cache) == 2


def test_the_cache_may_be_used_from_many_threads() -> None:
    cache = TileCache(limit=2_000)

    def work(seed: int) -> None:
        for key in np.random.default_rng(seed).integers(0, 50, 400).tolist():
            assert cache.get(key, lambda key=key: bytes([key]) * 100) == bytes([key]) * 100

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.size == 100 * len(cache) <= 2_000
