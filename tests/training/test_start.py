# SPDX-License-Identifier: Apache-2.0
"""Runs that go on with a whole model, and the model with what they made better."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ssldiff_fast as sf
from ssldiff_fast.cli.train import command
from ssldiff_fast.models.autoencoder import AutoencoderKL
from ssldiff_fast.training.data import PatchPool
from ssldiff_fast.training.folder import averaged_weights, recorded_recipe
from ssldiff_fast.training.ldm import load_ldm, load_tuned, train_ldm
from ssldiff_fast.training.recipe import VAERecipe, read_run
from ssldiff_fast.training.vae import load_vae, train_vae
from tiny_training import FIT, LDM, Workshop, write_recipe

QUIET: dict[str, Any] = {"progress": False}
LDM_MORE: dict[str, Any] = {"data": "data.yaml", "name": "tiny-more", "patches": 4, "fit": FIT}
DECODER: dict[str, Any] = {
    "data": "data.yaml",
    "crop_px": 16,
    "unquantised_steps": 0,
    "decoder_only": True,
    "fixed_share": 0.5,
    "fit": FIT,
}


@pytest.fixture(scope="module")
def tuned(trained: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and both runs that started from it."""
    folder = tmp_path_factory.mktemp("tuned")
    model = load_ldm(trained.recipe("ldm"), trained.run("ldm"), **trained.parts)
    model.save_pretrained(folder / "start", dtype="float16")
    train_ldm(more(trained, folder), trained.root, folder / "ldm", start=folder / "start", **QUIET)
    train_vae(
        decoder(trained, folder), trained.root, folder / "vae", start=folder / "start", **QUIET
    )
    return folder


def more(shop: Workshop, folder: Path, **changes: Any) -> Path:
    return _recipe(shop, folder / "ldm-more.yaml", {**LDM_MORE, **changes})


def decoder(shop: Workshop, folder: Path, **changes: Any) -> Path:
    return _recipe(shop, folder / "decoder.yaml", {**DECODER, **changes})


def _recipe(shop: Workshop, path: Path, recipe: dict[str, Any]) -> Path:
    shutil.copy(shop.root / "data.yaml", path.parent)
    return write_recipe(path, recipe)


def test_the_tuned_model_has_what_was_trained_and_the_rest_bit_for_bit(
    tuned: Path, tmp_path: Path
) -> None:
    start = sf.load(tuned / "start")
    model = load_tuned(tuned / "start", ldm_folder=tuned / "ldm", vae_folder=tuned / "vae")
    model.save_pretrained(tmp_path / "model", dtype="float16")
    again = sf.load(tmp_path / "model")
    before, after = start.published_state_dict(), again.published_state_dict()
    settled = ("encoder.", "first_stage_model.encoder.", "first_stage_model.qu")
    assert sum(name.startswith(settled) for name in before) > 20
    changed = set()
    for name, value in before.items():
        if name.startswith(settled):
            assert torch.equal(value, after[name]), name
        elif not torch.equal(value, after[name]):
            changed.add(".".join(name.split(".")[:2]))
    assert {"first_stage_model.decoder", "model.diffusion_model"} <= changed
    assert again.scale_factor == start.scale_factor
    assert again.encoder_spec == start.encoder_spec
    assert again.name == "tiny-more"
    assert not start.statistics
    assert set(again.statistics) == set(model.statistics)
    assert again.statistics


