# SPDX-License-Identifier: Apache-2.0
"""Denoising, decoding and writing at once, and what is kept when they end early."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ssldiff_fast as sf
from ssldiff_fast import pipeline, synthesis
from ssldiff_fast.canvas import StateFolder, canvas_noise
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.local_autoencoder import measure_statistics
from ssldiff_fast.models.region_decoder import StagedDecoder
from ssldiff_fast.pipeline import Background
from tiny_models import tiny_grid, tiny_model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model()


def make(model: LatentDiffusion, out: Path, **changes: Any) -> sf.Synthesis:
    settings: dict[str, Any] = {"steps": 2, "progress": False, **changes}
    grid = tiny_grid(model, 6, 2)
    if settings.get("mask"):
        grid.valid[:2], grid.valid[4, 1] = False, False
    return sf.synthesize(model, grid, out, **settings)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_runs_that_are_killed_again_and_again_end_in_the_same_bytes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "pipeline_kills.py"), str(tmp_path), "20"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= 20
    assert report["written before"] > 0
    assert report["left"] == []
    for digests in report["digests"].values():
        assert len(set(digests)) == 1
        assert len(digests) > 2


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("decoder", ["reference", "local", "local, fixed"])
def test_what_is_written_is_not_made_again(
    model: LatentDiffusion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoder: str,
    mask: bool,
) -> None:
    decoder, _, fixed = decoder.partition(",")
    kind, name = (StagedDecoder, "decode") if fixed else (type(model.vae.decoder), "forward")
    if fixed:
        latents = canvas_noise(0, 3, 8, 8)[None]
        statistics = measure_statistics(model.vae, model.vae.decode, latents)
        monkeypatch.setattr(model, "statistics", statistics)
    monkeypatch.setattr(pipeline, "_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "_SPACING", 0.0)
    options = {"order": "wavefront", "decoder": decoder, "mask": mask}
    whole, out, state = tmp_path / "whole.png", tmp_path / "out.png", tmp_path / "state"
    first = make(model, whole, **options)
    calls = 0
    decode = getattr(kind, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise RuntimeError("the power went")
        return decode(*arguments, **options)

    monkeypatch.setattr(kind, name, counted)
    limit = 0
    make(model, tmp_path / "again.png", **options)
    needed, calls, limit = calls, 0, calls - 1
    with pytest.raises(RuntimeError, match="the power went"):
        make(model, out, state=state, **options)
    assert not out.exists()
    calls, limit = 0, 0
    make(model, out, state=state, **options)
    assert calls < needed
    assert out.read_bytes() == whole.read_bytes()
    assert first.recipe["decode"]["decoder"] == decoder
    assert sorted(path.name for path in tmp_path.iterdir() if "state" in path.name) == []


def test_a_large_canvas_is_denoised_in_the_wavefront_order(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(model, tmp_path / "plain.png")
    monkeypatch.setattr(synthesis, "_WAVEFRONT_BYTES", 0)
    monkeypatch.setattr(synthesis.Plan, "denoise", None)
    make(model, tmp_path / "auto.png")
    assert (tmp_path / "auto.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_the_decoders_make_pictures_of_one_size(model: LatentDiffusion, tmp_path: Path) -> None:
    made = {}
    for decoder in ("reference", "local", "global"):
        made[decoder] = make(model, tmp_path / f"{decoder}.png", decoder=decoder)
        assert made[decoder].size_px == (64, 192)
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in made}) == 3


def test_another_run_is_refused_before_anything_is_opened(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    out, state = tmp_path / "out.png", tmp_path / "state"

    def stop(*_: Any) -> None:
        raise RuntimeError("the power went")

    kept = StateFolder(state, share=float("inf"))
    with pytest.raises(RuntimeError, match="the power went"):
        make(model, out, state=kept, callback_on_step_end=stop)
    with pytest.raises(ValueError, match=r'belongs to another run .*decoder is "reference"'):
        make(model, out, state=state, decoder="local")
    make(model, out, state=state, decoder="local", resume=False)
    assert not state.exists()


def feed(work: Any, items: Iterable[int]) -> None:
    with Background(work, depth=1) as background:
        for item in items:
            background.put(item)


def test_an_error_in_the_background_reaches_who_feeds_it() -> None:
    def work(items: Iterator[int]) -> None:
        next(items)
        raise OSError("no space is left")

    with pytest.raises(OSError, match="no space is left"):
        feed(work, range(1000))


def test_an_error_at_the_end_of_the_background_is_not_lost() -> None:
    def work(items: Iterator[int]) -> None:
        list(items)
        raise OSError("no space is left")

    with pytest.raises(OSError, match="no space is left"):
        feed(work, [1])


def test_the_background_ends_when_what_feeds_it_fails() -> None:
    seen: list[int] = []
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        feed(seen.extend, (1 // number for number in (1, 0)))
    assert threading.active_count() == before
    assert seen == [1]
