# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser; skipped where there is none, or no OpenSeadragon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slide_files import FakeEncoder, tissue_image, write_slide
from ssldiff_fast.evaluation.similarity import Similarity
from ssldiff_fast.evaluation.similarity_file import CellSimilarity, save_similarity
from ssldiff_fast.slides.encode import encode
from ssldiff_fast.slides.writers import open_writer
from ssldiff_fast.viewer import library
from ssldiff_fast.viewer.open import open_scene
from webdriver import CHROMIUM, DRIVER, Browser

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no Chromium with its driver"),
    pytest.mark.skipif(not library.present(), reason="built without npm: no OpenSeadragon"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser") / "log.txt")
    yield browser
    browser.close()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A synthetic image, and the slide from whose region at (256, 128) it is."""
    whole = tissue_image(1536, 1024)
    with open_writer(tmp_path / "out.tif", 768, 512, 0.5, metadata={"synthetic": True}) as writer:
        writer.write_rows(whole[128:640, 256:1024])
    return tmp_path / "out.tif", write_slide(tmp_path / "slide.tif", whole, levels=2)


def _open(browser: Browser, address: str) -> None:
    browser.open(address)
    browser.wait("return document.body.dataset.ready === 'true'")


def _box(browser: Browser, index: int) -> tuple[float, float, float, float]:
    """(left, top, width, height) of a pane's image in the window."""
    left, top, width, height = browser.run(
        "const b = document.querySelectorAll('.stage')[arguments[0]].getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]",
        index,
    )
    return left, top, width, height


def _inside(browser: Browser, shot: np.ndarray, index: int) -> np.ndarray:  # [h, w, 3] int64
    """The middle of a pane's image, where neither map nor scale bar lies."""
    left, top, width, height = _box(browser, index)
    rows = slice(int(top + 0.35 * height), int(top + 0.35 * height) + int(0.45 * height))
    columns = slice(int(left + 0.4 * width), int(left + 0.4 * width) + int(0.35 * width))
    return shot[rows, columns].astype(int)


def _text(browser: Browser, selector: str) -> str:
    text: str = browser.run("return document.querySelector(arguments[0]).innerText", selector)
    return text


def _shown(browser: Browser, selector: str) -> list[bool]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.checkVisibility())"
    shown: list[bool] = browser.run(script, selector)
    return shown


def test_one_image_is_shown_with_scale_bar_and_label(
    browser: Browser, serve: Callable[..., Any], pair: tuple[Path, Path]
) -> None:
    _open(browser, serve(open_scene(pair[0])).address)
    shot = _inside(browser, browser.settled(), 0)
    assert browser.run("return document.title") == "out.tif (synthetic) – ssldiff view"
    assert _text(browser, ".badge") == "synthetic"
    words, width = (
        _text(browser, ".bar-text"),
        browser.run("return document.querySelector('.bar').getBoundingClientRect().width"),
    )
    assert words == "50 µm"
    screen_um = 768 * 0.5 / min(_box(browser, 0)[2], _box(browser, 0)[3] * 768 / 512)
    assert width == pytest.approx(50 / screen_um, rel=0.02)
    assert shot.std() > 10
    assert abs(shot[..., 0].mean() - 200) < 25  # the tissue's colour
    assert abs(shot[..., 1].mean() - 130) < 25
    assert browser.complaints() == []


def test_locked_images_show_the_same_place(
    browser: Browser, serve: Callable[..., Any], pair: tuple[Path, Path]
) -> None:
    _open(browser, serve(open_scene(*pair, region=(256, 128, 768, 512))).address)
    shots = []
    for keys in ((), ("+", "+"), ("Right", "Down"), ("1",), ("0",)):
        if keys:
            browser.press(*keys)
        shots.append(browser.settled())
        left, right = (_inside(browser, shots[-1], index) for index in (0, 1))
        rows, columns = min(len(left), len(right)), min(left.shape[1], right.shape[1])
        # Half a screen pixel of resampling, and JPEG.
        assert np.abs(left[:rows, :columns] - right[:rows, :columns]).mean() < 10
        assert left.std() > 10
    moved = [not np.array_equal(one, other) for one, other in pairwise(shots)]
    assert moved == [True] * 4
    assert browser.complaints() == []


def test_freed_images_move_alone_and_can_be_shown_alone(
    browser: Browser, serve: Callable[..., Any], pair: tuple[Path, Path]
) -> None:
    _open(browser, serve(open_scene(*pair, region=(256, 128, 768, 512))).address)
    browser.press("l")
    assert _text(browser, "#lock") == "Free"
    before = browser.settled()
    browser.press("+", "Left")
    after = browser.settled()
    same = [
        np.array_equal(_inside(browser, before, index), _inside(browser, after, index))
        for index in (0, 1)
    ]
    assert same == [False, True]
    for shown in ([True, False], [False, True], [True, True]):
        browser.press("v")
        browser.settled()
        assert _shown(browser, ".pane") == shown
    assert browser.complaints() == []


