# SPDX-License-Identifier: Apache-2.0
"""Training a latent diffusion model conditioned on embeddings (the paper's section 3.1)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.encoders.encoder import Encoder
from ssldiff_fast.models.autoencoder import Autoencoder
from ssldiff_fast.models.conditioner import PatchConditioner
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.unet import UNet
from ssldiff_fast.slides.output import atomic_bytes
from ssldiff_fast.training.data import PatchPool
from ssldiff_fast.training.encoder import load_encoder
from ssldiff_fast.training.fit import run
from ssldiff_fast.training.folder import (
    averaged_weights,
    load_part,
    prepare_folder,
    recorded_recipe,
)
from ssldiff_fast.training.latents import LatentBatches, prepare_latents, sample_latents
from ssldiff_fast.training.recipe import LDMRecipe, check_whole, read_recipe, read_run
from ssldiff_fast.training.start import (
    check_same_latents,
    check_trained_on,
    ldm_recipe_like,
    load_start,
)
from ssldiff_fast.training.task import Task
from ssldiff_fast.training.vae import load_vae, load_vae_statistics

_SCALE = "scale_factor.txt"
_ASIDE = 512  # patches of what was set aside that are evaluated
_CHUNK = 128


def build_model(recipe: LDMRecipe, vae: Autoencoder, encoder: Encoder) -> LatentDiffusion:
    """The whole model with an untrained U-Net and conditioner.

    Raises:
        ValueError: the recipe describes no U-Net, or one that does not fit the other parts.
    """
    check_whole(recipe, "window", "schedule", "unet")
    assert recipe.unet is not None
    assert recipe.schedule is not None
    assert recipe.window is not None
    _check_window(recipe, vae, encoder)
    try:
        unet = UNet(**recipe.unet)
    except TypeError as error:
        raise ValueError(f"recipe '{recipe.name}': {error}") from None
    model = LatentDiffusion(
        unet,
        vae,
        PatchConditioner(encoder.spec.width, recipe.unet["context_dim"]),
        schedule=Schedule.from_config(recipe.schedule),
        prediction=recipe.prediction or "v",
        window=recipe.window,
        name=recipe.name,
        encoder_spec=encoder.spec,
    )
    model.encoder_weights = dict(encoder.network.state_dict())
    return model


class LDMTask(Task):
    """Denoising of latents, with the embedding dropped now and then for guidance."""

    signal: Tensor
    sigma: Tensor

    def __init__(self, recipe: LDMRecipe, model: LatentDiffusion) -> None:
        super().__init__(recipe.fit)
        assert model.conditioner is not None
        self.recipe = recipe
        self.unet, self.conditioner = model.unet, model.conditioner
        self.unet.to(memory_format=torch.channels_last)
        self.schedule, self.scale_factor = model.schedule, model.scale_factor
        self.prediction = model.prediction
        # sqrt(abar) and sqrt(1 - abar) of each timestep, where the steps need them.
        abar = self.schedule.alphas_cumprod
        self.register_buffer("signal", abar.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - abar).sqrt().float(), persistent=False)
        self.aside: tuple[Tensor, Tensor] | None = None  # latents and embeddings

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        latents, embeddings = batch
        x0 = (latents * self.scale_factor).contiguous()
        kept = torch.rand(len(x0), 1, 1, device=x0.device) >= self.recipe.drop_condition
        t = torch.randint(0, self.schedule.num_train_timesteps, (len(x0),), device=x0.device)
        loss = self._loss(x0, embeddings * kept, t, torch.randn_like(x0))
        if self.logs:
            self.log("loss", loss.detach(), prog_bar=True, on_step=True)
        return loss

    def _loss(self, x0: Tensor, embeddings: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean square distance to what the network should predict, as `Schedule` has it."""
        signal, sigma = self.signal[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)
        context = self.conditioner(embeddings)
        output = self.unet(signal * x0 + sigma * noise, t, context).float()
        target = {"eps": noise, "x0": x0}.get(self.prediction)
        if target is None:
            target = signal * noise - sigma * x0
        return F.mse_loss(output, target)

    def held_out(self) -> dict[str, Tensor]:
        """The loss on what was set aside, always at the same timesteps and with the same noise."""
        if self.aside is None:
            return {}
        latents, embeddings = self.aside
        x0 = latents.float() * self.scale_factor
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        count = len(x0)
        t = torch.arange(count, device=x0.device) * self.schedule.num_train_timesteps // count
        t = t[torch.randperm(count, generator=generator).to(t.device)]
        chunks = (part.split(_CHUNK) for part in (x0, embeddings.float(), t, noise))
        losses = [self._loss(*parts) * len(parts[0]) for parts in zip(*chunks)]
        return {"held_out_loss": torch.stack(losses).sum() / count}


