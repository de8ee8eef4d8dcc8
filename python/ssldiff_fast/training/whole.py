# SPDX-License-Identifier: Apache-2.0
"""All runs that make a model, one after another, in a given time; and a look at the result."""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.load import load
from ssldiff_fast.models.local_autoencoder import local_autoencoder
from ssldiff_fast.models.preview import fit_preview
from ssldiff_fast.patches import synthesize_patches
from ssldiff_fast.slides.grid import Grid, spec_dict
from ssldiff_fast.slides.output import atomic_bytes
from ssldiff_fast.training.data import PatchPool
from ssldiff_fast.training.encoder import train_encoder
from ssldiff_fast.training.ldm import train_ldm
from ssldiff_fast.training.recipe import DataRecipe, VAERecipe, read_run
from ssldiff_fast.training.vae import train_vae

# Shares of the time that is left when a part begins; the diffusion model has the rest.
_VAE_SHARE, _ENCODER_SHARE = 0.4, 0.22
_RESERVE = 0.25  # minutes for writing the model and looking at it
_WHOLE = (1 << 30, 1 << 30)  # windows that hold any patch

_SHOWN = 8  # patches in the picture
_MEASURED = 96
_CHUNK = 16


@dataclass(frozen=True)
class Recipes:
    """The recipes of the three runs: files, or names of bundled ones."""

    vae: str | Path = "he-demo-vae"
    encoder: str | Path = "he-demo-encoder"
    ldm: str | Path = "he-demo-ldm"


def train_all(
    data: Path,
    folder: Path,
    *,
    recipes: Recipes | None = None,
    minutes: float | None = None,
    card: str | None = None,
    resume: bool = False,
    device: str = "cpu",
    progress: bool = True,
) -> Path:
    """Train autoencoder, encoder and diffusion model, and write the model.

    Args:
        data: the folder that the recipes' image paths are relative to.
        folder: gets a folder for each run, and the model in `model`.
        recipes: what is trained; all three name the same images, or the bundled model's.
        minutes: for everything, from now on; without them each run ends with its steps.
        card: text of the model's README.md.
        resume: go on where an earlier call was stopped.
        device: "cpu", "cuda" or the like.
        progress: whether to show progress.

    Returns:
        The model's folder.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, KeyboardInterrupt: as the three runs.
    """
    begin, chosen = time.perf_counter(), recipes or Recipes()

    def left(share: float = 1.0) -> float | None:
        if minutes is None:
            return None
        rest = minutes - _RESERVE - (time.perf_counter() - begin) / 60
        return max(1 / 60, rest * share)

    target = folder / "model"
    if target.exists() and not resume:
        raise FileExistsError(f"{target} exists already; add --resume, or name another folder")
    pool = PatchPool(read_run(chosen.vae, VAERecipe)[1], data)
    common: dict[str, Any] = {
        "resume": resume,
        "device": device,
        "progress": progress,
        "pool": pool,
    }
    vae, encoder = folder / "vae", folder / "encoder"
    train_vae(chosen.vae, data, vae, minutes=left(_VAE_SHARE), **common)
    parts: dict[str, Any] = {"vae_folder": vae, "vae_recipe": chosen.vae}
    train_encoder(
        chosen.encoder,
        data,
        encoder,
        minutes=left(_ENCODER_SHARE),
        **parts,
        **common,
    )
    model = train_ldm(
        chosen.ldm,
        data,
        folder / "ldm",
        encoder_folder=encoder,
        encoder_recipe=chosen.encoder,
        minutes=left(),
        **parts,
        **common,
    )
    with torch.no_grad():
        seen = pool.sample(_CHUNK, model.encoder.spec.patch_px, seed=0)
        model.preview = fit_preview(model.from_latent, model.to_latent(seen))
    return model.save_pretrained(target, dtype="float16", card=card, overwrite=True)


