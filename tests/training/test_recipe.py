# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssldiff_fast.training.recipe import (
    DataRecipe,
    EncoderRecipe,
    LDMRecipe,
    VAERecipe,
    find_recipe,
    read_recipe,
    read_run,
)
from tiny_training import DATA, ENCODER, LDM, VAE, changed, write_recipe

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "data": (DataRecipe, DATA),
    "vae": (VAERecipe, VAE),
    "encoder": (EncoderRecipe, ENCODER),
    "ldm": (LDMRecipe, LDM),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("he-demo", DataRecipe),
        ("he-demo-vae", VAERecipe),
        ("he-demo-encoder", EncoderRecipe),
        ("he-demo-ldm", LDMRecipe),
        ("he-demo-decoder-more", VAERecipe),
        ("he-demo-ldm-more", LDMRecipe),
    ],
)
def test_bundled_recipes_are_found_by_name_and_are_valid(name: str, kind: Any) -> None:
    assert read_recipe(name, kind)
    if kind is not DataRecipe:
        assert read_run(name, kind)[1].sources


def test_the_demo_region_and_the_files_set_aside_are_in_the_bundled_recipe() -> None:
    sources = read_recipe("he-demo", DataRecipe).sources
    assert any(source.exclude for source in sources if "CMU-1" in source.files)
    assert sum(len(source.holdout) for source in sources) >= 10


def test_a_file_comes_before_a_bundled_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path / "he-demo", DATA)
    monkeypatch.chdir(tmp_path)
    assert find_recipe("he-demo") == Path("he-demo")


def test_images_are_looked_for_beside_the_recipe_that_names_them(tmp_path: Path) -> None:
    write_recipe(tmp_path / "data.yaml", changed(DATA, mpp=0.25))
    recipe, images = read_run(write_recipe(tmp_path / "vae.yaml", VAE), VAERecipe)
    assert recipe.n_embed == 16
    assert images.mpp == 0.25


def test_an_unknown_recipe_names_the_bundled_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a file nor one of .*he-demo-encoder"):
        find_recipe("nothing-like-it")


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("vae", {"fit__steps": 0}, "fit.steps"),
        ("vae", {"fit__learning_rate": float("nan")}, "fit.learning_rate"),
        ("vae", {"fit__precision": "16"}, "fit.precision"),
        ("vae", {"fit__seed": -1}, "fit.seed"),
        ("vae", {"n_embed": 1}, "n_embed"),
        ("vae", {"colour": "red"}, "colour: Extra inputs"),
        ("encoder", {"std": [0.2, 0.0, 0.2]}, "std.1"),
        ("encoder", {"mean": [0.2]}, "mean"),
        ("ldm", {"prediction": "noise"}, "prediction"),
        ("ldm", {"drop_condition": 1}, "drop_condition"),
        ("ldm", {"unet": {"in_channels": 3}}, "context_dim is missing"),
        ("data", {"sources": []}, "sources"),
        ("data", {"scales": []}, "scales"),
        ("data", {"scales": [-1]}, "scales.0"),
        ("data", {"sources": [{"files": "/etc/*.png", "mpp": 0.5}]}, "must lie below the folder"),
        ("data", {"sources": [{"files": "../*.png", "mpp": 0.5}]}, "must lie below the folder"),
        ("data", {"sources": [{"files": "", "mpp": 0.5}]}, "sources.0.files"),
        ("data", {"sources": [{"files": "a", "mpp": 0}]}, "sources.0.mpp"),
        ("data", {"sources": [{"files": "a", "mpp": 1, "exclude": [[0, 0, 0, 4]]}]}, "exclude.0.2"),
    ],
)
def test_the_first_wrong_entry_is_named(
    tmp_path: Path, kind: str, changes: dict[str, Any], words: str
) -> None:
    model, recipe = KINDS[kind]
    path = write_recipe(tmp_path / "recipe.yaml", changed(recipe, **changes))
    with pytest.raises(ValueError, match=words) as caught:
        read_recipe(path, model)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["fit: [", "just words", "", "- a\n- b", "\x00"])
def test_a_file_that_is_no_recipe_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe .*recipe\.yaml") as caught:
        read_recipe(path, VAERecipe)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="is not YAML"):
        read_recipe(path, VAERecipe)


def test_the_recipe_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="EncoderRecipe has the entries"):
        read_recipe("he-demo-vae", EncoderRecipe)
