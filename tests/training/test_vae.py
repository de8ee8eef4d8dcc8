# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ssldiff_fast.training.callbacks import MovingAverage
from ssldiff_fast.training.recipe import VAERecipe, read_recipe
from ssldiff_fast.training.vae import VAETask, load_vae, train_vae
from tiny_training import Workshop


@pytest.fixture
def task(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> VAETask:
    """A task outside a trainer, whose step the test sets as `task.trainer.global_step`."""
    task = VAETask(read_recipe(shop.recipe("vae"), VAERecipe))
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    average = MovingAverage(0.5)
    average.average = {k: v.clone() for k, v in task.state_dict().items()}
    task._trainer = SimpleNamespace(global_step=0, callbacks=[average])  # type: ignore[assignment]
    return task


def batch() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16) * 2 - 1


def codebook(task: VAETask) -> torch.Tensor:
    return task.model.quantize.embedding.weight.detach()


def test_the_codebook_starts_from_latents_at_the_first_quantised_step(task: VAETask) -> None:
    random = codebook(task).clone()
    for step in (0, 1):
        task.trainer.global_step = step
        task.training_step(batch(), step)
        assert torch.equal(codebook(task), random)
    task.trainer.global_step = 2
    task.training_step(batch(), 2)
    assert not torch.equal(codebook(task), random)
    started = codebook(task).clone()
    average = task.trainer.callbacks[0].average  # type: ignore[attr-defined]
    assert torch.equal(average["model.quantize.embedding.weight"], started)
    task.trainer.global_step = 3
    task.training_step(batch(), 3)
    assert torch.equal(codebook(task), started)  # from here on only the optimiser changes it


def test_a_run_that_goes_on_at_the_first_quantised_step_starts_its_codebook_too(
    task: VAETask,
) -> None:
    random = codebook(task).clone()
    task.trainer.global_step = 2
    images = batch()
    task.training_step(images, 0)
    assert not torch.equal(codebook(task), random)
    with torch.no_grad():
        _, indices = task.model.quantize(task.model.encode(images))
    assert indices.unique().numel() > 8


def test_a_codebook_that_was_trained_is_not_started_again(task: VAETask) -> None:
    trained = codebook(task).clone()
    task.trainer.global_step = 3
    task.training_step(batch(), 0)
    assert torch.equal(codebook(task), trained)


def test_gradients_reach_encoder_and_decoder_before_and_the_codes_after(task: VAETask) -> None:
    task.training_step(batch(), 0).backward()
    assert task.model.quantize.embedding.weight.grad is None
    task.trainer.global_step = 2
    task.training_step(batch(), 2).backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_a_trained_autoencoder_is_the_one_that_loads(shop: Workshop) -> None:
    trained = train_vae(shop.recipe("vae"), shop.root, shop.run("vae"), progress=False)
    loaded = load_vae(shop.recipe("vae"), shop.run("vae"))
    assert not loaded.training
    assert not trained.training
    images = batch()
    with torch.no_grad():
        assert torch.equal(
            trained.decode(trained.encode(images)), loaded.decode(loaded.encode(images))
        )


def test_two_runs_of_a_recipe_are_equal(shop: Workshop) -> None:
    first, second = (
        train_vae(shop.recipe("vae"), shop.root, shop.run(name), progress=False).state_dict()
        for name in ("a", "b")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_the_decoder_only_leaves_latents_and_codes_as_they_were(shop: Workshop) -> None:
    train_vae(shop.recipe("vae"), shop.root, shop.run("vae"), progress=False)
    before = load_vae(shop.recipe("vae"), shop.run("vae"))
    recipe = shop.recipe("vae", decoder_only=True, unquantised_steps=0, colour_weight=1.0)
    train_vae(recipe, shop.root, shop.run("decoder"), start=shop.run("vae"), progress=False)
    after = load_vae(recipe, shop.run("decoder"))
    images = batch()
    with torch.no_grad():
        latents = before.encode(images)
        assert torch.equal(after.encode(images), latents)
        assert not torch.equal(after.decode(latents), before.decode(latents))
    codes = [model.quantize.embedding.weight for model in (before, after)]
    assert torch.equal(*codes)


@pytest.mark.parametrize("changes", [{}, {"unquantised_steps": 2}])
def test_a_decoder_alone_needs_something_to_start_from(
    shop: Workshop, changes: dict[str, int]
) -> None:
    recipe = shop.recipe("vae", **{"decoder_only": True, "unquantised_steps": 0, **changes})
    start = shop.run("vae") if changes else None
    with pytest.raises(ValueError, match=r"decoder only.*--start"):
        train_vae(recipe, shop.root, shop.run("decoder"), start=start, progress=False)
    assert not shop.run("decoder").exists()
