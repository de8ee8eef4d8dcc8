# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its recipe, what is damaged there, and what is refused before it is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssldiff_fast.training.encoder import load_encoder, train_encoder
from ssldiff_fast.training.folder import averaged_weights, read_checkpoint, recorded_recipe
from ssldiff_fast.training.vae import load_vae, train_vae
from tiny_training import Workshop


def test_a_run_records_its_recipe_and_loads_by_it(trained: Workshop) -> None:
    recorded = recorded_recipe(trained.run("vae"))
    assert recorded is not None
    again = load_vae(recorded, trained.run("vae"))
    first = load_vae(trained.recipe("vae"), trained.run("vae"))
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert recorded_recipe(trained.root) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_noise": 0.5}, "latent_noise 0.05, but the recipe now says 0.5"),
        ({"fit__learning_rate": 1.0}, "fit.learning_rate 0.001"),
        ({"data": "he-demo"}, "stain_jitter"),
    ],
)
def test_a_run_does_not_go_on_with_another_recipe(
    trained: Workshop, changes: dict[str, Any], words: str
) -> None:
    other = trained.recipe("vae", **changes)
    if "data" in changes:
        path = trained.root / "data-changed.yaml"
        data = {**yaml.safe_load((trained.root / "data.yaml").read_text()), "stain_jitter": 0.5}
        path.write_text(yaml.safe_dump(data))
        other = trained.recipe("vae", data=path.name)
    with pytest.raises(ValueError, match=words):
        train_vae(other, trained.root, trained.run("vae"), resume=True, progress=False)


def test_a_run_from_before_recipes_were_recorded_goes_on(trained: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    shutil.copy(trained.run("vae") / "last.ckpt", folder)
    recipe = trained.recipe("vae", fit__steps=5)
    train_vae(recipe, trained.root, folder, resume=True, progress=False)
    assert read_checkpoint(folder)["global_step"] == 5
    assert recorded_recipe(folder) is not None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"words"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.ckpt is no whole checkpoint") as caught:
        averaged_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_something_else_is_one_sentence(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="is no whole checkpoint of a training run"):
        averaged_weights(tmp_path)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run that has saved something"):
        averaged_weights(tmp_path)


def test_weights_of_another_shape_name_the_recipe_as_what_is_wrong(trained: Workshop) -> None:
    with pytest.raises(ValueError, match="not those of the recipe given") as caught:
        load_vae(trained.recipe("vae", n_embed=32), trained.run("vae"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="do not fit the encoder") as caught:
        load_encoder(trained.recipe("encoder", width=16), trained.run("encoder"))
    assert "\n" not in str(caught.value)


def test_nothing_is_written_where_the_images_are_wrong(shop: Workshop) -> None:
    for train_one, kind in ((train_vae, "vae"), (train_encoder, "encoder")):
        with pytest.raises(FileNotFoundError, match="no folder"):
            train_one(shop.recipe(kind), shop.root / "nowhere", shop.run(kind), progress=False)
        with pytest.raises(ValueError, match="no training image has room"):
            train_one(
                shop.recipe(kind, **{"crop_px" if kind == "vae" else "patch_px": 128}),
                shop.root,
                shop.run(kind),
                progress=False,
            )
        assert not shop.run(kind).exists()


def test_a_file_in_the_place_of_the_folder_is_named(shop: Workshop) -> None:
    with pytest.raises(NotADirectoryError, match="is a file; name a folder"):
        train_vae(shop.recipe("vae"), shop.root, shop.root / "vae.yaml", progress=False)


def test_a_crop_that_does_not_divide_is_named(shop: Workshop) -> None:
    with pytest.raises(ValueError, match="choose a multiple of 4"):
        train_vae(shop.recipe("vae", crop_px=18), shop.root, shop.run("vae"), progress=False)


def test_one_place_is_too_few_for_a_contrast(shop: Workshop) -> None:
    recipe = shop.recipe("encoder", fit__batch_size=1)
    with pytest.raises(ValueError, match="at least 2"):
        train_encoder(recipe, shop.root, shop.run("encoder"), progress=False)