def test_overlays_tint_the_image_and_tell_their_values(
    browser: Browser, serve: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    encode(
        pair[1],
        FakeEncoder(),
        region=(256, 128, 768, 512),
        out=tmp_path / "g.h5",
        progress=False,
    )
    _open(browser, serve(open_scene(*pair, grid=tmp_path / "g.h5")).address)
    plain = browser.settled()
    for key, name in (("m", "mask"), ("g", "grid")):
        browser.press(key)
        browser.wait(f"return document.querySelector('#overlay-{name} p').textContent === ''")
        tinted = browser.settled()
        for index in (0, 1):
            change = _inside(browser, tinted, index) - _inside(browser, plain, index)
            assert change[..., 0].mean() < -20  # both tints lack red
        if key == "m":
            browser.press(key)
            again = browser.settled()
            assert np.array_equal(_inside(browser, again, 0), _inside(browser, plain, 0))
    left, top, width, height = _box(browser, 0)
    browser.point(left + width / 2, top + height / 2)
    browser.settled()
    said = _text(browser, "#pointer")
    assert said.startswith("out.tif")
    assert "x 384 px" in said.replace(", y", " px, y") or "x 383" in said or "x 385" in said
    assert "µm" in said
    assert "valid" in said
    assert _shown(browser, ".ghost") == [False, True]
    assert browser.complaints() == []


def test_similarity_is_a_heat_map_with_a_legend(
    browser: Browser, serve: Callable[..., Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    cells = np.linspace(0.5, 1, 96, dtype=np.float32).reshape(8, 12)
    side = {"rect": [0, 0, 768, 512]}
    kept = CellSimilarity(Similarity(cells), side, {"rect": [256, 128, 768, 512]}, "fake")
    save_similarity(tmp_path / "s.json", kept)
    scene = open_scene(*pair, region=(256, 128, 768, 512), similarity=tmp_path / "s.json")
    _open(browser, serve(scene).address)
    browser.press("s")
    browser.wait("return document.querySelector('#overlay-similarity p').textContent === ''")
    browser.run(
        "const range = document.querySelector('#overlay-similarity input[type=range]');"
        "range.value = 100; range.dispatchEvent(new Event('input'))"
    )
    shot = browser.settled()
    for index in (0, 1):
        left, top, width, height = _box(browser, index)
        low, high = (
            shot[int(top + height / 2 + dy), int(left + width / 2)].astype(int)
            for dy in (-0.2 * height, 0.2 * height)
        )
        assert low[2] > low[1] > low[0] or low[2] > 120  # viridis: blue below,
        assert high[1] > high[2]  # green above
    assert _text(browser, ".legend .ends").split() == ["≤", "0.510", "≥", "0.990"]
    assert "mean 0.750 over 96 cells" in _text(browser, "#overlay-similarity")
    assert browser.complaints() == []


def test_an_image_without_mpp_says_why_there_is_no_scale(
    browser: Browser, serve: Callable[..., Any], tmp_path: Path
) -> None:
    path = write_slide(tmp_path / "a.tif", tissue_image(), mpp=None)
    _open(browser, serve(open_scene(path)).address)
    assert "no scale" in _text(browser, ".bar-text")
    assert "--mpp" in _text(browser, "#notice")
    assert _shown(browser, "#overlay-mask") == []
    assert browser.complaints() == []


def test_a_tile_that_cannot_be_read_is_said_on_the_page(
    browser: Browser,
    serve: Callable[..., Any],
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = open_scene(pair[0])

    def fail(*where: int) -> bytes:
        raise OSError("out.tif could not be read: the file may be truncated")

    monkeypatch.setattr(scene.zooms[0], "render", fail)
    _open(browser, serve(scene).address)
    browser.wait("return !document.querySelector('#notice').hidden")
    assert "out.tif: a tile could not be shown" in _text(browser, "#notice")


def test_the_help_opens_and_closes_by_key(
    browser: Browser, serve: Callable[..., Any], pair: tuple[Path, Path]
) -> None:
    _open(browser, serve(open_scene(pair[0])).address)
    browser.press("?")
    assert _shown(browser, "#help") == [True]
    assert len(_shown(browser, "#shortcuts dt")) > 10
    browser.press("Escape")
    assert _shown(browser, "#help") == [False]


def test_a_narrow_window_shows_the_panes_one_over_the_other(
    browser: Browser, serve: Callable[..., Any], pair: tuple[Path, Path]
) -> None:
    browser.resize(500, 900)
    try:
        _open(browser, serve(open_scene(*pair)).address)
        first, second = (_box(browser, index) for index in (0, 1))
        assert second[1] >= first[1] + first[3]
        assert browser.run("return document.body.scrollWidth <= window.innerWidth")
    finally:
        browser.resize(1200, 800)


def test_locked_images_stay_so_when_the_window_changes(
    browser: Browser, serve: Callable[..., Any], pair: tuple[Path, Path]
) -> None:
    _open(browser, serve(open_scene(*pair, region=(256, 128, 768, 512))).address)
    bars = "return [...document.querySelectorAll('.bar')].map((b) => b.offsetWidth)"
    browser.press("+")
    try:
        for size in ((500, 900), (900, 600), (1200, 800)):
            browser.resize(*size)
            browser.settled()
            first, second = browser.run(bars)
            assert abs(first - second) <= 1
    finally:
        browser.resize(1200, 800)
