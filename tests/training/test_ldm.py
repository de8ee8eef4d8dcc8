# SPDX-License-Identifier: Apache-2.0
"""Latents prepared beforehand, the diffusion model's training, and the finished model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ssldiff_fast as sf
from ssldiff_fast.training import latents as latents_module
from ssldiff_fast.training.data import PatchPool
from ssldiff_fast.training.encoder import load_encoder
from ssldiff_fast.training.latents import LatentBatches, LatentCache, prepare_latents
from ssldiff_fast.training.ldm import LDMTask, build_model, load_ldm, train_ldm
from ssldiff_fast.training.recipe import LDMRecipe, read_recipe, read_run
from ssldiff_fast.training.vae import load_vae
from tiny_training import PATCH_PX, Workshop


def prepare(shop: Workshop, folder: Path, **changes: Any) -> LatentCache:
    recipe, images = read_run(shop.recipe("ldm"), LDMRecipe)
    arguments: dict[str, Any] = {
        "pool": PatchPool(images, shop.root),
        "vae": load_vae(shop.recipe("vae"), shop.run("vae")),
        "encoder": load_encoder(shop.recipe("encoder"), shop.run("encoder")),
        "count": recipe.patches,
        "seed": 3,
        "progress": False,
        **changes,
    }
    return prepare_latents(folder=folder, **arguments)


def test_latents_and_embeddings_are_those_of_the_same_patches(
    trained: Workshop, tmp_path: Path
) -> None:
    cache = prepare(trained, tmp_path)
    assert cache.latents.shape == (6, 3, 8, 8)
    assert cache.embeddings.shape == (6, 1, 12)
    pool = PatchPool(read_run(trained.recipe("ldm"), LDMRecipe)[1], trained.root)
    x = pool.sample(6, PATCH_PX, seed=3)
    vae = load_vae(trained.recipe("vae"), trained.run("vae"))
    encoder = load_encoder(trained.recipe("encoder"), trained.run("encoder"))
    with torch.no_grad():
        expected = vae.encode(x)
    torch.testing.assert_close(
        torch.from_numpy(cache.latents).float(), expected, rtol=2e-3, atol=2e-3
    )
    torch.testing.assert_close(
        torch.from_numpy(cache.embeddings).float(), encoder((x + 1) / 2), rtol=2e-3, atol=2e-3
    )


def test_latents_are_made_once_and_again_only_when_something_changed(
    trained: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = latents_module._encode_all

    def counted(*args: Any, **named: Any) -> None:
        made.append(1)
        original(*args, **named)

    monkeypatch.setattr(latents_module, "_encode_all", counted)
    first = prepare(trained, tmp_path)
    again = prepare(trained, tmp_path)
    assert len(made) == 1
    assert np.array_equal(first.latents, again.latents)
    other = load_vae(trained.recipe("vae"), trained.run("vae"))
    with torch.no_grad():
        other.quant_conv.weight.mul_(2)
    for count, changes in enumerate(({"seed": 4}, {"count": 5}, {"vae": other}), start=2):
        prepare(trained, tmp_path, **changes)
        assert len(made) == count
    (tmp_path / "latents.json").write_text("{cut off")
    prepare(trained, tmp_path)
    assert len(made) == 5


def test_latents_that_were_not_finished_are_made_again(
    trained: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PatchPool, "patches", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(trained, tmp_path)
    assert not (tmp_path / "latents.json").exists()
    assert prepare(trained, tmp_path).latents.any()


def test_a_trained_model_is_not_put_on_latents_of_another_autoencoder(
    trained: Workshop, tmp_path: Path
) -> None:
    folder = tmp_path / "ldm"
    shutil.copytree(trained.run("ldm"), folder)
    settings = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps({**settings, "vae": "another"}))
    recipe = trained.recipe("ldm", fit__steps=6)
    with pytest.raises(ValueError, match="trained on latents of another autoencoder"):
        train_ldm(recipe, trained.root, folder, **trained.parts, resume=True, progress=False)


def test_batches_keep_latents_and_embeddings_together() -> None:
    numbers = np.arange(50, dtype=np.float16)
    cache = LatentCache(numbers.reshape(-1, 1, 1, 1), numbers.reshape(-1, 1, 1))
    stream = iter(LatentBatches(cache, batch_size=8, seed=0))
    latents, embeddings = next(stream)
    assert latents.dtype == embeddings.dtype == torch.float32
    assert torch.equal(latents.flatten(), embeddings.flatten())
    later = next(iter(LatentBatches(cache, batch_size=8, seed=0, start=9)))
    assert not torch.equal(later[0], latents)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_is_the_distance_to_what_the_network_predicts(
    trained: Workshop, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that knows the answer has no loss."""
    recipe = read_recipe(trained.recipe("ldm", prediction=prediction), LDMRecipe)
    model = build_model(
        recipe,
        load_vae(trained.recipe("vae"), trained.run("vae")),
        load_encoder(trained.recipe("encoder"), trained.run("encoder")),
    )
    model.scale_factor = 0.5
    task = LDMTask(recipe, model)
    latents = torch.randn(4, 3, 8, 8)

    def knowing(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        abar = task.schedule.alphas_cumprod.float()[t].view(-1, 1, 1, 1)
        x0 = latents * 0.5
        noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        return {"eps": noise, "x0": x0, "v": abar.sqrt() * noise - (1 - abar).sqrt() * x0}[
            prediction
        ]

    monkeypatch.setattr(task.unet, "forward", knowing)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    loss = task.training_step((latents, torch.randn(4, 1, 12)), 0)
    assert float(loss) < 1e-4


def test_the_embedding_is_dropped_about_as_often_as_the_recipe_says(
    trained: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(trained.recipe("ldm", drop_condition=0.25), LDMRecipe)
    model = load_ldm(trained.recipe("ldm"), trained.run("ldm"), **trained.parts)
    task = LDMTask(recipe, model)
    null = model.conditioner(torch.zeros(1, 1, 12))[0]
    dropped: list[bool] = []

    def look(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        dropped.extend(bool(torch.equal(tokens, null)) for tokens in context)
        return x

    monkeypatch.setattr(task.unet, "forward", look)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    task.training_step((torch.zeros(800, 3, 8, 8), torch.randn(800, 1, 12)), 0)
    assert 0.18 < sum(dropped) / 800 < 0.32


def test_the_latents_of_a_canvas_have_unit_deviation(trained: Workshop) -> None:
    model = load_ldm(trained.recipe("ldm"), trained.run("ldm"), **trained.parts)
    latents = np.load(trained.run("ldm") / "latents.npy").astype(np.float32)
    assert model.scale_factor * latents.std() == pytest.approx(1, rel=1e-3)


def test_an_exported_model_loads_and_gives_the_same(trained: Workshop, tmp_path: Path) -> None:
    model = load_ldm(trained.recipe("ldm"), trained.run("ldm"), **trained.parts)
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "half", dtype="float16")
    full, half = sf.load(tmp_path / "full"), sf.load(tmp_path / "half")
    model.unet.to(memory_format=torch.channels_last)  # as loading leaves it, for equal bits
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    patches = torch.randint(0, 256, (2, PATCH_PX, PATCH_PX, 3), dtype=torch.uint8)
    with torch.no_grad():
        for again, tolerance in ((full, 0.0), (half, 2e-2)):
            context = model.conditioner(model.encoder(patches))
            mine = model.unet(x, t, context)
            theirs = again.unet(x, t, again.conditioner(again.encoder(patches)))
            torch.testing.assert_close(theirs, mine, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(
                again.vae.encode(x[..., :8]),
                model.vae.encode(x[..., :8]),
                rtol=tolerance,
                atol=tolerance,
            )
            assert again.scale_factor == model.scale_factor
            assert (again.prediction, again.window, again.name) == ("v", (8, 8), "tiny")


def test_the_encoders_hash_is_the_same_through_training_saving_and_loading(
    trained: Workshop, tmp_path: Path
) -> None:
    """Grids name it, so a grid made before a model was exported still fits the model."""
    first = load_encoder(trained.recipe("encoder"), trained.run("encoder")).spec.weights_hash
    model = load_ldm(trained.recipe("ldm"), trained.run("ldm"), **trained.parts)
    model.save_pretrained(tmp_path / "model", dtype="float16")
    again = sf.load(tmp_path / "model")
    assert again.encoder_spec is not None
    assert first == again.encoder_spec.weights_hash == again.encoder.spec.weights_hash
    assert torch.equal(
        again.encoder(np.zeros((1, PATCH_PX, PATCH_PX, 3), np.uint8)),
        model.encoder(np.zeros((1, PATCH_PX, PATCH_PX, 3), np.uint8)),
    )


def test_a_run_goes_on(trained: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "ldm"
    shutil.copytree(trained.run("ldm"), folder)
    longer = trained.recipe("ldm", fit__steps=6)
    model = train_ldm(longer, trained.root, folder, **trained.parts, resume=True, progress=False)
    loaded = load_ldm(longer, folder, **trained.parts)
    assert all(torch.equal(a, b) for a, b in zip(model.unet.parameters(), loaded.unet.parameters()))
    before = load_ldm(trained.recipe("ldm"), trained.run("ldm"), **trained.parts)
    changed = [
        not torch.equal(a, b) for a, b in zip(before.unet.parameters(), loaded.unet.parameters())
    ]
    assert any(changed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": [16, 16]}, r"set window to \[8, 8\]"),
        ({"unet__in_channels": 4}, "4 input"),
        ({"unet__colour": 4}, "colour"),
        ({"schedule": {"betas": "wavy"}}, "wavy"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_latents_are_made(
    trained: Workshop, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train_ldm(
            trained.recipe("ldm", **changes),
            trained.root,
            tmp_path / "ldm",
            **trained.parts,
            progress=False,
        )
    assert not (tmp_path / "ldm").exists()


def test_a_folder_of_another_run_is_named(trained: Workshop) -> None:
    with pytest.raises(ValueError, match="not those of the recipe"):
        load_ldm(trained.recipe("ldm"), trained.run("vae"), **trained.parts)
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt does not exist"):
        load_ldm(trained.recipe("ldm"), trained.root, **trained.parts)


def test_latents_without_any_spread_are_an_error(
    trained: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = LatentCache(np.zeros((4, 3, 8, 8), np.float16), np.zeros((4, 1, 12), np.float16))
    monkeypatch.setattr("ssldiff_fast.training.ldm.prepare_latents", lambda *_, **__: cache)
    with pytest.raises(ValueError, match="standard deviation of 0"):
        train_ldm(trained.recipe("ldm"), trained.root, tmp_path, **trained.parts, progress=False)
