# SPDX-License-Identifier: Apache-2.0
"""Training a small SSL encoder by contrast (NT-Xent, Chen et al. 2020, eq. 1).

Two views of a place are neighbouring patches, turned and stained a little differently: what they
share is tissue and colour, which is what the diffusion model is to be told. Some views are blurred
or noisy, and some have been through the autoencoder: an encoder that never saw such images knows
them by their artefacts first, and finds a synthetic patch far from any real one.
"""

from __future__ import annotations

import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast.encoders.encoder import Encoder, build_network
from ssldiff_fast.encoders.spec import EncoderSpec
from ssldiff_fast.models.autoencoder import Autoencoder
from ssldiff_fast.training.data import PatchBatches, PatchPool
from ssldiff_fast.training.fit import run
from ssldiff_fast.training.folder import averaged_weights, part_of, prepare_folder
from ssldiff_fast.training.recipe import EncoderRecipe, read_run
from ssldiff_fast.training.task import Task
from ssldiff_fast.training.vae import load_vae


def nt_xent(
    a: Tensor,  # [B, P]
    b: Tensor,  # [B, P]
    temperature: float,
) -> Tensor:  # scalar
    """Cross-entropy of finding each view's partner among the 2 B - 1 others by cosine."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = z @ z.t() / temperature
    logits.fill_diagonal_(float("-inf"))
    count = len(a)
    partner = torch.arange(2 * count, device=z.device).roll(count)
    return F.cross_entropy(logits, partner)


def spec_of(recipe: EncoderRecipe, mpp: float) -> EncoderSpec:
    """The spec of the encoder that a recipe trains."""
    return EncoderSpec(
        name=recipe.name,
        network=recipe.network,
        width=recipe.width,
        patch_px=recipe.patch_px,
        mpp=mpp,
        mean=recipe.mean,
        std=recipe.std,
        head=True,
    )


def degrade(
    x: Tensor,  # [B, 3, S, S] in [-1, 1]
    blur: float,
    noise: float,
) -> Tensor:  # [B, 3, S, S]
    """Each image mixed with a blurred copy of itself and with noise, both of a random strength."""
    share, std = torch.rand(2, len(x), 1, 1, 1, device=x.device)
    soft = x
    for _ in range(2):
        soft = F.avg_pool2d(soft, 3, 1, 1, count_include_pad=False)
    mixed = x.lerp(soft, blur * share)
    return mixed + noise * std * torch.randn_like(x)


class EncoderTask(Task):
    """The network, and the projection that only the loss sees."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, recipe: EncoderRecipe, spec: EncoderSpec, vae: Autoencoder | None = None
    ) -> None:
        super().__init__(recipe.fit)
        self.recipe = recipe
        self._vae = [vae]  # in a list, so that it is neither trained nor saved with the task
        self.network = build_network(spec).to(memory_format=torch.channels_last)
        self.projector = nn.Sequential(
            nn.BatchNorm1d(spec.width),
            nn.ReLU(),
            nn.Linear(spec.width, recipe.projection),
        )
        # Batches come in [-1, 1]; the encoder's preprocessing starts from [0, 1].
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def on_fit_start(self) -> None:
        for vae in self._vae:
            if vae is not None:
                vae.to(self.device).to(memory_format=torch.channels_last)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        views = torch.cat([batch[:, 0], self._through_autoencoder(batch[:, 1])])  # [2 B, 3, S, S]
        views = degrade(views, self.recipe.blur, self.recipe.noise)
        x = (views * self.scale + self.shift).contiguous(memory_format=torch.channels_last)
        embeddings = self.network(x).float()
        first, second = self.projector(embeddings).float().chunk(2)
        loss = nt_xent(first, second, self.recipe.temperature)
        if self.logs:
            a, b = F.normalize(embeddings.detach(), dim=1).chunk(2)
            self.log("cosine_pairs", (a * b).sum(1).mean(), prog_bar=True)
            self.log("cosine_others", (a * b.roll(1, 0)).sum(1).mean(), prog_bar=True)
            self.log("loss", loss.detach(), prog_bar=True)
        return loss

    @torch.no_grad()
    def _through_autoencoder(self, x: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1], both
        vae, count = self._vae[0], round(self.recipe.autoencoder_share * len(x))
        if vae is None or not count:
            return x
        passed = x[:count].contiguous(memory_format=torch.channels_last)
        decoded = vae.decode(vae.encode(passed)).float().clamp(-1, 1)
        return torch.cat([decoded, x[count:]])


def train_encoder(
    recipe_name: str | Path,
    data: Path,
    folder: Path,
    *,
    vae_folder: Path | None = None,
    vae_recipe: str | Path = "he-demo-vae",
    resume: bool = False,
    device: str = "cpu",
    progress: bool = True,
    minutes: float | None = None,
    pool: PatchPool | None = None,
) -> Encoder:
    """Train an encoder and return it with its averaged weights.

    Args:
        recipe_name: a recipe file, or the name of a bundled one.
        data: the folder that the recipe's image paths are relative to.
        folder: gets checkpoints, metrics and the recipe.
        vae_folder, vae_recipe: what `train vae` was called with, for recipes that send views
            through the autoencoder.
        resume: go on from the folder's last checkpoint.
        device: "cpu", "cuda" or the like.
        progress: whether to show a progress bar.
        minutes: train for so long at most, what is prepared before included; the schedule shrinks
            to fit.
        pool: the recipe's images, where they have been read.

    Raises:
        FileNotFoundError: no such recipe, folder or image.
        FileExistsError: `folder` has a checkpoint and `resume` is false.
        ValueError: the recipe is wrong, or not that of the run to go on with, or it needs an
            autoencoder and none is given.
        KeyboardInterrupt: after Ctrl-C, once the step under way is done and saved.
    """
    since = time.perf_counter()
    recipe, images = read_run(recipe_name, EncoderRecipe)
    if recipe.fit.batch_size < 2:
        raise ValueError("the recipe's batch_size is 1, but a contrast needs at least 2 places")
    if recipe.autoencoder_share and vae_folder is None:
        raise ValueError(
            f"the recipe sends {recipe.autoencoder_share:.0%} of the second views through an "
            "autoencoder, but none is given; name the folder of `train vae` with --vae"
        )
    vae = None if vae_folder is None else load_vae(vae_recipe, vae_folder).requires_grad_(False)
    L.seed_everything(recipe.fit.seed, verbose=False)
    task = EncoderTask(recipe, spec_of(recipe, images.mpp), vae)
    pool = pool or PatchPool(images, data)
    pool.check_size(recipe.patch_px)
    done = prepare_folder(folder, recipe, images, resume=resume)
    batches = PatchBatches(
        pool,
        size=recipe.patch_px,
        batch_size=recipe.fit.batch_size,
        seed=recipe.fit.seed,
        views=2,
        start=done,
        device=device,
    )
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
    return load_encoder(recipe_name, folder)


def load_encoder(recipe_name: str | Path, folder: Path) -> Encoder:
    """The encoder of a run's folder, with its averaged weights (rounded as they are stored).

    Raises:
        FileNotFoundError: no such recipe, or nothing saved yet.
        ValueError: the recipe is not that of the run, or the checkpoint is damaged.
    """
    recipe, images = read_run(recipe_name, EncoderRecipe)
    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in part_of(averaged_weights(folder), "network.").items()
    }
    return Encoder(spec_of(recipe, images.mpp), weights)
