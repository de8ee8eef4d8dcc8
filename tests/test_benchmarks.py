# SPDX-License-Identifier: Apache-2.0
"""What `make gpu` runs, what it says where it cannot, and a baseline without its library."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ssldiff_fast.canvas import canvas_noise
from tiny_models import tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_every_test_that_needs_a_gpu_is_among_those_it_runs(gpu: ModuleType) -> None:
    folders = [ROOT / path for path in gpu.TESTS]
    others = [p for p in (ROOT / "tests").rglob("test_*.py") if p != Path(__file__)]
    marked = [p for p in others if "mark.gpu" in p.read_text()]
    assert len(marked) >= 4
    assert [p for p in marked if not any(p.is_relative_to(f) for f in folders)] == []


def test_every_benchmark_with_a_gpu_side_is_among_those_it_runs(gpu: ModuleType) -> None:
    files = [p for p in (ROOT / "benchmarks").glob("*.py") if p.name != "timing.py"]
    sided = {p.name for p in files if "= arguments(__doc__)" in p.read_text()}
    assert sided == {script for script, *_ in gpu.BENCHMARKS}


def test_a_step_that_fails_is_named_and_does_not_stop_the_rest(gpu: ModuleType) -> None:
    step = gpu.run([sys.executable, "-c", "raise SystemExit(3)"])
    assert step["problem"] == "exit status 3"
    assert gpu.run([sys.executable, "-c", ""])["problem"] == ""


def test_a_step_that_takes_too_long_is_ended(gpu: ModuleType) -> None:
    step = gpu.run([sys.executable, "-c", "import time; time.sleep(60)"], limit=0.2)
    assert step["problem"] == "ended after 0.2 seconds"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so_in_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"make gpu: torch {torch.__version__} sees no CUDA device; ")
    assert done.stderr.count("\n") == 1


@torch.no_grad()
def test_tiles_without_diffusers_are_decoded_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tiled_decode = importlib.import_module("tiled_decode")
    model, z = tiny_model(), canvas_noise(0, 3, 20, 13)[None]
    expected = tiled_decode.tiled_decoder(model)(z)
    monkeypatch.setattr(tiled_decode, "HAS_DIFFUSERS", False)
    made = tiled_decode.tiled_decoder(model)(z)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