@dataclass(frozen=True)
class Look:
    """Figures of a model on patches that were set aside.

    Attributes:
        psnr: of the autoencoder, in dB.
        psnr_fixed: the same with the statistics that the model carries; None without them.
        grey_levels_apart: mean difference of the two, of 255.
        similarity: mean cosine between patches' embeddings and those of what was made of them.
        similarity_decoded: the same for patches that went through the autoencoder alone: a ceiling.
    """

    psnr: float
    psnr_fixed: float | None
    grey_levels_apart: float | None
    similarity: float
    similarity_decoded: float


@torch.no_grad()
def look_at(
    name: str | Path, images: DataRecipe, data: Path, output: Path, *, device: str = "cpu"
) -> Look:
    """Measure a model on patches set aside, and show a few: `look.png` has columns of a patch, the
    same decoded, decoded with fixed statistics, and an image made from its embedding (preset
    `fast`); `look.json` has the figures.

    Args:
        name: the model, as `load` takes it.
        images, data: recipe and folder of the images.
        output: folder for the two files.
        device: where to compute.
    """
    model = load(name, device=device)
    side = model.encoder.spec.patch_px
    pool = PatchPool(images, data, split="holdout")
    real = pool.sample(_MEASURED, side, seed=0, device=device)
    own, fixed = _decoded(model, real)
    made = _made(model, real[:_SHOWN])
    embeddings = model.encoder((real + 1) / 2)
    look = Look(
        psnr=round(_psnr(own, real), 2),
        psnr_fixed=None if fixed is None else round(_psnr(fixed, real), 2),
        grey_levels_apart=None
        if fixed is None
        else round(127.5 * float((own - fixed).abs().mean()), 3),
        similarity=_cosine(embeddings[:_SHOWN], model.encoder((made + 1) / 2)),
        similarity_decoded=_cosine(embeddings, model.encoder((own + 1) / 2)),
    )
    columns = [part[:_SHOWN] for part in (real, own, fixed) if part is not None]
    rows = torch.cat([torch.cat(list(part.cpu()), dim=1) for part in [*columns, made]], dim=2)
    pixels = ((rows + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    output.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(output / "look.png")
    atomic_bytes(output / "look.json", json.dumps(asdict(look), indent=1).encode())
    return look


def _decoded(model: LatentDiffusion, real: Tensor) -> tuple[Tensor, Tensor | None]:
    """Through the autoencoder, with own statistics and with fixed ones."""
    vaes: list[Any] = [model.vae]
    if model.statistics:
        vaes.append(local_autoencoder(model.vae, model.statistics, _WHOLE))
    latents = [model.vae.encode(x) for x in real.split(_CHUNK)]
    own, *rest = (torch.cat([vae.decode(z) for z in latents]).clamp(-1, 1) for vae in vaes)
    return own, rest[0] if rest else None


def _made(model: LatentDiffusion, real: Tensor) -> Tensor:  # [N, 3, S, S] on the CPU
    """An image from each patch's embedding."""
    embeddings = model.encoder((real + 1) / 2)
    spec = model.encoder.spec
    grid = Grid(
        embeddings[None],
        torch.ones(1, len(real), dtype=torch.bool),
        mpp=spec.mpp,
        cell_px=spec.patch_px,
        encoder=spec_dict(spec),
    )
    with tempfile.TemporaryDirectory() as name:
        synthesize_patches(model, grid, name, progress=False)
        paths = sorted(Path(name).glob("*.png"), key=_column)
        images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _column(path: Path) -> int:
    """The X of `SLIDE_X_Y_sSEED`."""
    return int(path.stem.split("_")[-3])


def _psnr(image: Tensor, real: Tensor) -> float:
    errors = (image - real).square().mean((1, 2, 3)).tolist()
    return float(np.mean([10 * math.log10(4 / error) for error in errors]))


def _cosine(a: Tensor, b: Tensor) -> float:
    return round(float(torch.cosine_similarity(a.flatten(1), b.flatten(1)).mean()), 4)