def test_a_teacher_is_followed_instead_of_the_images(
    trained: Workshop, tuned: Path, tmp_path: Path
) -> None:
    """Its pictures are brighter by more than images can be."""
    model = sf.load(tuned / "start")
    _, images = read_run(decoder(trained, tmp_path), VAERecipe)
    patches = PatchPool(images, trained.root).sample(16, 16, seed=0, device="cpu")
    with torch.no_grad():
        latent, _ = model.vae.quantize(model.vae.encode(patches))
        model.vae.decoder.conv_out.bias.add_(2.0)
        wanted = model.vae.decode(latent, quantize=False)
    model.save_pretrained(tmp_path / "bright")
    fit = {**FIT, "steps": 60, "learning_rate": 5e-2, "warmup_steps": 1, "ema_decay": 0.5}
    away = {}
    for name, teacher in (("teacher", str(tmp_path / "bright")), ("images", None)):
        recipe = decoder(trained, tmp_path, fit=fit, teacher=teacher, colour_weight=1.0)
        vae = train_vae(recipe, trained.root, tmp_path / name, start=tuned / "start", **QUIET)
        with torch.no_grad():
            away[name] = float((vae.decode(latent, quantize=False) - wanted).abs().mean())
    assert away["images"] > 1.5
    assert away["teacher"] < 0.5


def test_a_teacher_must_have_the_same_latents(
    trained: Workshop, tuned: Path, tmp_path: Path
) -> None:
    root, run, start = trained.root, tmp_path / "run", str(tuned / "start")
    model = sf.load(start)
    with torch.no_grad():
        model.vae.quant_conv.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    for changes, error, words in (
        ({"teacher": str(tmp_path / "other")}, ValueError, r"of .*start makes other latents"),
        ({"teacher": start, "decoder_only": False}, ValueError, r"a teacher .*set decoder_only"),
        ({"teacher": "nowhere"}, FileNotFoundError, "nowhere"),
    ):
        recipe = decoder(trained, tmp_path, **changes)
        with pytest.raises(error, match=words):
            train_vae(recipe, root, run, start=start, **QUIET)
    assert not run.exists()


def test_either_run_may_be_missing(tuned: Path) -> None:
    start = sf.load(tuned / "start").published_state_dict()
    alone = load_tuned(tuned / "start", vae_folder=tuned / "vae").published_state_dict()
    for name, value in start.items():
        if not name.startswith("first_stage_model."):
            assert torch.equal(alone[name], value)
    other = load_tuned(tuned / "start", ldm_folder=tuned / "ldm")
    assert not other.statistics
    assert torch.equal(
        other.vae.decoder.conv_in.weight, sf.load(tuned / "start").vae.decoder.conv_in.weight
    )


def test_runs_begin_with_the_models_weights(trained: Workshop, tuned: Path, tmp_path: Path) -> None:
    """A learning rate of next to nothing leaves them there."""
    fit = {**FIT, "learning_rate": 1e-20}
    start = sf.load(tuned / "start")
    recipe = more(trained, tmp_path, fit=fit)
    made = train_ldm(recipe, trained.root, tmp_path / "a", start=tuned / "start", **QUIET)
    for part in ("unet", "conditioner"):
        for name, value in getattr(start, part).state_dict().items():
            assert torch.equal(getattr(made, part).state_dict()[name], value)
    recipe = decoder(trained, tmp_path, fit=fit)
    vae = train_vae(recipe, trained.root, tmp_path / "b", start=tuned / "start", **QUIET)
    for name, value in start.vae.state_dict().items():
        assert torch.equal(vae.state_dict()[name], value)


def test_statistics_are_measured_before_the_first_step(
    trained: Workshop, tuned: Path, tmp_path: Path
) -> None:
    recipe = decoder(trained, tmp_path, fit={**FIT, "steps": 1})
    train_vae(recipe, trained.root, tmp_path / "vae", start=tuned / "start", **QUIET)
    assert averaged_weights(tmp_path / "vae")["population.updates"] > 1
    # A start that has some goes on from them.
    model = load_tuned(tuned / "start", vae_folder=tuned / "vae")
    model.save_pretrained(tmp_path / "model")
    train_vae(recipe, trained.root, tmp_path / "more", start=str(tmp_path / "model"), **QUIET)
    assert averaged_weights(tmp_path / "more")["population.updates"] > 40