def train_ldm(
    recipe_name: str | Path,
    data: Path,
    folder: Path,
    *,
    start: str | Path | None = None,
    vae_recipe: str | Path = "he-demo-vae",
    vae_folder: Path | None = None,
    encoder_recipe: str | Path = "he-demo-encoder",
    encoder_folder: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    progress: bool = True,
    minutes: float | None = None,
    pool: PatchPool | None = None,
) -> LatentDiffusion:
    """Train the diffusion model on a trained autoencoder and encoder, or go on with a whole model.

    Args:
        recipe_name: a recipe file, or the name of a bundled one.
        data: the folder that the recipe's image paths are relative to.
        folder: gets the prepared latents, checkpoints and metrics.
        start: a whole model to start from, as `load` takes it: all parts are its own, and the two
            other runs are not needed.
        vae_recipe, vae_folder: what `train vae` was called with.
        encoder_recipe, encoder_folder: what `train encoder` was called with.
        resume: go on from the folder's last checkpoint.
        device: "cpu", "cuda" or the like.
        progress: whether to show progress bars.
        minutes: train for so long at most, what is prepared before included; the schedule shrinks
            to fit.
        pool: the recipe's images, where they have been read.

    Returns:
        The model with its averaged weights, on the CPU.

    Raises:
        FileNotFoundError: no such recipe, folder, run or image.
        FileExistsError: `folder` has a checkpoint and `resume` is false.
        ValueError: the recipe is wrong, or not that of the run to go on with, or the parts do not
            fit together.
        KeyboardInterrupt: after Ctrl-C; what was trained is saved.
    """
    since = time.perf_counter()
    recipe, images = read_run(recipe_name, LDMRecipe)
    L.seed_everything(recipe.fit.seed, verbose=False)
    if start is not None:
        if vae_folder is not None or encoder_folder is not None:
            raise ValueError(
                f"train ldm: both a model to start from ({start}) and runs of its parts are given; "
                "leave out --vae and --encoder, whose parts the model has"
            )
        model = load_start(start)
        recipe = ldm_recipe_like(recipe, model, start)
        model.name = recipe.name
        vae, encoder = model.vae, model.encoder
        _check_window(recipe, vae, encoder)
    else:
        if vae_folder is None or encoder_folder is None:
            raise ValueError(
                "train ldm: name the folders of `train vae` and `train encoder` with --vae and "
                "--encoder, or a whole model with --start"
            )
        vae = load_vae(vae_recipe, vae_folder)
        encoder = load_encoder(encoder_recipe, encoder_folder)
        model = build_model(recipe, vae, encoder)
        model.set_statistics(load_vae_statistics(vae_recipe, vae_folder))
    pool = pool or PatchPool(images, data)
    done = prepare_folder(folder, recipe, images, resume=resume)
    cache = prepare_latents(
        pool,
        vae,
        encoder,
        folder,
        count=recipe.patches,
        seed=recipe.fit.seed,
        device=device,
        progress=progress,
    )
    if start is None:
        model.scale_factor = _scale_factor(folder, cache.latents)
    else:
        atomic_bytes(folder / _SCALE, repr(model.scale_factor).encode())
    batches = LatentBatches(
        cache, batch_size=recipe.fit.batch_size, seed=recipe.fit.seed, start=done, device=device
    )
    task = LDMTask(recipe, model)
    if recipe.fit.evaluations:
        others = PatchPool(images, data, split="holdout")
        aside = sample_latents(others, vae, encoder, count=_ASIDE, seed=0, device=device)
        latents, embeddings = torch.from_numpy(aside.latents), torch.from_numpy(aside.embeddings)
        task.aside = latents.to(device), embeddings.to(device)
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
    return model.cpu().eval()


