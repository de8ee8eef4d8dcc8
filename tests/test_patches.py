# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ssldiff_fast as sf
from patch_runs import grid_of, hashes, make
from ssldiff_fast import patches
from ssldiff_fast.canvas import CanvasDenoiser, GridField, WindowPlan, sample
from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.cli import main
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.patch_sampler import PatchSampler, patch_seed
from ssldiff_fast.slides import patch_files
from tiny_models import PATCH_PX, tiny_model


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model()


def test_every_valid_cell_gets_an_image_named_by_slide_and_place(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    done = make(model, tmp_path / "out")
    assert (done.made, done.kept, done.size_px) == (5, 0, (PATCH_PX, PATCH_PX))
    assert sorted(hashes(tmp_path / "out")) == [
        "CMU_1_v2_1000_2000_s0.png",
        "CMU_1_v2_1000_2064_s0.png",
        "CMU_1_v2_1064_2064_s0.png",
        "CMU_1_v2_1128_2000_s0.png",
        "CMU_1_v2_1128_2064_s0.png",
    ]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_patch_is_a_canvas_of_one_window(model: LatentDiffusion, tmp_path: Path) -> None:
    grid = grid_of(model)
    done = make(model, tmp_path / "out", guidance_scale=2.0)
    assert done.recipe["solver"] == "dpmpp_2m"
    place = patch_files.Patch("", 1, 2, 1128, 2064, 0)
    canvas = CanvasDenoiser(
        LDMDenoiser(model),
        WindowPlan.regular(8, 8, (8, 8), 8),
        GridField(grid.embeddings[1:2, 2:3], (8, 8)),
        guidance_scale=2.0,
    )
    noise = sf.canvas.canvas_noise(patch_seed(place), 3, 8, 8)
    latent = sample(canvas, noise, schedule=model.schedule, solver="dpmpp_2m", steps=2)
    with torch.no_grad():
        image = model.from_latent(latent[None])[0]
    expected = (((image + 1) / 2).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    written = np.asarray(Image.open(tmp_path / "out" / "CMU_1_v2_1128_2064_s0.png"))
    assert float(np.abs(written - expected).max()) < 2.0


def test_a_patch_does_not_depend_on_which_others_are_made(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    grid = grid_of(model)
    make(model, tmp_path / "all", eta=1.0, preset="paper")
    make(model, tmp_path / "row", eta=1.0, preset="paper", grid=grid.crop(slice(1, 2), slice(1, 3)))
    whole, part = hashes(tmp_path / "all"), hashes(tmp_path / "row")
    assert len(part) == 2
    for name in part:
        images = [np.asarray(Image.open(tmp_path / folder / name)) for folder in ("all", "row")]
        assert np.array_equal(*images)
    assert len(set(whole.values())) == 5


def test_several_seeds_give_several_images_and_more_may_be_added(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    make(model, tmp_path, seed=7)
    before = hashes(tmp_path)
    done = make(model, tmp_path, seed=6, seeds=3)
    assert (done.made, done.kept) == (10, 5)
    after = hashes(tmp_path)
    assert len(set(after.values())) == 15
    assert before.items() <= after.items()
    assert "CMU_1_v2_1000_2000_s8.png" in after


def test_a_run_goes_on_where_it_was_and_ends_in_the_same_bytes(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    make(model, tmp_path)
    before = hashes(tmp_path)
    for name in list(before)[1::2]:
        (tmp_path / name).unlink()
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    done = make(model, tmp_path)
    assert (done.made, done.kept) == (2, 3)
    assert hashes(tmp_path) == before
    assert all((tmp_path / name).stat().st_mtime_ns == then for name, then in times.items())
    assert make(model, tmp_path).made == 0


@pytest.mark.parametrize("kept", [(0, 1, 3), (1, 2, 4), (0, 4), ()], ids=str)
def test_every_patch_keeps_its_place_in_its_batch(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: tuple[int, ...]
) -> None:
    """Products of few rows round by the row's place, so bytes are equal where places are."""
    places: dict[str, set[int]] = {}
    latents = PatchSampler._latents

    def noted(self: Any, batch: list[patch_files.Patch]) -> torch.Tensor:
        for place, patch in enumerate(batch):
            places.setdefault(patch.name, set()).add(place)
        return latents(self, batch)

    monkeypatch.setattr(PatchSampler, "_latents", noted)
    make(model, tmp_path, seeds=2)
    before = hashes(tmp_path)
    names = [patch.name for patch in patches._patches(grid_of(model), range(2))]
    removed = [number for number in range(10) if number not in kept]
    for number in removed:
        (tmp_path / f"{names[number]}.png").unlink()
    places.clear()
    assert make(model, tmp_path, seeds=2).kept == len(kept)
    assert all(number % 3 in places[names[number]] for number in removed)
    assert hashes(tmp_path) == before


def test_an_interruption_keeps_what_is_finished(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(model, tmp_path / "whole")
    calls = []
    pixels = PatchSampler._pixels

    def interrupted(self: Any, *others: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return pixels(self, *others)

    monkeypatch.setattr(PatchSampler, "_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(model, tmp_path / "stopped")
    assert len(hashes(tmp_path / "stopped")) == 3
    assert make(model, tmp_path / "stopped").made == 2
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_an_image_says_that_it_is_synthetic_and_by_which_recipe(
    model: LatentDiffusion, tmp_path: Path, format: str
) -> None:
    make(model, tmp_path, format=format)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["synthetic"] is True
    assert recipe["recipe"]["batch_size"] == 3
    path = next(path for path in tmp_path.iterdir() if "1064_2064" in path.name)
    with Image.open(path) as image:
        text = image.info["Description"] if format == "png" else image.info["comment"].decode()
        assert image.size == (PATCH_PX, PATCH_PX)
        assert image.info["dpi"][0] == pytest.approx(25400 / 0.5, rel=0.01)
    assert text.startswith("SYNTHETIC image")
    about = json.loads(text.split("\n", 1)[1])
    assert (about["x"], about["y"], about["row"], about["column"]) == (1064, 2064, 1, 1)
    assert about["recipe_hash"] == recipe["recipe_hash"]


def test_shards_are_read_as_samples_of_image_and_json(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_files, "SHARD_PATCHES", 2)
    done = make(model, tmp_path / "shards", format="shards", seeds=2)
    make(model, tmp_path / "png", seeds=2)
    assert done.made == 10
    names = [f"patches-s{seed}-{shard:06d}.tar" for seed in (0, 1) for shard in range(3)]
    assert sorted(hashes(tmp_path / "shards", "*.tar")) == names
    keys = []
    for name in names:
        with tarfile.open(tmp_path / "shards" / name) as tar:
            members = tar.getnames()
            assert [Path(member).suffix for member in members] == [".png", ".json"] * (
                len(members) // 2
            )
            for member in members[::2]:
                stem = Path(member).stem
                keys.append(stem)
                about = json.load(tar.extractfile(f"{stem}.json"))  # type: ignore[arg-type]
                assert f"_{about['x']}_{about['y']}_s{about['seed']}" in stem
                image = np.asarray(Image.open(tar.extractfile(member)))  # type: ignore[arg-type]
                alone = np.asarray(Image.open(tmp_path / "png" / f"{stem}.png"))
                assert np.array_equal(image, alone)
    assert len(set(keys)) == 10


def test_a_missing_shard_is_made_again_to_the_same_bytes(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_files, "SHARD_PATCHES", 2)
    make(model, tmp_path, format="shards")
    before = hashes(tmp_path, "*.tar")
    (tmp_path / "patches-s0-000001.tar").unlink()
    done = make(model, tmp_path, format="shards", seeds=2)
    assert (done.made, done.kept) == (2 + 5, 3)
    assert before.items() <= hashes(tmp_path, "*.tar").items()


def test_webdataset_reads_the_shards(model: LatentDiffusion, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    make(model, tmp_path, format="shards")
    data = webdataset.WebDataset(str(tmp_path / "patches-s0-000000.tar"), shardshuffle=False)
    samples = list(data.decode("rgb8").to_tuple("__key__", "png", "json"))
    assert len(samples) == 5
    assert samples[0][1].shape == (PATCH_PX, PATCH_PX, 3)


def test_batches_have_one_shape(
    model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set()
    forward = LDMDenoiser.__call__

    def noted(self: Any, x: torch.Tensor, *others: Any) -> torch.Tensor:
        shapes.add(tuple(x.shape))
        return forward(self, x, *others)

    monkeypatch.setattr(LDMDenoiser, "__call__", noted)
    make(model, tmp_path)
    assert shapes == {(3, 3, 8, 8)}


def test_another_recipe_needs_another_folder_or_overwrite(
    model: LatentDiffusion, tmp_path: Path
) -> None:
    make(model, tmp_path, seeds=2)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="were made with steps = 2, and 3 is wanted now"):
        make(model, tmp_path, steps=3)
    assert hashes(tmp_path) == before
    done = make(model, tmp_path, steps=3, overwrite=True)
    assert done.made == 5
    after = hashes(tmp_path)
    assert len(after) == 5  # none of the other recipe is left
    assert not set(after.values()) & set(before.values())
    assert json.loads((tmp_path / "recipe.json").read_text())["recipe"]["steps"] == 3


def test_other_files_of_the_folder_are_left_alone(model: LatentDiffusion, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "photo.png").write_text("mine")
    make(model, tmp_path)
    make(model, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "photo.png").read_text() == "mine"


def run(*arguments: Any) -> int:
    return main(["synthesize", *map(str, arguments)])


@pytest.fixture(scope="module")
def files(model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    model.save_pretrained(folder / "tiny", dtype="float32")
    grid_of(sf.load(folder / "tiny")).save(folder / "grid.h5")
    return folder


def test_the_command_makes_patches_and_goes_on(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        files / "grid.h5", "--patches", "--model", files / "tiny", "-o", tmp_path / "out",
        "--steps", 2, "--seeds", 2, "--format", "jpeg", "--quality", 80,
    )  # fmt: skip
    assert run(*arguments) == 0
    assert "10 patches of 32 x 32 px at 0.5 um" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 10
    assert run(*arguments) == 0
    assert "0 patches of 32 x 32 px at 0.5 um; 10 were there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--patches", "--stride", 4), "--stride is for large images"),
        (("--patches", "--codec", "jpeg"), "--codec is for large images"),
        (("--seeds", 2), "--seeds is for --patches"),
        (("--patches", "--seeds", 0), "0 is not in the range"),
    ],
)
def test_options_that_would_not_be_used_are_refused(
    files: Path, options: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files / "grid.h5", *options) == 2
    assert message in capsys.readouterr().err
