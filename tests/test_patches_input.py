# SPDX-License-Identifier: Apache-2.0
"""What patches say to bad input, a full disk and a broken network."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from patch_runs import grid_of, hashes, make
from ssldiff_fast.canvas import get_preset
from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.slides.grid import Grid
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model()


def with_nan(model: LatentDiffusion) -> Grid:
    grid = grid_of(model)
    embeddings = grid.embeddings.clone()
    embeddings[1, 1] = float("nan")
    return dataclasses.replace(grid, embeddings=embeddings)


def empty(model: LatentDiffusion) -> Grid:
    return dataclasses.replace(grid_of(model), valid=torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seeds": 0}, ValueError, "seeds is 0"),
        ({"seeds": 1.5}, TypeError, "seeds is 1.5"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 2**64 - 1, "seeds": 2}, ValueError, "seed is 18446744073709551616"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"format": "webp"}, ValueError, "format is 'webp', but it must be one of jpeg, png, sha"),
        ({"quality": 80}, ValueError, "quality is of JPEG, but format is 'png'"),
        ({"format": "jpeg", "quality": 101}, ValueError, "quality is 101"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"preset": "best"}, ValueError, "preset is 'best'"),
        (
            {"preset": dataclasses.replace(get_preset("paper"), reuse=2)},
            ValueError,
            "the preset's reuse is 2, but that is for large images",
        ),
        ({"device": "cpu"}, ValueError, "device, dtype, decoder_dtype and execution are for a"),
        ({"grid": with_nan}, ValueError, "NaN or infinity in 1 cell"),
        ({"grid": empty}, ValueError, "no valid cell"),
        ({"grid": lambda model: "nowhere.h5"}, FileNotFoundError, "nowhere.h5"),
        ({"grid": lambda model: 5}, TypeError, "grid is a int"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    model: LatentDiffusion,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    changes = {k: v(model) if isinstance(v, Callable) else v for k, v in changes.items()}  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        make(model, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_one_is_named(model: LatentDiffusion, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output folder .*file cannot be made"):
        make(model, tmp_path / "file")


def test_patches_without_a_recipe_are_not_taken_for_ours(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    make(model, tmp_path)
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(FileExistsError, match=r"but no recipe\.json"):
        make(model, tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a recipe"):
        make(model, tmp_path)


def test_a_full_disk_is_said_and_keeps_what_is_there(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = Path.write_bytes, []

    def full(self: Path, data: bytes) -> int:
        written.append(self)
        if len(written) > 3:
            raise OSError(28, os.strerror(28))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device.*make room"):
        make(model, tmp_path)
    monkeypatch.undo()
    assert len(hashes(tmp_path)) == 2  # and the recipe
    assert make(model, tmp_path).kept == 2


def test_nan_names_the_patch(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LDMDenoiser.__call__

    def broken(self: Any, *others: Any) -> torch.Tensor:
        output = forward(self, *others)
        output[:, 1] = float("inf")
        return output

    monkeypatch.setattr(LDMDenoiser, "__call__", broken)
    with pytest.raises(RuntimeError, match=r"latent of CMU_1_v2_1128_2000_s0 became NaN.*float32"):
        make(model, tmp_path)