def test_recorded_recipes_are_whole(tuned: Path) -> None:
    recipe = recorded_recipe(tuned / "ldm")
    assert recipe is not None
    assert yaml.safe_load(recipe.read_text())["unet"]["context_dim"] == 16
    recipe = recorded_recipe(tuned / "vae")
    assert recipe is not None
    assert load_vae(recipe, tuned / "vae").config()["n_embed"] == 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": [16, 16]}, r"window is not that of .*leave window out"),
        ({"unet": {**LDM["unet"], "num_res_blocks": 2}}, "num_res_blocks is 2, not 1"),
        ({"unet": {"colour": 3, "context_dim": 16}}, "colour"),
        ({"prediction": "eps"}, r"'eps', not 'v'"),
        ({"schedule": {"zero_terminal_snr": False}}, "zero_terminal_snr is False, not True"),
    ],
)
def test_another_kind_of_model_is_refused_before_anything_is_made(
    trained: Workshop, tuned: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    recipe = more(trained, tmp_path, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        train_ldm(recipe, trained.root, tmp_path / "run", start=tuned / "start", **QUIET)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_a_start_cannot_be_is_said_in_a_sentence(
    trained: Workshop, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, start = more(trained, tmp_path), tuned / "start"
    root, run = trained.root, tmp_path / "run"
    with pytest.raises(ValueError, match=r"has no window.*with --start"):
        train_ldm(recipe, root, run, **trained.parts, **QUIET)
    with pytest.raises(ValueError, match="leave out --vae and --encoder"):
        train_ldm(recipe, root, run, start=start, **trained.parts, **QUIET)
    with pytest.raises(ValueError, match="or a whole model with --start"):
        train_ldm(recipe, root, run, **QUIET)
    with pytest.raises(FileNotFoundError, match="nor a bundled model"):
        train_ldm(recipe, root, run, start="no-such-model", **QUIET)
    with pytest.raises(ValueError, match=r"n_embed is not that of .*32, not 16"):
        train_vae(decoder(trained, tmp_path, n_embed=32), root, run, start=start, **QUIET)
    recipe = decoder(trained, tmp_path, decoder_only=False)
    with pytest.raises(ValueError, match="has no ddconfig"):
        train_vae(recipe, root, run, **QUIET)
    model = sf.load(start)
    model.conditioner = None
    monkeypatch.setattr("ssldiff_fast.training.start.load", lambda *_, **__: model)
    with pytest.raises(ValueError, match="not conditioned on embeddings"):
        train_ldm(more(trained, tmp_path), root, run, start=start, **QUIET)
    kl = {**model.vae.config(), "ddconfig": {**model.vae.ddconfig, "double_z": True}}
    kl.pop("n_embed")
    model.vae = AutoencoderKL(**kl)
    with pytest.raises(ValueError, match="is a AutoencoderKL, but"):
        train_vae(decoder(trained, tmp_path), root, run, start=start, **QUIET)
    assert not run.exists()


def test_runs_of_another_model_are_refused(trained: Workshop, tuned: Path, tmp_path: Path) -> None:
    model = sf.load(tuned / "start")
    with torch.no_grad():
        model.vae.quant_conv.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="makes other latents"):
        load_tuned(tmp_path / "other", vae_folder=tuned / "vae")
    with pytest.raises(ValueError, match="what another autoencoder made"):
        load_tuned(tmp_path / "other", ldm_folder=tuned / "ldm")
    with pytest.raises(FileNotFoundError, match="records no recipe"):
        load_tuned(tuned / "start", vae_folder=tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(tuned / "ldm", folder)
    (folder / "latents.json").unlink()
    with pytest.raises(ValueError, match=r"latents\.json is missing"):
        load_tuned(tuned / "start", ldm_folder=folder)


def test_the_command_line_puts_a_tuned_model_together(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model"
    runs = ["--ldm", str(tuned / "ldm"), "--vae", str(tuned / "vae")]
    command.main(
        ["export", "--start", str(tuned / "start"), *runs, "-o", str(target)],
        standalone_mode=False,
    )
    assert sf.load(target).statistics
    assert "model 'tiny-more'" in capsys.readouterr().out
