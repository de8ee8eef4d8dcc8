# SPDX-License-Identifier: Apache-2.0
"""Training a latent diffusion model conditioned on embeddings (the paper's section 3.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssldiff_fast.encoders.encoder import Encoder
from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.models.autoencoder import Autoencoder
from ssldiff_fast.models.conditioner import PatchConditioner
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.unet import UNet
from ssldiff_fast.training.data import PatchPool
from ssldiff_fast.training.encoder import load_encoder
from ssldiff_fast.training.fit import Task, averaged_weights, run
from ssldiff_fast.training.latents import LatentBatches, prepare_latents
from ssldiff_fast.training.recipe import DataRecipe, LDMRecipe, read_recipe
from ssldiff_fast.training.vae import load_vae


def build_model(recipe: LDMRecipe, vae: Autoencoder, encoder: Encoder) -> LatentDiffusion:
    """The whole model with an untrained U-Net and conditioner."""
    model = LatentDiffusion(
        UNet(**recipe.unet),
        vae,
        PatchConditioner(encoder.spec.width, recipe.unet["context_dim"]),
        schedule=Schedule.from_config(recipe.schedule),
        prediction=recipe.prediction,
        window=recipe.window,
        name=recipe.name,
        encoder_spec=encoder.spec,
    )
    model.encoder_weights = dict(encoder.network.state_dict())
    return model


class LDMTask(Task):
    """Denoising of latents, with the embedding dropped now and then for guidance."""

    def __init__(self, recipe: LDMRecipe, model: LatentDiffusion) -> None:
        super().__init__(recipe.fit)
        assert model.conditioner is not None
        self.recipe = recipe
        self.unet, self.conditioner = model.unet, model.conditioner
        self.schedule, self.scale_factor = model.schedule, model.scale_factor

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        latents, embeddings = batch
        x0 = (latents * self.scale_factor).contiguous()
        kept = torch.rand(len(x0), 1, 1, device=x0.device) >= self.recipe.drop_condition
        context = self.conditioner(embeddings * kept)
        t = torch.randint(0, self.schedule.num_train_timesteps, (len(x0),), device=x0.device)
        noise = torch.randn_like(x0)
        output = self.unet(self.schedule.add_noise(x0, noise, t), t, context).float()
        target = {"eps": noise, "x0": x0}.get(self.recipe.prediction)
        if target is None:
            target = self.schedule.velocity(x0, noise, t)
        loss = F.mse_loss(output, target)
        self.log("loss", loss, prog_bar=True, on_step=True)
        return loss


def train_ldm(
    recipe_name: str | Path,
    data: Path,
    folder: Path,
    *,
    vae_recipe: str | Path,
    vae_folder: Path,
    encoder_recipe: str | Path,
    encoder_folder: Path,
    resume: bool = False,
    device: str = "cpu",
    progress: bool = True,
) -> LatentDiffusion:
    """Train the diffusion model on a trained autoencoder and encoder.

    Args:
        recipe_name: a recipe file, or the name of a bundled one.
        data: the folder that the recipe's image paths are relative to.
        folder: gets the prepared latents, checkpoints and metrics.
        vae_recipe, vae_folder: what `train vae` was called with.
        encoder_recipe, encoder_folder: what `train encoder` was called with.
        resume: go on from the folder's last checkpoint.
    """
    recipe = read_recipe(recipe_name, LDMRecipe)
    vae, encoder = load_vae(vae_recipe, vae_folder), load_encoder(encoder_recipe, encoder_folder)
    _check_window(recipe, vae, encoder)
    pool = PatchPool(read_recipe(recipe.data, DataRecipe), data)
    folder.mkdir(parents=True, exist_ok=True)
    cache = prepare_latents(
        pool,
        vae,
        encoder,
        folder,
        count=recipe.patches,
        seed=recipe.fit.seed,
        progress=progress,
    )
    model = build_model(recipe, vae, encoder)
    model.scale_factor = _scale_factor(folder, cache.latents)
    batches = LatentBatches(cache, batch_size=recipe.fit.batch_size, seed=recipe.fit.seed)
    task = LDMTask(recipe, model)
    run(task, batches, folder, resume=resume, device=device, progress=progress)
    return model.eval()


def load_ldm(
    recipe_name: str | Path,
    folder: Path,
    *,
    vae_recipe: str | Path,
    vae_folder: Path,
    encoder_recipe: str | Path,
    encoder_folder: Path,
) -> LatentDiffusion:
    """The model of a run's folder with its averaged weights, also while the run goes on."""
    recipe = read_recipe(recipe_name, LDMRecipe)
    vae, encoder = load_vae(vae_recipe, vae_folder), load_encoder(encoder_recipe, encoder_folder)
    model = build_model(recipe, vae, encoder)
    model.scale_factor = float((folder / "scale_factor.txt").read_text())
    assert model.conditioner is not None
    weights = averaged_weights(folder)
    for part in ("unet", "conditioner"):
        module, prefix = getattr(model, part), f"{part}."
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        )
    return model.eval()


def _scale_factor(folder: Path, latents: Any) -> float:
    """1 / standard deviation of the latents, so that the diffusion starts from unit variance."""
    factor = 1.0 / float(latents[:4096].astype("float32").std())
    (folder / "scale_factor.txt").write_text(repr(factor))
    return factor


def _check_window(recipe: LDMRecipe, vae: Autoencoder, encoder: Encoder) -> None:
    side = encoder.spec.patch_px // vae.downsample_factor
    if recipe.window != (side, side):
        raise ValueError(
            f"recipe '{recipe.name}': window is {recipe.window}, but the encoder's patches of "
            f"{encoder.spec.patch_px} pixels are {side} latents; set window to [{side}, {side}]"
        )
