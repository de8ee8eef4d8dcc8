# SPDX-License-Identifier: Apache-2.0
"""Training a VQ autoencoder (the paper's VQ-f4 first stage, at any size).

A codebook that starts at random on few images collapses to a handful of codes, so the first
steps run without quantisation (with a little noise on the latent instead, which makes the decoder
forgiving), and the codebook then starts from latents.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from ssldiff_fast.models.autoencoder import VQModel
from ssldiff_fast.ops.vq_nearest import vq_nearest
from ssldiff_fast.training.data import PatchBatches, PatchPool
from ssldiff_fast.training.fit import MovingAverage, Task, run
from ssldiff_fast.training.folder import averaged_weights, load_part, prepare_folder
from ssldiff_fast.training.recipe import VAERecipe, read_recipe, read_run

_KMEANS_STEPS = 10
_LATENTS_PER_CODE = 32  # latents gathered per code before the codebook is made


def gradient_difference(
    a: Tensor,  # [B, C, H, W]
    b: Tensor,  # [B, C, H, W]
) -> Tensor:  # scalar
    """Mean absolute difference of horizontal and vertical finite differences: keeps edges sharp."""
    difference = a - b
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


@torch.no_grad()
def codes_from_latents(
    latents: Tensor,  # [M, D] fp32
    n_embed: int,
) -> Tensor:  # [n_embed, D]
    """Lloyd's algorithm from a random subset; a code that attracts nothing stays where it is.

    With fewer latents than codes some codes are equal, and only the first of equals is used.
    """
    chosen = torch.randperm(len(latents), device=latents.device)[:n_embed]
    codes = latents[chosen.repeat(-(-n_embed // len(chosen)))[:n_embed]].clone()
    for _ in range(_KMEANS_STEPS):
        _, indices = vq_nearest(latents, codes)
        sums = torch.zeros_like(codes).index_add_(0, indices, latents)
        counts = torch.bincount(indices, minlength=n_embed)
        used = counts > 0
        codes[used] = sums[used] / counts[used, None]
    return codes


def build_vae(recipe: VAERecipe) -> VQModel:
    """The autoencoder of a recipe, untrained.

    Raises:
        ValueError: the recipe's `ddconfig` describes none.
    """
    try:
        return VQModel(ddconfig=recipe.ddconfig, n_embed=recipe.n_embed, embed_dim=recipe.embed_dim)
    except TypeError as error:
        raise ValueError(
            f"the recipe's ddconfig has an entry of the wrong kind ({error}); compare it with the "
            "bundled he-demo-vae"
        ) from None


class VAETask(Task):
    """Reconstruction with L1 and gradient differences, then the VQ terms as well."""

    def __init__(self, recipe: VAERecipe) -> None:
        super().__init__(recipe.fit)
        self.recipe = recipe
        self.model = build_vae(recipe)
        self._recent: list[Tensor] = []
        if recipe.decoder_only:
            for part in (self.model.encoder, self.model.quant_conv, self.model.quantize):
                part.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # PyTorch's CPU GroupNorm is some 40 times slower backwards in channels-last bf16 than in
        # contiguous bf16, which costs more than the convolutions gain by channels-last.
        x = batch.contiguous()
        with torch.set_grad_enabled(not self.recipe.decoder_only):
            z = self.model.encode(x).float()
            quantised = self.global_step >= self.recipe.unquantised_steps
            latent, extra = self._quantise(z) if quantised else self._perturb(z)
        out = self.model.decode(latent, quantize=False).float()
        mse = F.mse_loss(out.detach(), x)
        self.log("psnr", 10 * torch.log10(4.0 / mse), prog_bar=True)
        self.log("latent_std", z.detach().std())
        return self._reconstruction(out, x) + extra

    def _reconstruction(self, out: Tensor, x: Tensor) -> Tensor:
        recipe = self.recipe
        loss = F.l1_loss(out, x) + recipe.gradient_weight * gradient_difference(out, x)
        if recipe.colour_weight:
            loss = loss + recipe.colour_weight * F.avg_pool2d(out - x, 8).abs().mean()
        return loss

    def _perturb(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise on the latent, whose scale is pulled towards one so that noise means something."""
        self._recent.append(_rows(z)[:4096])
        del self._recent[: -max(1, self.recipe.n_embed * _LATENTS_PER_CODE // 4096)]
        scale = (z.pow(2).mean() - 1).pow(2)
        return z + self.recipe.latent_noise * torch.randn_like(z), 0.01 * scale

    def _quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # A run that goes on just here has nothing gathered, and starts from the latents at hand.
        start = self.global_step == self.recipe.unquantised_steps and not self.recipe.decoder_only
        if self._recent or start:
            self._start_codebook(torch.cat(self._recent or [_rows(z)]))
        quantised, indices = self.model.quantize(z)  # straight-through
        codes = F.embedding(indices, self.model.quantize.embedding.weight).permute(0, 3, 1, 2)
        self.log("codes_used", float(indices.unique().numel()), prog_bar=True)
        loss = F.mse_loss(codes, z.detach()) + self.recipe.commitment * F.mse_loss(
            z, codes.detach()
        )
        return quantised, loss

    def _start_codebook(self, latents: Tensor) -> None:
        codes = codes_from_latents(latents, self.recipe.n_embed)
        self._recent.clear()
        with torch.no_grad():
            self.model.quantize.embedding.weight.copy_(codes)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MovingAverage):
                callback.restart(self, "model.quantize.")


def _rows(
    z: Tensor,  # [B, D, h, w]
) -> Tensor:  # [B h w, D]
    return z.detach().permute(0, 2, 3, 1).flatten(0, 2)


def train_vae(
    recipe_name: str | Path,
    data: Path,
    folder: Path,
    *,
    start: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    progress: bool = True,
) -> VQModel:
    """Train an autoencoder and return it with its averaged weights.

    Args:
        recipe_name: a recipe file, or the name of a bundled one.
        data: the folder that the recipe's image paths are relative to.
        folder: gets checkpoints, metrics and the recipe.
        start: folder of another run whose averaged weights this one starts from. With a recipe
            that is `decoder_only`, models trained on that run's latents stay good.
        resume: go on from the folder's last checkpoint.
        device: "cpu", "cuda" or the like.
        progress: whether to show a progress bar.

    Raises:
        FileNotFoundError: no such recipe, folder or image.
        FileExistsError: `folder` has a checkpoint and `resume` is false.
        ValueError: the recipe is wrong, or not that of the run to go on with, or it trains the
            decoder only and there is nothing to start from.
        KeyboardInterrupt: after Ctrl-C, once the step under way is done and saved.
    """
    recipe, images = read_run(recipe_name, VAERecipe)
    if recipe.decoder_only and (start is None or recipe.unquantised_steps):
        raise ValueError(
            f"the recipe trains the decoder only, with unquantised_steps of "
            f"{recipe.unquantised_steps} and starting from {start}; set unquantised_steps to 0 and "
            "name the folder of a trained autoencoder with --start"
        )
    L.seed_everything(recipe.fit.seed, verbose=False)
    task = VAETask(recipe)
    if start is not None:
        load_part(task.model, averaged_weights(start), "model.", start)
    _check_crop(recipe, task.model)
    pool = PatchPool(images, data)
    pool.check_size(recipe.crop_px)
    done = prepare_folder(folder, recipe, images, resume=resume)
    batches = PatchBatches(
        pool,
        size=recipe.crop_px,
        batch_size=recipe.fit.batch_size,
        seed=recipe.fit.seed,
        start=done,
    )
    run(task, batches, folder, resume=resume, device=device, progress=progress)
    return task.model.cpu().eval()


def load_vae(recipe_name: str | Path, folder: Path) -> VQModel:
    """The autoencoder of a run's folder, with its averaged weights, also while the run goes on.

    Raises:
        FileNotFoundError: no such recipe, or nothing saved yet.
        ValueError: the recipe is not that of the run, or the checkpoint is damaged.
    """
    recipe = read_recipe(recipe_name, VAERecipe)
    model = build_vae(recipe)
    load_part(model, averaged_weights(folder), "model.", folder)
    return model.eval()


def _check_crop(recipe: VAERecipe, model: VQModel) -> None:
    factor = model.downsample_factor
    if recipe.crop_px % factor:
        raise ValueError(
            f"the recipe's crop_px is {recipe.crop_px}, but this autoencoder makes latents of "
            f"{factor} x {factor} pixels; choose a multiple of {factor}"
        )
