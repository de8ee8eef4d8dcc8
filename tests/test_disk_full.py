# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up while a whole synthesis runs: said in one sentence, and nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import ssldiff_fast as sf
from ssldiff_fast import pipeline
from ssldiff_fast.canvas import StateFolder, wide
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.slides import tiff
from ssldiff_fast.slides.tiff import TiffSink
from tiny_models import tiny_grid, tiny_model


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model()


def make(model: LatentDiffusion, out: Path, **changes: Any) -> None:
    settings: dict[str, Any] = {"steps": 2, "progress": False, "order": "wavefront", **changes}
    sf.synthesize(model, tiny_grid(model, 8, 2), out, **settings)


def full_at(call: int) -> Any:
    """Raises what a full disk does at this call, and at every later one."""
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return check


def test_the_writers_disk_fills_and_the_run_goes_on_when_there_is_room(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_SECONDS", 0.0)
    monkeypatch.setattr(pipeline, "_SPACING", 0.0)
    monkeypatch.setattr(tiff, "TILE", 16)
    whole, out, state = tmp_path / "whole.tif", tmp_path / "out.tif", tmp_path / "state"
    make(model, whole)
    real, check = TiffSink.put, full_at(30)

    def put(self: TiffSink, *tile: Any) -> None:
        check()
        real(self, *tile)

    with monkeypatch.context() as patch:
        patch.setattr(TiffSink, "put", put)
        with pytest.raises(OSError, match=r"out\.tif could not be written .* run again: .* kept$"):
            make(model, out, state=StateFolder(state, share=float("inf")))
    assert not out.exists()
    make(model, out, state=state)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.tif",
        "out.tif.json",
        "whole.tif",
        "whole.tif.json",
    ]


def test_the_disk_of_waiting_rows_fills_and_the_run_goes_on_when_there_is_room(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out, state = tmp_path / "whole.tif", tmp_path / "out.tif", tmp_path / "state"
    make(model, whole)
    with monkeypatch.context() as patch:
        patch.setattr(wide, "_LEAST_BYTES", 2**12)
        patch.setattr(wide, "_MOST_BYTES", 2**12)
        real, check = os.posix_fallocate, full_at(5)
        patch.setattr(os, "posix_fallocate", lambda *where: check() or real(*where))
        with pytest.raises(OSError, match=r"for rows that wait \(No space left on device\)"):
            make(model, out, state=StateFolder(state, share=float("inf")))
    assert not out.exists()
    assert list(state.glob("state-*"))
    make(model, out, state=state)
    assert out.read_bytes() == whole.read_bytes()


def test_room_for_waiting_rows_and_states_is_checked_before_the_start(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    def needs(**options: Any) -> float:
        """KiB that the message names."""
        with pytest.raises(OSError, match=r"needs about .* free: make room, or choose") as refused:
            make(model, tmp_path / "out.tif", **options)
        number, unit = str(refused.value).split("about ")[1].split()[:2]
        return float(number) * {"KiB": 1, "MiB": 1024}[unit]

    plain, wavefront = needs(order="plain"), needs()
    assert plain < wavefront < needs(state=tmp_path / "state")
    assert list(tmp_path.iterdir()) == []
