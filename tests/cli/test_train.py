# SPDX-License-Identifier: Apache-2.0
"""`ssldiff train`, through the command line: from images to a model that loads."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import ssldiff_fast as sf
from ssldiff_fast.cli import main
from tiny_training import PATCH_PX, RECIPES, Workshop, make_workshop


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return make_workshop(tmp_path)


def train(shop: Workshop, kind: str, *more: str) -> int:
    options = ["--recipe", shop.recipe(kind), "--data", shop.root, "-o", shop.run(kind)]
    return main(["train", kind, *map(str, options), *more])


def parts(shop: Workshop) -> list[str]:
    return ["--vae", str(shop.run("vae")), "--encoder", str(shop.run("encoder"))]


def test_images_become_a_model_that_loads(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    card, model = shop.root / "card.md", shop.root / "model"
    card.write_text("# Tiny\n")
    export = ["train", "export", "--ldm", str(shop.run("ldm")), *parts(shop), "-o", str(model)]
    assert train(shop, "vae") == 0
    assert "next: ssldiff train encoder" in capsys.readouterr().out
    assert train(shop, "encoder") == 0
    assert "next: ssldiff train ldm" in capsys.readouterr().out
    assert train(shop, "ldm", *parts(shop)) == 0
    assert "next: ssldiff train export" in capsys.readouterr().out
    assert main([*export, "--card", str(card)]) == 0
    assert f"{model}: model 'tiny'" in capsys.readouterr().out
    assert sorted(p.name for p in model.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (model / "README.md").read_text() == "# Tiny\n"
    loaded = sf.load(model)
    assert loaded.encoder.spec.name == "tiny-encoder"
    context = loaded.conditioner(torch.randn(1, 1, 12))
    with torch.no_grad():
        out = loaded.unet(torch.randn(1, 3, 8, 8), torch.tensor([5]), context)
    assert bool(out.isfinite().all())
    assert main(export) == 2
    assert "already holds config.json" in capsys.readouterr().err
    assert main([*export, "--overwrite"]) == 0


def test_ctrl_c_says_how_to_go_on_and_resume_does(
    shop: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssldiff_fast.training.folder import read_checkpoint
    from ssldiff_fast.training.vae import VAETask

    original = VAETask.training_step

    def interrupted(self: VAETask, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VAETask, "training_step", interrupted)
        assert train(shop, "vae") == 130
    said = capsys.readouterr().err
    assert f"interrupted, and saved in {shop.run('vae')}" in said
    assert "--resume to go on" in said
    assert "Traceback" not in said
    assert read_checkpoint(shop.run("vae"))["global_step"] == 3
    assert train(shop, "vae") == 2
    assert "add --resume to go on from it" in capsys.readouterr().err
    assert train(shop, "vae", "--resume") == 0
    assert read_checkpoint(shop.run("vae"))["global_step"] == 4


def test_ctrl_c_before_the_first_step_says_that_nothing_is_saved(
    shop: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssldiff_fast.training.vae.run", stop)
    assert train(shop, "vae") == 130
    assert "before anything was trained" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["lightning", "pydantic"])
def test_without_the_extra_the_message_names_it(
    shop: Workshop,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    for name in [name for name in sys.modules if name.startswith("ssldiff_fast.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sf, "training", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert train(shop, "vae") == 2
    said = capsys.readouterr().err
    assert f"training needs {missing}" in said
    assert "pip install 'ssldiff_fast[train]'" in said
    assert len(said.strip().splitlines()) == 1
    assert main(["train", "vae", "--help"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "vae", "-o", "run"], "--data"),
        (["train", "vae", "--data", "nowhere", "-o", "run"], "no folder nowhere"),
        (["train", "vae", "--data", ".", "-o", "run", "--recipe", "x"], "recipe 'x' is neither"),
        (["train", "vae", "--data", ".", "-o", "run"], "matches no file under"),
        (["train", "vae", "--data", ".", "-o", "vae.yaml"], "is a file"),
        (["train", "ldm", "--data", ".", "-o", "run", "--vae", "v"], "--encoder"),
        (["train", "pipeline"], "No such command"),
        (
            ["train", "ldm", "--data", ".", "-o", "run", "--vae", "v", "--encoder", "e"],
            "last.ckpt does not exist",
        ),
        (
            ["train", "export", "--ldm", "l", "--vae", "v", "--encoder", "e", "-o", "m"],
            "last.ckpt does not exist",
        ),
        (
            [
                "train",
                "export",
                "--ldm",
                "l",
                "--vae",
                "v",
                "--encoder",
                "e",
                "-o",
                "m",
                "--card",
                "nothing.md",
            ],
            "nothing.md does not exist",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    shop: Workshop,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(shop.root)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not Path("run").exists()
    assert not Path("m").exists()


def test_options_accept_underscores(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(shop.root), "-o", str(shop.run("ldm")), *parts(shop)]
    assert main(["train", "ldm", *options, "--vae_recipe", "no-such-recipe"]) == 2
    assert "recipe 'no-such-recipe' is neither" in capsys.readouterr().err


def test_one_command_trains_all_within_its_time_and_looks_at_the_model(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps that would take hours, so that the time alone ends them."""
    data = yaml.safe_load((shop.root / "data.yaml").read_text())
    data["sources"][0]["holdout"] = ["1.png"]
    (shop.root / "data.yaml").write_text(yaml.safe_dump(data))
    recipes = []
    for kind, more in (("vae", {"fixed_share": 0.5}), ("encoder", {}), ("ldm", {})):
        changes = {"fit__steps": 100_000, "fit__save_every_steps": 10_000, **more}
        if "unquantised_steps" in RECIPES[kind]:
            changes["unquantised_steps"] = 40_000
        path = shop.recipe(kind, **changes)
        recipes += [f"--{kind}-recipe", str(path)]
    out = shop.root / "all"
    arguments = ["train", "all", "--data", str(shop.root), "-o", str(out), *recipes]
    assert main([*arguments, "--minutes", "0.3"]) == 0
    said = capsys.readouterr()
    assert "all/model: trained." in said.out
    model = sf.load(out / "model")
    assert model.statistics
    assert model.preview is not None
    figures = json.loads((out / "look.json").read_text())
    assert figures["psnr_fixed"] > 0
    assert figures["grey_levels_apart"] > 0
    assert -1 <= figures["similarity"] <= 1
    picture = Image.open(out / "look.png")
    assert picture.size == (4 * PATCH_PX, 8 * PATCH_PX)
    assert len({pixel for _, pixel in picture.getcolors(1 << 20)}) > 100
    assert main(arguments) == 2
    assert "add --resume" in capsys.readouterr().err
