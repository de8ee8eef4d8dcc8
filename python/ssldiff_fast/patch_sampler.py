# SPDX-License-Identifier: Apache-2.0
"""From embeddings to the pixels of their patches, in batches in which each has its own place."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast.canvas.bands import micro_batches
from ssldiff_fast.canvas.decode import DecodeSettings
from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.canvas.noise import canvas_noise
from ssldiff_fast.canvas.presets import Preset
from ssldiff_fast.canvas.trial import fitting_tiles, fitting_windows
from ssldiff_fast.diffusion.guidance import guide
from ssldiff_fast.diffusion.solvers import apply_step, denoised, get_solver
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.slides.patch_files import (
    Patch,
)
from ssldiff_fast.slides.slide import RGB
from ssldiff_fast.synthesis_inputs import grid_hash, precision_of
from ssldiff_fast.synthesis_plan import CPU_TILES, digest


class PatchSampler:
    """Embeddings in, pixels out.

    Args:
        model: makes the patches.
        grid: its valid cells are what they are made of.
        preset: solver, steps, eta and guidance.
        batch_size: windows of one call, at most what fits into a GPU's memory.
    """

    def __init__(self, model: LatentDiffusion, grid: Grid, preset: Preset, batch_size: int) -> None:
        self.model, self.grid, self.preset = model, grid, preset
        self._denoiser = LDMDenoiser(model)
        self.batch_size = fitting_windows(
            self._denoiser, batch_size, most=batch_size, guided=preset.guidance_scale != 1.0
        )
        self._steps = get_solver(preset.solver)(
            model.schedule,
            model.schedule.timesteps(preset.steps, preset.spacing),
            prediction=model.prediction,
            eta=preset.eta,
        )
        places = torch.nonzero(grid.valid).tolist()
        self._ranks = {(row, column): rank for rank, (row, column) in enumerate(places)}
        self._device = next(model.unet.parameters()).device
        on_cpu = self._device.type == "cpu"
        settings = DecodeSettings(batch_size=min(batch_size, CPU_TILES) if on_cpu else batch_size)
        self._decoded = fitting_tiles(model, model.window, settings).batch_size

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) of a patch."""
        h, w = self.model.window
        return w * self.model.downsample_factor, h * self.model.downsample_factor

    @property
    def mpp(self) -> float:
        """Micrometres per pixel: a cell of the grid becomes one window."""
        return self.grid.mpp * self.grid.cell_px / self.size_px[0]

    def recipe(self) -> dict[str, Any]:
        """Everything besides the seeds that decides the bytes."""
        model, preset = self.model, self.preset
        settings = ("solver", "steps", "spacing", "eta", "guidance_scale")
        return {
            "kind": "patches",
            "model": {
                "name": model.name,
                "weights": model.weights_hash,
                "config": digest(model.to_config()),
            },
            "grid": {
                "hash": grid_hash(self.grid),
                "encoder": self.grid.encoder.get("name"),
                "source": self.grid.source.get("name"),
                "source_hash": self.grid.source.get("hash"),
            },
            **{name: getattr(preset, name) for name in settings},
            "batch_size": self.batch_size,
            "decode_batch_size": self._decoded,
            "dtype": precision_of(model.unet),
            "decoder_dtype": precision_of(model.vae.decoder),
            "compiled": model.execution == "compile",
        }

    def images(self, patches: Sequence[Patch]) -> Iterator[RGB]:
        """The pixels of each patch in turn, uint8 [height, width, 3].

        A patch has its own place in its own batch, whichever others are wanted: a matrix product
        may round a row by where it lies. The places of those not wanted are filled with one that
        is.
        """
        size = self.batch_size
        for _, group in itertools.groupby(patches, lambda patch: self._number(patch) // size):
            wanted = {self._number(patch) % size: patch for patch in group}
            filler = next(iter(wanted.values()))
            batch = [wanted.get(place, filler) for place in range(size)]
            pixels = self._pixels(self._latents(batch), batch).numpy()
            yield from (pixels[place] for place in wanted)

    def _number(self, patch: Patch) -> int:
        """Counts the valid cells row by row, seed after seed from seed 0."""
        return patch.seed * len(self._ranks) + self._ranks[patch.row, patch.column]

    @torch.no_grad()
    def _latents(self, patches: Sequence[Patch]) -> Tensor:
        """Denoised windows [B, C, h, w]."""
        cells = torch.stack([self.grid.embeddings[patch.row, patch.column] for patch in patches])
        guided = self.preset.guidance_scale != 1.0
        # The null embedding is the zero vector (what the published models were trained with).
        state = self._denoiser.prepare(cells, torch.zeros_like(cells[:1]) if guided else None)
        index = torch.arange(len(patches))
        seeds = [patch_seed(patch) for patch in patches]
        x, history = self._noise(seeds, 0), None
        for number, step in enumerate(self._steps):
            output = self._denoiser(x, step.time, state, index).float()
            scale = self.preset.guidance_scale
            mean = guide(output[0], output[1], scale) if guided else output[0]
            noise = self._noise(seeds, number + 1) if step.noise else None
            now = denoised(step, x, mean)
            x = apply_step(step, x, mean, noise=noise, history=history)
            history = now
        self._check_finite(x, patches, "latent", self.model.unet)
        return x

    def _noise(self, seeds: Sequence[int], step: int) -> Tensor:
        h, w = self.model.window
        channels, device = self.model.latent_channels, self._device
        return torch.stack(
            [canvas_noise(seed, channels, h, w, step=step, device=device) for seed in seeds]
        )

    @torch.no_grad()
    def _pixels(self, latents: Tensor, patches: Sequence[Patch]) -> Tensor:
        """[B, height, width, 3] uint8 on the CPU."""
        parameter = next(self.model.vae.parameters())
        tiles = latents.to(parameter.device, parameter.dtype)
        decoded = [
            self.model.from_latent(tiles[index]).float()
            for index in micro_batches(len(tiles), self._decoded)
        ]
        images = torch.cat(decoded)[: len(tiles)]
        self._check_finite(images, patches, "image", self.model.vae)
        # Cut off, not rounded, as the published decode does.
        scaled = ((images + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0
        return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    @staticmethod
    def _check_finite(
        values: Tensor, patches: Sequence[Patch], what: str, network: torch.nn.Module
    ) -> None:
        finite = torch.isfinite(values).flatten(1).all(1)
        if not bool(finite.all()):
            patch = patches[int((~finite).nonzero()[0])]
            dtype = precision_of(network)
            raise RuntimeError(
                f"synthesize_patches: the {what} of {patch.name} became NaN or infinite in "
                f"{dtype}; use float32, or check the model's weights and the grid."
            )


def patch_seed(patch: Patch) -> int:
    """A seed of its own for every place, whatever grid or batch it is made in."""
    key = f"{patch.seed}/{patch.x}/{patch.y}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
