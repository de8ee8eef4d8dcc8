# SPDX-License-Identifier: Apache-2.0
"""A run that was killed goes on to the same bytes."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SIZE, denoiser, digest, image, noise, settings, shifted
from torch import Tensor
from toys import ConvDenoiser

import ssldiff_fast.canvas.state as state_module
from ssldiff_fast.canvas import Interrupted, StateFolder, sample_rows
from ssldiff_fast.canvas.state import Snapshot

HERE = Path(__file__).parent
KILLS = 20


class Failing(ConvDenoiser):
    """A network that goes wrong after some calls."""

    def __init__(self, calls: int, what: Any = None) -> None:
        super().__init__()
        self.calls, self.what = calls, what

    def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls == 0:
            if self.what is not None:
                self.what()
            else:
                raise MemoryError("gone")
        return super().__call__(x, t, state, index)


def kept(folder: Path, share: float = math.inf) -> StateFolder:
    return StateFolder(folder, share=share)


def broken_off(folder: Path, calls: int, **changes: Any) -> None:
    with pytest.raises(MemoryError), kept(folder) as state:
        image(denoiser(network=Failing(calls)), state=state, **changes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
def test_twenty_kills_at_random_moments_leave_the_bytes_as_they_are(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_many.py"), str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] >= KILLS
    assert report["resumed"] >= KILLS // 2
    for digests in report["digests"].values():
        assert len(digests) > 2
        assert len(set(digests)) == 1


@pytest.mark.parametrize("order", ["plain", "wavefront"])
@pytest.mark.parametrize("calls", [2, 29, 60, 130])
def test_a_run_goes_on_from_any_place(tmp_path: Path, order: str, calls: int) -> None:
    changes = {"order": order, "solver": "dpmpp_2m", "eta": 0.0}
    broken_off(tmp_path / "state", calls, **changes)
    evaluated = Failing(-1)
    with kept(tmp_path / "state") as state:
        found = image(denoiser(network=evaluated), state=state, **changes)
    assert digest(found) == digest(image(**changes))
    assert -1 - evaluated.calls <= 135 - calls + 4  # a run is 130 calls, and more if done again


def test_a_finished_run_leaves_no_state(tmp_path: Path) -> None:
    expected = digest(image())
    assert digest(image(state=tmp_path / "state")) == expected
    assert not (tmp_path / "state").exists()


def test_rows_that_are_not_durable_are_handed_on_again(tmp_path: Path) -> None:
    whole, written = image(), torch.full((3, *SIZE), float("nan"))
    durable = 0
    options: dict[str, Any] = {**settings(), "durable": lambda: durable}
    with kept(tmp_path / "state") as state:
        rows = sample_rows(denoiser(), noise(), state=state, **options)
        for band in rows:
            if band.begin > 20:  # handed on, but the consumer dies
                rows.close()  # type: ignore[attr-defined]
                break
            written[:, band.begin : band.end] = band.canvas
            durable = band.end
    begins = []
    with kept(tmp_path / "state") as state:
        for band in sample_rows(denoiser(), noise(), state=state, **options):
            begins.append(band.begin)
            written[:, band.begin : band.end] = band.canvas
    assert 0 < begins[0] <= durable
    assert torch.equal(written, whole)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"steps": 6}, "steps is 5 there and 6 here"),
        ({"seed": 4}, r"seed is \[3\] there and \[4\] here"),
        ({"eta": 0.25}, "eta is 0.5 there and 0.25 here"),
        ({"solver": "authors"}, 'solver is "ddim" there and "authors" here'),
        ({"order": "wavefront"}, 'order is "plain" there'),
        ({"recipe": {"model": {"weights": "abc"}}}, 'model is null there and {"weights": "abc"}'),
    ],
)
def test_a_state_of_another_recipe_is_refused_with_the_difference(
    tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    broken_off(tmp_path / "state", 50)
    with pytest.raises(ValueError, match=f"belongs to another run.*{difference}"):
        image(state=tmp_path / "state", **changes)
    expected = digest(image(**changes))
    assert digest(image(state=tmp_path / "state", resume=False, **changes)) == expected


def test_windows_guidance_field_and_start_belong_to_the_recipe(tmp_path: Path) -> None:
    from runs import field

    broken_off(tmp_path / "state", 50)
    for other in (
        {"guidance_scale": 2.0},
        {"batch_size": 3},
        {"windows": shifted()},
        {"field": field(12)},
        {"guidance_interval": (0, 500)},
    ):
        with pytest.raises(ValueError, match="belongs to another run"):
            image(denoiser(**other), state=tmp_path / "state")
    with pytest.raises(ValueError, match="noise is "):
        image(start=noise(1), state=tmp_path / "state")


def test_a_damaged_state_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "state"
    broken_off(folder, 60)
    newest, older = kept(folder).files()
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert digest(image(state=folder)) == digest(image())
    assert f"{newest} cannot be read (its checksum is another)" in caplog.text
    broken_off(folder, 60)
    for file, size in zip(kept(folder).files(), (0, 100)):
        file.write_bytes(file.read_bytes()[:size])
    with caplog.at_level(logging.WARNING):
        assert digest(image(state=folder)) == digest(image())
    assert caplog.text.count("cannot be read") == 3
    assert older.parent == folder


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with kept(tmp_path / "state"), pytest.raises(RuntimeError, match="in use by another process"):
        image(state=tmp_path / "state")


def test_a_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file: choose another folder"):
        image(state=tmp_path / "file")
    with pytest.raises(OSError, match="cannot be used"):
        image(state=tmp_path / "file" / "below")
    with pytest.raises(FileNotFoundError, match="holds no state to go on from"):
        image(state=tmp_path / "empty", resume=True)
    assert not (tmp_path / "empty").exists()


def test_without_space_the_run_goes_on_and_the_earlier_state_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "state"
    broken_off(folder, 50)
    before = [file.name for file in kept(folder).files()]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_module, "save", full)
    with caplog.at_level(logging.WARNING), pytest.raises(MemoryError), kept(folder) as state:
        image(denoiser(network=Failing(50)), state=state)
    assert caplog.text.count("no space is left") == 1
    assert [file.name for file in kept(folder).files()] == before
    monkeypatch.undo()
    assert digest(image(state=folder)) == digest(image())


def test_ctrl_c_stops_after_the_micro_batch_and_keeps_the_state(tmp_path: Path) -> None:
    interrupting = Failing(70, lambda: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"goes on from {tmp_path / 'state'} when"):
        image(denoiser(network=interrupting), state=tmp_path / "state")
    assert signal.getsignal(signal.SIGINT) is handler
    assert interrupting.calls == 0  # the micro-batch under way was the last
    assert isinstance(Interrupted(), KeyboardInterrupt)
    again = Failing(-1)
    assert digest(image(denoiser(network=again), state=tmp_path / "state")) == digest(image())
    assert -1 - again.calls < 75


def test_not_a_number_keeps_the_state(tmp_path: Path) -> None:
    class Broken(ConvDenoiser):
        def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
            output = super().__call__(x, t, state, index)
            return output * float("nan") if t < 300 else output

    message = r"NaN or infinite at step 4, in the window with origin \(0, 0\), in float32"
    with pytest.raises(RuntimeError, match=message), kept(tmp_path / "state") as state:
        image(denoiser(network=Broken()), state=state)
    assert len(kept(tmp_path / "state").files()) == 2


def test_states_are_spaced_by_what_they_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(state_module.time, "perf_counter", lambda: now[0])
    real = state_module.save

    def slow(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        now[0] += 0.5

    monkeypatch.setattr(state_module, "save", slow)
    written = 0
    with StateFolder(tmp_path / "state", share=0.01) as state:
        state.open({})
        for _ in range(1000):
            now[0] += 1.0
            before = now[0]
            state.save_if_due(Snapshot({"x": torch.zeros(3)}, {}))
            written += now[0] > before
    assert 15 <= written <= 20
    assert written * 0.5 <= 0.01 * now[0]
