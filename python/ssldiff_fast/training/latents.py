# SPDX-License-Identifier: Apache-2.0
"""Latents and embeddings of many random patches, computed once before a diffusion model trains."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm import tqdm

from ssldiff_fast.encoders.encoder import Encoder, weights_hash
from ssldiff_fast.models.autoencoder import Autoencoder
from ssldiff_fast.slides.output import atomic_bytes
from ssldiff_fast.training.data import PatchPool, send
from ssldiff_fast.training.folder import CHECKPOINT

_CHUNK = {"cuda": 512}  # patches encoded at once, by kind of device
_CHUNK_ELSEWHERE = 16


@dataclass(frozen=True)
class LatentCache:
    """What `prepare_latents` made, in memory."""

    latents: np.ndarray  # [P, C, h, w] fp16
    embeddings: np.ndarray  # [P, T, D] fp16


def prepare_latents(
    pool: PatchPool,
    vae: Autoencoder,
    encoder: Encoder,
    folder: Path,
    *,
    count: int,
    seed: int,
    device: str = "cpu",
    progress: bool = True,
) -> LatentCache:
    """Latents and embeddings of `count` random patches, kept in `folder` for the next run.

    Files made with other weights, another number of patches or another seed are made again.

    Args:
        pool: where patches come from.
        vae: gives the latents, before quantisation.
        encoder: gives the embeddings; its patch side is the side of the patches.
        folder: gets `latents.npy`, `embeddings.npy` and, once both are whole, `latents.json`.
        count: P.
        seed: decides which patches are drawn.
        device: where the networks run meanwhile; they come back to the CPU.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a U-Net was trained in `folder` on latents of another autoencoder or encoder.
    """
    side = encoder.spec.patch_px
    pool.check_size(side)
    settings = {
        "count": count,
        "seed": seed,
        "vae": weights_hash(vae.state_dict()),
        "encoder": encoder.spec.weights_hash,
        "data": hashlib.sha256(pool.recipe.model_dump_json().encode()).hexdigest(),
    }
    done = folder / "latents.json"
    before = _read_settings(done)
    if before != settings:
        if before and (folder / CHECKPOINT).exists():
            _refuse_others(folder, before, settings)
        done.unlink(missing_ok=True)
        vae.to(device)
        encoder.to(device)
        _encode_all(pool, vae, encoder, folder, count=count, seed=seed, progress=progress)
        vae.cpu()
        encoder.to("cpu")
        atomic_bytes(done, json.dumps(settings, indent=1).encode())
    return LatentCache(np.load(folder / "latents.npy"), np.load(folder / "embeddings.npy"))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # damaged is as good as absent: they are made again
        return {}
    return settings if isinstance(settings, dict) else {}


def _refuse_others(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    for part, words in (("vae", "autoencoder"), ("encoder", "encoder")):
        if before.get(part) != settings[part]:
            raise ValueError(
                f"the run in {folder} was trained on latents of another {words}; go on with the "
                f"{words} that it was started with, or start a run in another folder"
            )


def sample_latents(
    pool: PatchPool,
    vae: Autoencoder,
    encoder: Encoder,
    *,
    count: int,
    seed: int,
    device: str = "cpu",
) -> LatentCache:
    """Latents and embeddings of `count` random patches that are always the same, for evaluation."""
    vae.to(device)
    encoder.to(device)
    parts = list(_encoded(pool, vae, encoder, count=count, seed=seed))
    vae.cpu()
    encoder.to("cpu")
    return LatentCache(*(np.concatenate(arrays) for arrays in zip(*parts)))


@torch.inference_mode()
def _encode_all(
    pool: PatchPool,
    vae: Autoencoder,
    encoder: Encoder,
    folder: Path,
    *,
    count: int,
    seed: int,
    progress: bool,
) -> None:
    side, spec = encoder.spec.patch_px, encoder.spec
    shape = (count, vae.embed_dim, side // vae.downsample_factor, side // vae.downsample_factor)
    latents = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, shape)
    embeddings = np.lib.format.open_memmap(
        folder / "embeddings.npy", "w+", np.float16, (count, spec.tokens, spec.width)
    )
    often = 0.1 if sys.stderr.isatty() else 5.0
    done = 0
    with tqdm(
        total=count, desc="latents", unit="patch", disable=not progress, mininterval=often
    ) as bar:
        for latent, embedding in _encoded(pool, vae, encoder, count=count, seed=seed):
            latents[done : done + len(latent)] = latent
            embeddings[done : done + len(latent)] = embedding
            done += len(latent)
            bar.update(len(latent))
    latents.flush()
    embeddings.flush()


@torch.inference_mode()
def _encoded(
    pool: PatchPool, vae: Autoencoder, encoder: Encoder, *, count: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Latents and embeddings [n, ...] fp16 of random patches, a batch at a time."""
    side = encoder.spec.patch_px
    vae = vae.to(memory_format=torch.channels_last)
    device = next(vae.parameters()).device
    chunk = _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
    # In half precision where that is the faster.
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    rng = np.random.default_rng(seed)
    for start in range(0, count, chunk):
        places = pool.places(rng, side, min(chunk, count - start))
        x = pool.patches(rng, places, side, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        with half:
            latent = vae.encode(x)
            embedding = encoder((x + 1) / 2)
        yield latent.half().cpu().numpy(), embedding.half().numpy()


class LatentBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches (latents [B, C, h, w], embeddings [B, T, D]) in fp32, drawn at random.

    `start` is the number of steps done before: a run that goes on draws others than at first.
    Everything is kept on `device`, which makes the batches.
    """

    def __init__(
        self,
        cache: LatentCache,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.start, self.device = start, torch.device(device)
        self.batch_size, self.seed = batch_size, seed
        self.latents = torch.from_numpy(cache.latents).to(self.device)
        self.embeddings = torch.from_numpy(cache.embeddings).to(self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng([self.seed, self.start] if self.start else self.seed)
        while True:
            chosen = rng.integers(len(self.latents), size=self.batch_size)
            index = send(chosen, device=self.device)
            yield self.latents[index].float(), self.embeddings[index].float()
