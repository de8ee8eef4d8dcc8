# SPDX-License-Identifier: Apache-2.0
"""Training a VQ autoencoder (the paper's VQ-f4 first stage, at any size).

A codebook that starts at random on few images collapses to a handful of codes, so the first
steps run without quantisation (with a little noise on the latent instead, which makes the decoder
forgiving), and the codebook then starts from latents.

With `fixed_share`, some of each batch is decoded a second time with the norms' statistics over all
batches, and both results are pulled together: a large canvas may then be decoded in parts, whose
own statistics would show. With `teacher` both are pulled to what that model's decoder makes.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from ssldiff_fast.models.autoencoder import VQModel
from ssldiff_fast.ops import GroupNormStatistics
from ssldiff_fast.training.callbacks import MovingAverage
from ssldiff_fast.training.codes import codes_from_latents
from ssldiff_fast.training.data import PatchBatches, PatchPool
from ssldiff_fast.training.fit import run
from ssldiff_fast.training.folder import (
    averaged_weights,
    load_part,
    prepare_folder,
    recorded_recipe,
)
from ssldiff_fast.training.population import PopulationStatistics
from ssldiff_fast.training.recipe import VAERecipe, check_whole, read_recipe, read_run
from ssldiff_fast.training.start import (
    check_same_latents,
    is_run,
    load_start_vae,
    vae_recipe_like,
)
from ssldiff_fast.training.task import Task

_LATENTS_PER_CODE = 32  # latents gathered per code before the codebook is made
_LATENTS_PER_STEP = 4096
_ASIDE = 96  # patches of what was set aside that are evaluated
_MEASURED = 128  # patches whose statistics a model without any begins with
_CHUNK = 16


def gradient_difference(
    a: Tensor,  # [B, C, H, W]
    b: Tensor,  # [B, C, H, W]
) -> Tensor:  # scalar
    """Mean absolute difference of horizontal and vertical finite differences: keeps edges sharp."""
    difference = a - b
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def build_vae(recipe: VAERecipe) -> VQModel:
    """The autoencoder of a recipe, untrained.

    Raises:
        ValueError: the recipe's `ddconfig` describes none.
    """
    check_whole(recipe, "ddconfig", "n_embed", "embed_dim")
    assert recipe.ddconfig is not None
    assert recipe.n_embed is not None
    assert recipe.embed_dim is not None
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
        self.population = PopulationStatistics(self.model) if recipe.fixed_share else None
        self.quantised = recipe.unquantised_steps == 0
        self.aside: Tensor | None = None  # [N, 3, S, S]
        self._teacher: list[VQModel] = []  # not a part, which would be trained and saved
        self._recent: list[Tensor] = []
        if recipe.decoder_only:
            for part in (self.model.encoder, self.model.quant_conv, self.model.quantize):
                part.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch.contiguous(memory_format=_layout(batch))
        fit, recipe = self.recipe.fit, self.recipe
        with torch.set_grad_enabled(not recipe.decoder_only):
            z = self.model.encode(x).float()
            self.quantised |= self.done >= recipe.unquantised_steps / fit.steps
            latent, extra = self._quantise(z) if self.quantised else self._perturb(z)
        both = self.population is not None and self.quantised
        with self.population.watch() if both and self.population else nullcontext():
            out = self.model.decode(latent, quantize=False).float()
        target = self._target(latent, x)
        loss = self._reconstruction(out, target)
        if both:
            loss = self._with_fixed(loss, out, latent, target)
        if self.logs:
            mse = F.mse_loss(out.detach(), x)
            self.log("psnr", 10 * torch.log10(4.0 / mse), prog_bar=True)
            self.log("latent_std", z.detach().std())
        return loss + extra

    def follow(self, teacher: VQModel) -> None:
        """From here on what the teacher makes of the latents is learnt."""
        self._teacher = [teacher.requires_grad_(False).eval()]

    @torch.no_grad()
    def _target(self, latent: Tensor, x: Tensor) -> Tensor:
        """What is to be decoded: the image, or the teacher's."""
        if not self._teacher:
            return x
        teacher = self._teacher[0].to(x.device).to(memory_format=_layout(x))
        return teacher.decode(latent, quantize=False).float()

    def _with_fixed(self, loss: Tensor, out: Tensor, latent: Tensor, target: Tensor) -> Tensor:
        """The mean loss of both ways to decode, and what they differ by."""
        assert self.population is not None
        count = max(1, round(self.recipe.fixed_share * len(target)))
        fixed = self.population.fixed().decode(latent[:count], quantize=False).float()
        apart = (fixed - out[:count]).abs().mean()
        if self.logs and torch.is_grad_enabled():  # not of what was set aside
            self.log("grey_levels_apart", 127.5 * apart.detach(), prog_bar=True)
        loss = 0.5 * (loss + self._reconstruction(fixed, target[:count]))
        return loss + self.recipe.agreement_weight * apart

    def held_out(self) -> dict[str, Tensor]:
        """PSNR of what was set aside, and with fixed statistics: how far those differ, in grey
        levels."""
        if self.aside is None or not self.quantised:
            return {}
        parts = [self._figures(x) for x in self.aside.split(_CHUNK)]
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def _figures(self, x: Tensor) -> dict[str, Tensor]:
        x = x.contiguous(memory_format=_layout(x))
        latent, _ = self.model.quantize(self.model.encode(x).float())
        own = self.model.decode(latent, quantize=False).float()
        target = self._target(latent, x)
        loss = self._reconstruction(own, target)
        figures = {"held_out_psnr": _psnr(own, x), "held_out_loss": loss}
        if self._teacher:
            figures["held_out_grey_levels_off"] = _grey_levels(own, target)
        if self.population is not None:
            fixed = self.population.fixed().decode(latent, quantize=False).float()
            figures["held_out_psnr_fixed"] = _psnr(fixed, x)
            figures["held_out_grey_levels_apart"] = _grey_levels(fixed, own)
            figures["held_out_loss"] = self._with_fixed(loss, own, latent, target)
        return figures

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["quantised"] = self.quantised

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.quantised = bool(checkpoint.get("quantised", False))

    def _reconstruction(self, out: Tensor, x: Tensor) -> Tensor:
        recipe = self.recipe
        loss = F.l1_loss(out, x) + recipe.gradient_weight * gradient_difference(out, x)
        if recipe.colour_weight:
            loss = loss + recipe.colour_weight * F.avg_pool2d(out - x, 8).abs().mean()
        return loss

    def _perturb(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise on the latent, whose scale is pulled towards one so that noise means something."""
        rows = _rows(z)
        self._recent.append(rows[:: max(1, len(rows) // _LATENTS_PER_STEP)][:_LATENTS_PER_STEP])
        gathered = self.model.quantize.embedding.num_embeddings * _LATENTS_PER_CODE
        del self._recent[: -max(1, gathered // _LATENTS_PER_STEP)]
        scale = (z.pow(2).mean() - 1).pow(2)
        return z + self.recipe.latent_noise * torch.randn_like(z), 0.01 * scale

    def _quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        # A run that goes on just here has nothing gathered, and starts from the latents at hand.
        start = self.global_step == self.recipe.unquantised_steps and not self.recipe.decoder_only
        if self._recent or start:
            self._start_codebook(torch.cat(self._recent or [_rows(z)]))
        quantised, indices = self.model.quantize(z)  # straight-through
        codes = F.embedding(indices, self.model.quantize.embedding.weight).permute(0, 3, 1, 2)
        if self.logs:
            self.log("codes_used", float(indices.unique().numel()), prog_bar=True)
        loss = F.mse_loss(codes, z.detach()) + self.recipe.commitment * F.mse_loss(
            z, codes.detach()
        )
        return quantised, loss

    def _start_codebook(self, latents: Tensor) -> None:
        codes = codes_from_latents(latents, self.model.quantize.embedding.num_embeddings)
        self._recent.clear()
        with torch.no_grad():
            self.model.quantize.embedding.weight.copy_(codes)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MovingAverage):
                callback.restart(self, "model.quantize.")


def _layout(x: Tensor) -> torch.memory_format:
    """Channels-last is what tensor cores want; a CPU is the slower for it."""
    return torch.channels_last if x.is_cuda else torch.contiguous_format


def _psnr(image: Tensor, x: Tensor) -> Tensor:
    """Mean over images [B, C, H, W] in [-1, 1], in dB."""
    mse = (image.clamp(-1, 1) - x).square().mean((1, 2, 3))
    return (10 * torch.log10(4.0 / mse)).mean()


def _grey_levels(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of images in [-1, 1], of 255."""
    return 127.5 * (a.clamp(-1, 1) - b.clamp(-1, 1)).abs().mean()


def _rows(
    z: Tensor,  # [B, D, h, w]
) -> Tensor:  # [B h w, D]
    return z.detach().permute(0, 2, 3, 1).flatten(0, 2)


def train_vae(
    recipe_name: str | Path,
    data: Path,
    folder: Path,
    *,
    start: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    progress: bool = True,
    minutes: float | None = None,
    pool: PatchPool | None = None,
) -> VQModel:
    """Train an autoencoder and return it with its averaged weights.

    Args:
        recipe_name: a recipe file, or the name of a bundled one.
        data: the folder that the recipe's image paths are relative to.
        folder: gets checkpoints, metrics and the recipe.
        start: what this run starts from: folder of another run, whose averaged weights are taken,
            or the name of a bundled model, or a folder or file that `load` takes. With a recipe
            that is `decoder_only`, models trained on its latents stay good.
        resume: go on from the folder's last checkpoint.
        device: "cpu", "cuda" or the like.
        progress: whether to show a progress bar.
        minutes: train for so long at most, what is prepared before included; the schedule, with
            the steps without quantisation, shrinks to fit.
        pool: the recipe's images, where they have been read.

    Raises:
        FileNotFoundError: no such recipe, folder or image.
        FileExistsError: `folder` has a checkpoint and `resume` is false.
        ValueError: the recipe is wrong, or not that of the run to go on with, or it trains the
            decoder only and there is nothing to start from, or the teacher's latents are others.
        KeyboardInterrupt: after Ctrl-C, once the step under way is done and saved.
    """
    since = time.perf_counter()
    recipe, images = read_run(recipe_name, VAERecipe)
    if recipe.decoder_only and (start is None or recipe.unquantised_steps):
        raise ValueError(
            f"the recipe trains the decoder only, with unquantised_steps of "
            f"{recipe.unquantised_steps} and starting from {start}; set unquantised_steps to 0 and "
            "name a model, or the folder of a trained autoencoder, with --start"
        )
    if recipe.teacher is not None and not recipe.decoder_only:
        raise ValueError(
            f"the recipe has a teacher ({recipe.teacher}), so latents must stay as they are; set "
            "decoder_only"
        )
    L.seed_everything(recipe.fit.seed, verbose=False)
    task = VAETask(recipe) if start is None else _start_task(recipe, start)
    if recipe.teacher is not None and start is not None:
        task.follow(_teacher(recipe.teacher, task.model, start))
    task.model.to(memory_format=_layout(torch.empty(0, device=device)))
    _check_crop(recipe, task.model)
    pool = pool or PatchPool(images, data)
    pool.check_size(recipe.crop_px)
    done = prepare_folder(folder, task.recipe, images, resume=resume)
    if start is not None and task.population is not None and not task.population.updates:
        _measure(task, pool, device)
    batches = PatchBatches(
        pool,
        size=recipe.crop_px,
        batch_size=recipe.fit.batch_size,
        seed=recipe.fit.seed,
        start=done,
        device=device,
    )
    if recipe.fit.evaluations:
        aside = PatchPool(images, data, split="holdout")
        task.aside = aside.sample(_ASIDE, recipe.crop_px, seed=recipe.fit.seed, device=device)
    run(
        task,
        batches,
        folder,
        resume=resume,
        device=device,
        progress=progress,
        minutes=minutes,
        since=since,
    )
    return task.model.cpu().eval()


def _start_task(recipe: VAERecipe, start: str | Path) -> VAETask:
    """A task with the weights, and the statistics where there are some, of a run or a model."""
    if is_run(start):
        folder = Path(start)
        recorded = recorded_recipe(folder)
        if recorded is not None:
            before = load_vae(recorded, folder)
            recipe = vae_recipe_like(recipe, before, start)
        task = VAETask(recipe)
        load_part(task.model, averaged_weights(folder), "model.", folder)
        if task.population is not None and recorded is not None:
            task.population.take(load_vae_statistics(recorded, folder))
        return task
    if isinstance(start, Path) and start.is_dir() and recorded_recipe(start):
        averaged_weights(start)  # a run that has saved nothing yet, which this says
    model = load_start_vae(start)
    assert isinstance(model.vae, VQModel)
    task = VAETask(vae_recipe_like(recipe, model.vae, start))
    task.model.load_state_dict(model.vae.state_dict())
    if task.population is not None:
        task.population.take(model.statistics)
    return task


def _teacher(name: str, vae: VQModel, source: str | Path) -> VQModel:
    """The autoencoder of a model, which makes the latents of the one from `source`."""
    model = load_start_vae(name)
    check_same_latents(vae, model, source)
    assert isinstance(model.vae, VQModel)
    return model.vae


@torch.no_grad()
def _measure(task: VAETask, pool: PatchPool, device: str) -> None:
    """The statistics that a model without any begins with, so that its first evaluation is fair."""
    assert task.population is not None
    size, seed = task.recipe.crop_px, task.recipe.fit.seed
    task.to(device)
    kind = torch.device(device).type
    half = task.recipe.fit.precision == "bf16-mixed"
    with torch.autocast(kind, torch.bfloat16, enabled=half):
        for x in pool.sample(_MEASURED, size, seed=seed, device=device).split(_CHUNK):
            latent, _ = task.model.quantize(
                task.model.encode(x.contiguous(memory_format=_layout(x))).float()
            )
            with task.population.watch():
                task.model.decode(latent, quantize=False)


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


def load_vae_statistics(recipe_name: str | Path, folder: Path) -> dict[str, GroupNormStatistics]:
    """Statistics of the norms over all batches of a run, averaged as its weights; none where the
    recipe decodes with each patch's own alone.

    Raises:
        FileNotFoundError, ValueError: as `load_vae`.
    """
    recipe = read_recipe(recipe_name, VAERecipe)
    if not recipe.fixed_share:
        return {}
    population = PopulationStatistics(build_vae(recipe))
    load_part(population, averaged_weights(folder), "population.", folder)
    return population.by_name()


def _check_crop(recipe: VAERecipe, model: VQModel) -> None:
    factor = model.downsample_factor
    if recipe.crop_px % factor:
        raise ValueError(
            f"the recipe's crop_px is {recipe.crop_px}, but this autoencoder makes latents of "
            f"{factor} x {factor} pixels; choose a multiple of {factor}"
        )