def load_ldm(
    recipe_name: str | Path,
    folder: Path,
    *,
    vae_recipe: str | Path,
    vae_folder: Path,
    encoder_recipe: str | Path,
    encoder_folder: Path,
) -> LatentDiffusion:
    """The model of a run's folder with its averaged weights, also while the run goes on.

    Raises:
        FileNotFoundError: no such recipe or run, or nothing saved yet.
        ValueError: a recipe is not that of its run, or a checkpoint is damaged.
    """
    recipe = read_recipe(recipe_name, LDMRecipe)
    vae, encoder = load_vae(vae_recipe, vae_folder), load_encoder(encoder_recipe, encoder_folder)
    model = build_model(recipe, vae, encoder)
    model.set_statistics(load_vae_statistics(vae_recipe, vae_folder))
    weights = averaged_weights(folder)
    for part in ("unet", "conditioner"):
        load_part(getattr(model, part), weights, f"{part}.", folder)
    model.scale_factor = _read_scale_factor(folder)
    return model.eval()


def load_tuned(
    start: str | Path, *, ldm_folder: Path | None = None, vae_folder: Path | None = None
) -> LatentDiffusion:
    """A model with what runs that started from it have made better, also while they go on.

    Args:
        start: the model that the runs were started from.
        ldm_folder: U-Net, conditioner and name are taken from there; the model's own without it.
        vae_folder: the same of the decoder and its statistics; encoder and codes are equal.

    Raises:
        FileNotFoundError: no such model or run, or nothing saved yet.
        ValueError: a run started from another model, or its checkpoint is damaged.
    """
    model = load_start(start)
    model.source = None  # it is no longer that file
    if ldm_folder is not None:
        recipe = read_recipe(_recorded(ldm_folder, "ldm"), LDMRecipe)
        ldm_recipe_like(recipe, model, start)
        check_trained_on(ldm_folder, model)
        weights = averaged_weights(ldm_folder)
        for part in ("unet", "conditioner"):
            load_part(getattr(model, part), weights, f"{part}.", ldm_folder)
        model.name = recipe.name
    if vae_folder is not None:
        recorded = _recorded(vae_folder, "vae")
        vae = load_vae(recorded, vae_folder)
        check_same_latents(vae, model, vae_folder)
        model.vae = vae
        model.set_statistics(load_vae_statistics(recorded, vae_folder))
    return model.eval()


def _recorded(folder: Path, kind: str) -> Path:
    path = recorded_recipe(folder)
    if path is None:
        raise FileNotFoundError(
            f"{folder} records no recipe; name the folder of a run of `train {kind}`"
        )
    return path


def _scale_factor(folder: Path, latents: Any) -> float:
    """1 / standard deviation of the latents, so that the diffusion starts from unit variance."""
    deviation = float(latents[:4096].astype("float32").std())
    if not 0 < deviation < float("inf"):
        raise ValueError(
            f"the autoencoder's latents have a standard deviation of {deviation}; train the "
            "autoencoder for longer, or look at what it was trained on"
        )
    factor = 1.0 / deviation
    atomic_bytes(folder / _SCALE, repr(factor).encode())
    return factor


def _read_scale_factor(folder: Path) -> float:
    path = folder / _SCALE
    try:
        return float(path.read_text())
    except (FileNotFoundError, ValueError):
        raise ValueError(
            f"{path} is missing or holds no number; name the folder of a run of `train ldm`"
        ) from None


def _check_window(recipe: LDMRecipe, vae: Autoencoder, encoder: Encoder) -> None:
    side = encoder.spec.patch_px // vae.downsample_factor
    if recipe.window != (side, side):
        raise ValueError(
            f"recipe '{recipe.name}': window is {recipe.window}, but the encoder's patches of "
            f"{encoder.spec.patch_px} pixels are {side} latents; set window to [{side}, {side}]"
        )
