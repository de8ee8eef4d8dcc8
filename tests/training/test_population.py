# SPDX-License-Identifier: Apache-2.0
"""Statistics over all that an autoencoder is trained on, and decoding with them."""

from __future__ import annotations

import pytest
import torch

from ssldiff_fast.models.autoencoder import VQModel
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.local_autoencoder import norm_names
from ssldiff_fast.training.folder import averaged_weights
from ssldiff_fast.training.ldm import load_ldm
from ssldiff_fast.training.population import PopulationStatistics
from ssldiff_fast.training.recipe import VAERecipe, read_recipe
from ssldiff_fast.training.vae import VAETask, load_vae_statistics, train_vae
from tiny_training import VAE, Workshop


def autoencoder() -> VQModel:
    torch.manual_seed(0)
    return VQModel(ddconfig=VAE["ddconfig"], n_embed=16, embed_dim=3)


def latents(seed: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) + seed


def inputs_of_norms(model: VQModel, z: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each norm of the decoder sees, [B, G, values]."""
    seen: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(
            lambda _, x, name=name: seen.update({name: x[0].detach().unflatten(1, (32, -1))})
        )
        for name in norm_names(model, "decoder.")
    ]
    model.decode(z)
    for handle in handles:
        handle.remove()
    return {name: x.flatten(2) for name, x in seen.items()}


def test_statistics_are_those_of_all_values_of_a_batch_together() -> None:
    model = autoencoder()
    population = PopulationStatistics(model)
    with population.watch():
        model.decode(latents(0))
    for name, given in population.by_name().items():
        values = inputs_of_norms(model, latents(0))[name].transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(given.mean[0].double(), values.mean(1), rtol=1e-4, atol=1e-5)
        variance = values.var(1, unbiased=False)
        torch.testing.assert_close(given.variance[0].double(), variance, rtol=1e-4, atol=1e-5)


def test_the_first_steps_count_alike_and_their_means_add_to_the_variance() -> None:
    model = autoencoder()
    population = PopulationStatistics(model)
    for seed in range(4):
        with population.watch():
            model.decode(latents(seed))
    together = inputs_of_norms(model, torch.cat([latents(seed) for seed in range(4)]))
    for name, given in population.by_name().items():
        values = together[name].transpose(0, 1).flatten(1)
        torch.testing.assert_close(given.mean[0], values.mean(1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            given.variance[0], values.var(1, unbiased=False), rtol=1e-3, atol=1e-4
        )


def test_a_single_image_decodes_the_same_with_its_own_statistics_fixed() -> None:
    """So each norm got the statistics that are its own."""
    model = autoencoder()
    population = PopulationStatistics(model)
    with torch.no_grad():
        with population.watch():
            own = model.decode(latents(1, count=1))
        fixed = population.fixed().decode(latents(1, count=1))
    torch.testing.assert_close(fixed, own, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(population.fixed().decode(latents(2)), model.decode(latents(2)))


def test_the_fixed_network_has_the_parameters_of_the_other_also_after_they_move() -> None:
    model = autoencoder()
    population = PopulationStatistics(model)
    assert not list(population.parameters())
    assert {name for name, _ in population.named_buffers()} == {"mean", "variance", "updates"}
    model.to(torch.float32, memory_format=torch.channels_last)
    fixed = population.fixed()
    with torch.no_grad():
        model.decoder.conv_out.weight.zero_()
        model.decoder.conv_out.bias.fill_(2)
        assert (fixed.decode(latents(0)) == 2).all()
    fixed.decode(latents(0)).sum().backward()
    assert model.decoder.conv_out.bias.grad is not None
    norms = [m for m in model.decoder.modules() if isinstance(m, GroupNormSiLU)]
    assert all(norm.weight.grad is not None for norm in norms)


def fixed_recipe(shop: Workshop, **more: object) -> VAERecipe:
    return read_recipe(shop.recipe("vae", fixed_share=0.5, **more), VAERecipe)


def test_the_loss_has_both_ways_and_what_they_differ_by(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = VAETask(fixed_recipe(shop, agreement_weight=3.0))
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    z = task.model.encode(x)
    population = task.population
    assert population is not None
    with population.watch():
        own = task.model.decode(z, quantize=False)
    fixed = population.fixed().decode(z[:2], quantize=False)
    expected = (
        0.5 * (task._reconstruction(own, x) + task._reconstruction(fixed, x[:2]))
        + 3 * (own[:2] - fixed).abs().mean()
    )
    monkeypatch.setattr(VAETask, "logs", False)
    loss = task._with_fixed(task._reconstruction(own, x), own, z, x)
    torch.testing.assert_close(loss, expected)


def test_a_run_brings_both_ways_together(shop: Workshop) -> None:
    changes = {"fit__steps": 30, "unquantised_steps": 1, "fit__learning_rate": 2e-3}
    apart = {}
    for weight in (0.0, 10.0):
        recipe = shop.recipe("vae", fixed_share=1.0, agreement_weight=weight, **changes)
        folder = shop.run(f"vae{weight}")
        train_vae(recipe, shop.root, folder, progress=False)
        task = VAETask(read_recipe(recipe, VAERecipe))
        task.load_state_dict(averaged_weights(folder))
        x = torch.rand(4, 3, 16, 16) * 2 - 1
        with torch.no_grad():
            z, _ = task.model.quantize(task.model.encode(x))
            assert task.population is not None
            own, fixed = (n.decode(z) for n in (task.model, task.population.fixed()))
        apart[weight] = float((own - fixed).abs().mean())
    assert apart[10.0] < 0.5 * apart[0.0]


def test_statistics_of_a_run_travel_to_the_model(trained: Workshop) -> None:
    recipe = trained.recipe("vae", fixed_share=0.5)
    parts = {**trained.parts, "vae_folder": trained.run("vae-fixed"), "vae_recipe": recipe}
    train_vae(recipe, trained.root, parts["vae_folder"], progress=False)
    statistics = load_vae_statistics(recipe, parts["vae_folder"])
    assert list(statistics) == norm_names(autoencoder(), "decoder.")
    assert any(bool((given.mean != 0).any()) for given in statistics.values())
    model = load_ldm(trained.recipe("ldm"), trained.run("ldm"), **parts)
    for name, given in statistics.items():
        assert torch.equal(model.statistics[name].mean, given.mean)
    assert load_vae_statistics(trained.recipe("vae"), trained.run("vae")) == {}
