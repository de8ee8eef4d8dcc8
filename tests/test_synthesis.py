# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import torch
from PIL import Image

import ssldiff_fast as sf
from ssldiff_fast.cli import main
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.synthesis_inputs import background_filled
from tiny_models import PATCH_PX, tiny_grid, tiny_model


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model()


def make(model: LatentDiffusion, out: Path, **changes: Any) -> sf.Synthesis:
    settings: dict[str, Any] = {"steps": 2, "progress": False, **changes}
    return sf.synthesize(model, settings.pop("grid", None) or tiny_grid(model), out, **settings)


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_image(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("a.tif", "b.tif", "c.tif")]
    for path, seed in zip(files, (5, 5, 6)):
        make(model, path, seed=seed)
    a, b, c = (path.read_bytes() for path in files)
    assert a == b
    assert a != c


def test_the_slide_has_the_grids_size_and_mpp(model: LatentDiffusion, tmp_path: Path) -> None:
    made = make(model, tmp_path / "slide.tif")
    assert made.size_px == (3 * PATCH_PX, 2 * PATCH_PX)
    with openslide.OpenSlide(made.path) as slide:
        assert slide.dimensions == made.size_px
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(0.5)


def test_the_file_says_that_it_is_synthetic_and_how_it_was_made(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    made = make(model, tmp_path / "slide.tif", seed=7, guidance_scale=2.5)
    beside = json.loads((tmp_path / "slide.tif.json").read_text())
    assert beside["seed"] == 7
    assert beside["recipe"]["model"]["weights"] == model.weights_hash
    assert beside["recipe"]["preset"]["guidance_scale"] == 2.5
    assert beside["recipe"]["preset"]["steps"] == 2
    assert len(beside["recipe_hash"]) == 64
    assert beside["recipe"] == json.loads(json.dumps(made.recipe))


def test_the_hash_of_a_recipe_changes_with_what_decides_the_bytes(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    hashes = set()
    for number, changes in enumerate(
        ({}, {"steps": 3}, {"guidance_scale": 3.0}, {"batch_size": 3}, {"preset": "paper"})
    ):
        make(model, tmp_path / f"{number}.png", **{"steps": 2, **changes})
        beside = json.loads((tmp_path / f"{number}.png.json").read_text())
        hashes.add(beside["recipe_hash"])
    assert len(hashes) == 5


def test_a_measured_batch_size_is_a_number_in_the_recipe(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssldiff_fast.synthesis.auto_batch_size", lambda model, guided: 3)
    made = make(model, tmp_path / "auto.png", batch_size="auto")
    assert made.recipe["batch_size"] == 3
    given = make(model, tmp_path / "three.png", batch_size=3)
    assert made.path.read_bytes() == given.path.read_bytes()


@pytest.mark.parametrize("preset", ["paper", "authors", "fast"])
def test_every_preset_makes_an_image(model: LatentDiffusion, tmp_path: Path, preset: str) -> None:
    made = make(model, tmp_path / "image.png", preset=preset)
    assert np.asarray(Image.open(made.path)).shape == (2 * PATCH_PX, 3 * PATCH_PX, 3)


def test_guidance_changes_the_image(model: LatentDiffusion, tmp_path: Path) -> None:
    make(model, tmp_path / "a.png", guidance_scale=1.0)
    make(model, tmp_path / "b.png", guidance_scale=4.0)
    a, b = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert (a != b).any()


def test_a_saved_model_and_grid_make_what_the_loaded_ones_make(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "tiny", dtype="float32")
    loaded = sf.load(tmp_path / "tiny")
    grid = tiny_grid(loaded)
    grid.save(tmp_path / "grid.h5")
    make(loaded, tmp_path / "a.png", grid=grid)
    sf.synthesize(
        tmp_path / "tiny", tmp_path / "grid.h5", tmp_path / "b.png", steps=2, progress=False
    )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    again = [tmp_path / "tiny", tmp_path / "grid.h5", tmp_path / "c.png"]
    made = sf.synthesize(*again, steps=2, progress=False, decoder_dtype="bfloat16")
    assert made.recipe["decoder_dtype"] == "bfloat16"
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_cells_without_tissue_are_given_the_embedding_of_glass(model: LatentDiffusion) -> None:
    grid = tiny_grid(model)
    valid = grid.valid.clone()
    valid[0, 1] = False
    embeddings, there = background_filled(model, dataclasses.replace(grid, valid=valid))
    white = torch.full((1, PATCH_PX, PATCH_PX, 3), 243, dtype=torch.uint8)
    assert torch.equal(embeddings[0, 1], model.encoder(white)[0])
    assert torch.equal(embeddings[valid], grid.embeddings[valid])
    assert there.all()


def bad_grid(model: LatentDiffusion, kind: str) -> sf.Grid:
    grid = tiny_grid(model)
    if kind == "nan":
        embeddings = grid.embeddings.clone()
        embeddings[1, 2] = float("nan")
        return dataclasses.replace(grid, embeddings=embeddings)
    if kind == "width":
        return dataclasses.replace(grid, embeddings=grid.embeddings[..., :5], encoder={})
    if kind == "encoder":
        return dataclasses.replace(grid, encoder={**grid.encoder, "name": "uni"})
    return dataclasses.replace(grid, valid=torch.zeros_like(grid.valid))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "NaN"),
        ("width", "width|wide"),
        ("encoder", "uni"),
        ("empty", "valid|tissue"),
    ],
)
def test_an_unfit_grid_is_one_sentence_and_writes_nothing(
    model: LatentDiffusion, tmp_path: Path, kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(model, tmp_path / "out.tif", grid=bad_grid(model, kind))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "slow"}, "slow"),
        ({"steps": 0}, "steps"),
        ({"steps": -4}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"stride": 0}, "stride"),
        ({"stride": 9, "preset": "paper"}, "stride"),
        ({"decode_stride": -1}, "decode_stride"),
        ({"eta": -1.0, "preset": "paper"}, "eta"),
        ({"codec": "lzma"}, "lzma"),
        ({"device": "cpu"}, "device"),
        ({"seed": -1}, "seed"),
    ],
)
def test_an_impossible_setting_is_one_sentence_and_writes_nothing(
    model: LatentDiffusion, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(model, tmp_path / "out.tif", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": 3}, "preset is a int, but a name or a Preset"),
        ({"steps": 2.5}, "steps is 2.5, but it must be a whole number"),
        ({"batch_size": "4"}, "batch_size is '4', but it must be a whole number"),
        ({"guidance_scale": "2"}, "guidance_scale is '2', but it must be a number"),
        ({"stride": 2.5}, "stride is 2.5, but it must be a whole number"),
        ({"decode_stride": "4"}, "decode_stride is '4', but it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; expected an integer"),
        ({"grid": torch.ones(2, 3, 1, 12)}, "grid is a Tensor, but a Grid or the path"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_of_another_kind_is_one_sentence(
    model: LatentDiffusion, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = {"grid": tiny_grid(model), "steps": 2, **changes}
    with pytest.raises(TypeError, match=message):
        sf.synthesize(model, settings.pop("grid"), tmp_path / "out.tif", **settings)
    assert list(tmp_path.iterdir()) == []


def test_whole_numbers_of_numpy_are_whole_numbers(model: LatentDiffusion, tmp_path: Path) -> None:
    number = np.int64(4)
    numpy = {"seed": number, "batch_size": number, "stride": number, "decode_stride": number}
    plain = {name: int(value) for name, value in numpy.items()}
    first, second = (
        make(model, tmp_path / "a.png", **numpy),
        make(model, tmp_path / "b.png", **plain),
    )
    assert first.recipe == second.recipe
    assert first.path.read_bytes() == second.path.read_bytes()


@pytest.mark.parametrize(
    ("name", "changes"),
    [("out.png", {"codec": "jpeg"}), ("out.png", {"quality": 80}), ("out.tif", {"quality": 80})],
)
def test_a_codec_or_quality_that_would_be_ignored_is_refused(
    model: LatentDiffusion, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    if name == "out.tif":
        changes = {**changes, "codec": "deflate"}
    with pytest.raises(ValueError, match=r"lossless|\.tif"):
        make(model, tmp_path / name, **changes)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_overwriting_is_asked_for(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="overwrite"):
        make(model, out)
    assert out.read_bytes() == b"precious"
    make(model, out, overwrite=True)
    assert Image.open(out).size == (3 * PATCH_PX, 2 * PATCH_PX)


def test_a_run_that_fails_leaves_no_file(model: LatentDiffusion, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        make(model, tmp_path / "out.tif", callback_on_step_end=fail)
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_names_step_and_window(tmp_path: Path) -> None:
    broken = tiny_model()
    torch.nn.init.constant_(broken.unet.out[2].bias, float("nan"))
    with pytest.raises(RuntimeError, match=r"step 0.*window.*float32"):
        make(broken, tmp_path / "out.tif")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_image_and_says_so(
    model: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "tiny")
    tiny_grid(sf.load(tmp_path / "tiny")).save(tmp_path / "grid.h5")
    out = tmp_path / "slide.tif"
    words = ["synthesize", str(tmp_path / "grid.h5"), "--model", str(tmp_path / "tiny")]
    assert main([*words, "-o", str(out), "--steps", "2", "--guidance_scale", "1.5"]) == 0
    assert f"{out}: 96 x 64 px" in capsys.readouterr().out
    assert main([*words, "-o", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.h5"], "nothing.h5"),
        (["grid.h5", "--preset", "slow"], "slow"),
        (["grid.h5", "--device", "abacus"], "abacus"),
        (["grid.h5", "--dtype", "float1"], "float1"),
        (["grid.h5", "--decoder-dtype", "auto"], "decoder_dtype is 'auto'"),
        (["grid.h5", "--model", "he-dema"], "he-dema"),
    ],
)
def test_what_is_wrong_with_a_command_is_said_in_one_line(
    tmp_path: Path,
    model: LatentDiffusion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "tiny")
    tiny_grid(model).save(tmp_path / "grid.h5")
    chosen = [] if "--model" in words else ["--model", "tiny"]
    assert main(["synthesize", *words, *chosen, "-o", "out.tif"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert not (tmp_path / "out.tif").exists()
