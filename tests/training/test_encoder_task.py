# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from ssldiff_fast.training.encoder import EncoderTask, degrade, load_encoder, spec_of, train_encoder
from ssldiff_fast.training.recipe import EncoderRecipe, read_recipe
from ssldiff_fast.training.vae import load_vae
from tiny_training import PATCH_PX, Workshop


def test_a_trained_encoder_is_the_one_that_loads(shop: Workshop) -> None:
    trained = train_encoder(shop.recipe("encoder"), shop.root, shop.run("encoder"), progress=False)
    loaded = load_encoder(shop.recipe("encoder"), shop.run("encoder"))
    patches = torch.randint(0, 256, (2, PATCH_PX, PATCH_PX, 3), dtype=torch.uint8)
    assert trained.spec == loaded.spec
    assert torch.equal(trained(patches), loaded(patches))
    assert loaded.spec.name == "tiny-encoder"
    assert loaded.spec.mpp == 0.5


def test_training_prepares_patches_as_the_encoder_does(
    trained: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches come in [-1, 1], the encoder takes bytes."""
    recipe = read_recipe(trained.recipe("encoder"), EncoderRecipe)
    encoder = load_encoder(trained.recipe("encoder"), trained.run("encoder"))
    task = EncoderTask(recipe, spec_of(recipe, 0.5))
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.randn(len(x), recipe.width)

    monkeypatch.setattr(task.network, "forward", look)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    patches = torch.randint(0, 256, (2, 2, PATCH_PX, PATCH_PX, 3), dtype=torch.uint8)
    batch = patches.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    task.training_step(batch, 0)
    monkeypatch.setattr(encoder.network, "forward", look)
    encoder(torch.cat([patches[:, 0], patches[:, 1]]))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-5)


def test_degraded_images_are_blurred_or_noisy_by_at_most_what_was_asked() -> None:
    x = torch.rand(64, 3, 16, 16) * 2 - 1
    assert torch.equal(degrade(x, 0.0, 0.0), x)
    blurred = degrade(x, 1.0, 0.0)
    assert blurred.shape == x.shape
    ratio = blurred.diff(dim=-1).abs().mean((1, 2, 3)) / x.diff(dim=-1).abs().mean((1, 2, 3))
    assert float(ratio.max()) < 1
    assert float(ratio.max() - ratio.min()) > 0.5
    noise = (degrade(x, 0.0, 0.1) - x).std(dim=(1, 2, 3))
    assert 0.05 < float(noise.max()) < 0.12
    assert float(noise.min()) < 0.03
    even = torch.full((4, 3, 8, 8), 0.5)
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(degrade(even, 1.0, 0.0)[inside], even[inside])


def test_some_second_views_go_through_the_autoencoder(trained: Workshop) -> None:
    recipe = read_recipe(trained.recipe("encoder", autoencoder_share=0.5), EncoderRecipe)
    vae = load_vae(trained.recipe("vae"), trained.run("vae"))
    task = EncoderTask(recipe, spec_of(recipe, 0.5), vae)
    x = torch.rand(4, 3, PATCH_PX, PATCH_PX) * 2 - 1
    out = task._through_autoencoder(x)
    with torch.no_grad():
        expected = vae.decode(vae.encode(x[:2])).clamp(-1, 1)
    assert torch.equal(out, torch.cat([expected, x[2:]]))
    assert not any("vae" in name or "quantize" in name for name in task.state_dict())


def test_a_recipe_that_needs_an_autoencoder_trains_with_one_and_says_so_without(
    trained: Workshop,
) -> None:
    recipe = trained.recipe("encoder", autoencoder_share=0.5)
    with pytest.raises(ValueError, match="none is given; name the folder of `train vae`"):
        train_encoder(recipe, trained.root, trained.run("other"), progress=False)
    encoder = train_encoder(
        recipe,
        trained.root,
        trained.run("other"),
        vae_folder=trained.run("vae"),
        vae_recipe=trained.recipe("vae"),
        progress=False,
    )
    assert encoder.spec.weights_hash is not None
