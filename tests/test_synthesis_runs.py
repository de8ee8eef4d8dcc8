# SPDX-License-Identifier: Apache-2.0
"""Long runs: broken off and gone on with, seen on the way, masked, tileable."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ssldiff_fast as sf
import ssldiff_fast.synthesis as synthesis
from ssldiff_fast.canvas import StateFolder
from ssldiff_fast.canvas.glass import LEVEL
from ssldiff_fast.cli import main
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.synthesis_inputs import glass_latent
from tiny_models import PATCH_PX, tiny_grid, tiny_model


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model()


def make(model: LatentDiffusion, out: Path, **changes: Any) -> sf.Synthesis:
    settings: dict[str, Any] = {"steps": 3, "progress": False, **changes}
    return sf.synthesize(model, settings.pop("grid", None) or tiny_grid(model), out, **settings)


def fail_at(step: int) -> Any:
    def callback(_: Any, number: int, *__: Any) -> None:
        if number == step:
            raise RuntimeError("the power went")

    return callback


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_that_was_broken_off_ends_in_the_same_file(
    model: LatentDiffusion, tmp_path: Path, step: int
) -> None:
    whole, out, state = tmp_path / "whole.tif", tmp_path / "out.tif", tmp_path / "state"
    make(model, whole)
    seen: list[int] = []
    kept = StateFolder(state, share=float("inf"))
    with pytest.raises(RuntimeError, match="the power went"):
        make(model, out, state=kept, callback_on_step_end=fail_at(step))
    assert not out.exists()
    make(model, out, state=state, callback_on_step_end=lambda _, n, *__: seen.append(n))
    assert seen[0] >= step
    assert out.read_bytes() == whole.read_bytes()
    assert not state.exists()


def test_what_was_denoised_is_not_denoised_again_when_decoding_fails(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out, state = tmp_path / "whole.tif", tmp_path / "out.tif", tmp_path / "state"
    make(model, whole)
    with monkeypatch.context() as patch:
        patch.setattr(synthesis.Plan, "decode", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(model, out, state=state, order="plain")
    with monkeypatch.context() as patch:
        patch.setattr(type(model.unet), "forward", lambda *_: 1 / 0)
        make(model, out, state=state, order="plain")
    assert out.read_bytes() == whole.read_bytes()
    assert not state.exists()


def test_the_orders_write_the_same_file(model: LatentDiffusion, tmp_path: Path) -> None:
    for preset in ("fast", "paper", "authors"):
        for order in ("plain", "wavefront"):
            make(model, tmp_path / f"{order}.tif", order=order, preset=preset, overwrite=True)
        plain, wavefront = ((tmp_path / f"{n}.tif").read_bytes() for n in ("plain", "wavefront"))
        assert plain == wavefront


def masked_grid(model: LatentDiffusion) -> sf.Grid:
    grid = tiny_grid(model, rows=3, columns=5)
    valid = torch.zeros(3, 5, dtype=torch.bool)
    valid[1, 0] = True
    return dataclasses.replace(grid, valid=valid)


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_windows_without_tissue_cost_nothing(
    model: LatentDiffusion, tmp_path: Path, preset: str
) -> None:
    options: dict[str, Any] = {"grid": masked_grid(model), "preset": preset}
    whole = make(model, tmp_path / "whole.png", **options)
    last: list[torch.Tensor] = []
    masked = make(
        model,
        tmp_path / "masked.png",
        mask=True,
        callback_on_step_end=lambda *shown: last.append(shown[3]["latents"].clone()),
        **options,
    )
    assert whole.evaluations_saved == 0
    assert masked.evaluations + masked.evaluations_saved == whole.evaluations
    assert masked.evaluations_saved > whole.evaluations / 3
    assert masked.recipe["mask"]
    far = last[-1][:, :, -12:]
    torch.testing.assert_close(far, glass_latent(model).expand_as(far), atol=1e-4, rtol=0)
    assert masked.recipe["glass"] == {"level": LEVEL, "reach": [6, 6], "balanced": True}
    assert "glass" not in whole.recipe


@pytest.mark.parametrize("decoder", ["reference", "local", "global"])
def test_what_the_mask_leaves_out_is_plain_glass(
    model: LatentDiffusion, tmp_path: Path, decoder: str
) -> None:
    grid = masked_grid(model)
    options: dict[str, Any] = {"grid": grid, "decoder": decoder, "mask": True}
    made = make(model, tmp_path / "out.png", order="wavefront", **options)
    plain = make(model, tmp_path / "plain.png", order="plain", **options)
    assert made.path.read_bytes() == plain.path.read_bytes()
    pixels = np.asarray(Image.open(made.path))
    assert np.all(pixels[:, 2 * PATCH_PX :] == LEVEL)
    tissue = pixels[PATCH_PX : 2 * PATCH_PX, :PATCH_PX]
    assert tissue.std() > 1


@pytest.mark.parametrize("wrap", ["x", "y", "both"])
def test_glass_goes_on_round_the_ends_of_a_wrapped_image(
    model: LatentDiffusion, tmp_path: Path, wrap: str
) -> None:
    grid = tiny_grid(model, rows=3, columns=3)
    grid.valid[:] = False
    grid.valid[0, 0] = True
    made = make(model, tmp_path / "out.png", grid=grid, wrap=wrap, mask=True)
    plain = np.all(np.asarray(Image.open(made.path)) == LEVEL, axis=2)
    near = 6 * PATCH_PX // 8  # up to which there may be something else
    expected = np.ones_like(plain)
    shifts = [(-1, 0, 1) if wrap in (axis, "both") else (0,) for axis in "yx"]
    for y, x in itertools.product(*shifts):
        begin = [shift * 3 * PATCH_PX - near for shift in (y, x)]
        rows, columns = (slice(max(0, b), max(0, b + PATCH_PX + 2 * near)) for b in begin)
        expected[rows, columns] = False
    assert np.all(plain[expected])
    # Beside the tissue's cell, on the other side of the ends, there is more than glass.
    ends = {"x": plain[:PATCH_PX, -8:], "y": plain[-8:, :PATCH_PX]}
    for axis, end in ends.items():
        assert end.mean() < 0.5 if wrap in (axis, "both") else end.all()


def test_a_mask_changes_nothing_where_all_is_tissue(model: LatentDiffusion, tmp_path: Path) -> None:
    first = make(model, tmp_path / "a.png")
    second = make(model, tmp_path / "b.png", mask=True)
    assert first.recipe == second.recipe
    assert first.path.read_bytes() == second.path.read_bytes()


@pytest.mark.parametrize(
    ("preset", "decoder"), [("fast", None), ("paper", None), ("fast", "local")]
)
def test_a_wrapped_image_has_no_edge_where_it_is_tiled(
    model: LatentDiffusion, tmp_path: Path, preset: str, decoder: str | None
) -> None:
    grid = tiny_grid(model, rows=3, columns=3)
    options: dict[str, Any] = {"grid": grid, "preset": preset, "decoder": decoder}
    made = make(model, tmp_path / "wrapped.png", wrap="both", **options)
    assert made.size_px == (3 * PATCH_PX, 3 * PATCH_PX)
    pixels = np.asarray(Image.open(made.path)).astype(float)
    for axis in (0, 1):
        steps = np.abs(np.diff(pixels, axis=axis)).mean((1 - axis, 2))
        edge = np.abs(np.take(pixels, 0, axis) - np.take(pixels, -1, axis)).mean()
        assert edge < 1.5 * np.quantile(steps, 0.9)


def test_a_preview_is_written(model: LatentDiffusion, tmp_path: Path) -> None:
    make(model, tmp_path / "out.png", preview=tmp_path / "preview.png")
    assert Image.open(tmp_path / "preview.png").size == (24, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrap": "z"}, "wrap is 'z', but it must be one of both, x, y"),
        ({"order": "wavefront", "wrap": "y"}, "wrap along y"),
        ({"order": "wavefront", "preview": "preview.png"}, "needs the whole canvas"),
        ({"order": "backwards"}, "order is 'backwards'"),
        ({"preview": "preview.jpg"}, r"must be a \.png"),
        ({"guidance_interval": (7, 3)}, "guidance_interval"),
        ({"resume": True}, "there is no state folder"),
    ],
)
def test_what_does_not_go_together_is_said_and_nothing_written(
    model: LatentDiffusion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        make(model, tmp_path / "out.tif", **changes)
    assert list(tmp_path.iterdir()) == []


def tiny_command(folder: Path) -> tuple[LatentDiffusion, list[str]]:
    """A small model, and the words that synthesize a grid with it, both saved in a folder."""
    model = tiny_model()
    model.save_pretrained(folder / "tiny")
    tiny_grid(model).save(folder / "grid.h5")
    return model, ["synthesize", str(folder / "grid.h5"), "--model", str(folder / "tiny")]


def test_the_command_stops_on_ctrl_c_and_goes_on_when_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, words = tiny_command(tmp_path)
    out = tmp_path / "out.tif"
    words += ["--steps", "3", "-o"]
    assert main([*words, str(tmp_path / "whole.tif")]) == 0
    forward, calls = type(model.unet).forward, []

    def interrupting(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.unet), "forward", interrupting)
        assert main([*words, str(out)]) == 130
    assert f"goes on from {out}.state when" in capsys.readouterr().err
    assert len(calls) == 4
    assert not out.exists()
    assert main([*words, str(out), "--seed", "1"]) == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert main([*words, str(out), "--resume"]) == 0
    assert out.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert not Path(f"{out}.state").exists()
    assert main([*words, str(out), "--resume", "--overwrite"]) == 2
    assert "holds no state to go on from" in capsys.readouterr().err
    assert main([*words, str(out), "--resume", "--no-state"]) == 2


def test_reuse_belongs_to_the_recipe_and_is_refused_where_it_has_no_use(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"preset": "paper", "overwrite": True}
    exact = make(model, tmp_path / "exact.png", **options)
    made = make(model, tmp_path / "out.png", reuse=2, **options)
    assert (exact.recipe["preset"]["reuse"], made.recipe["preset"]["reuse"]) == (1, 2)
    assert made.path.read_bytes() != exact.path.read_bytes()
    for changes, said in (
        ({"preset": "fast"}, "synthesize: reuse is 2, but these windows move from step to step"),
        ({"order": "wavefront"}, "synthesize: reuse is 2, but in the wavefront order"),
    ):
        with pytest.raises(ValueError, match=said):
            make(model, tmp_path / "none.tif", reuse=2, **{**options, **changes})
    assert not list(tmp_path.glob("none*"))


def test_the_command_that_reuses_goes_on_after_ctrl_c_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, words = tiny_command(tmp_path)
    out = tmp_path / "out.tif"
    words += ["--steps", "3", "--reuse", "2", "-o"]
    assert main([*words, str(tmp_path / "whole.tif"), "--preset", "paper"]) == 0
    words.append(str(out))
    with_deep, calls = type(model.unet).with_deep, []

    def interrupting(self: Any, *arguments: Any) -> Any:
        calls.append(len(arguments) > 3 and arguments[3] is not None)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return with_deep(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.unet), "with_deep", interrupting)
        assert main([*words, "--preset", "paper"]) == 130
    assert calls == [False] * 5 + [True] * 2  # five window rows, then the second step's
    assert main([*words, "--preset", "paper", "--resume"]) == 0
    assert out.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    capsys.readouterr()
    assert main([*words, "--preset", "fast", "--overwrite"]) == 2
    assert "reuse is 2, but these windows move" in capsys.readouterr().err
    assert main([*words, "--patches"]) == 2
    assert "--reuse is for large images" in capsys.readouterr().err
