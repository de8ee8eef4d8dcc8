# SPDX-License-Identifier: Apache-2.0
"""From a grid to a file: the canvas is denoised, decoded in bands, and streamed to disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast._checks import check_count, check_number
from ssldiff_fast.canvas.decode import decode_overlapped
from ssldiff_fast.canvas.denoiser import CanvasDenoiser
from ssldiff_fast.canvas.field import GridField
from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.canvas.noise import canvas_noise, check_seed
from ssldiff_fast.canvas.presets import Preset, get_preset
from ssldiff_fast.canvas.sampler import StepCallback, sample
from ssldiff_fast.encoders.spec import EncoderSpec
from ssldiff_fast.models.conditioner import PatchRegionConditioner
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.ops.window_plan import window_strides
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.slides.output import check_output
from ssldiff_fast.slides.writers import check_suffix, open_writer

# Tiles decoded at once on a CPU: 24 a second and core of the bundled model, against 16 at 16, whose
# feature maps leave the caches and are mapped anew by the allocator for every layer.
_CPU_TILES = 4
_WHITE = 243  # grey level of an empty slide, what scanners show between tissue


@dataclass(frozen=True)
class Synthesis:
    """What a run made.

    Attributes:
        path: the file.
        size_px: (width, height).
        mpp: micrometres per pixel.
        seconds: of the stages "denoise" and "decode and write".
        recipe: everything besides the seed that decides the bytes.
        seed: the seed.
    """

    path: Path
    size_px: tuple[int, int]
    mpp: float
    seconds: Mapping[str, float]
    recipe: Mapping[str, Any]
    seed: int


def synthesize(
    model: LatentDiffusion | str | os.PathLike[str],
    grid: Grid | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    preset: str | Preset = "fast",
    steps: int | None = None,
    guidance_scale: float | None = None,
    eta: float | None = None,
    stride: int | tuple[int, int] | None = None,
    decode_stride: int | tuple[int, int] | None = None,
    batch_size: int = 16,
    codec: str | None = None,
    quality: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    callback_on_step_end: StepCallback | None = None,
) -> Synthesis:
    """Synthesize the large image that a grid describes (paper section 3.2) and write it.

    The same model, grid, seed and settings give the same bytes.

    Args:
        model: a loaded model, or what `sf.load` takes.
        grid: a grid, or the path of its HDF5 file. A cell spans one window without overlap.
        out: the file: .tif (tiled pyramidal BigTIFF) or .png.
        seed: of the noise.
        preset: "fast", "paper" or "authors"; or a `Preset` of your own.
        steps, guidance_scale, eta, stride: in place of the preset's own; `stride` in latents,
            one number or (y, x).
        decode_stride: distance between the decoder's tiles in latents, likewise.
        batch_size: windows of one network call, at most; belongs to the recipe.
        codec: of a TIFF: "jpeg" (4:4:4, by default) or "deflate" (lossless).
        quality: of JPEG, 90 by default.
        device, dtype: for a model that is loaded here; load it yourself for anything else.
        overwrite: replace an existing file.
        progress: show progress with the time that remains.
        callback_on_step_end: called as (denoiser, step, t, {"latents", "denoised"}) every step.

    Returns:
        What was made, with its recipe and the seconds of each stage.

    Raises:
        ValueError: the grid is of another encoder or width, has NaN, or is smaller than one
            window; a setting is out of range. Nothing has been written then.
        OSError: the output exists or cannot be written.
        RuntimeError: NaN or infinity appeared; the message names step and window.
    """
    chosen = _settle(preset, steps=steps, guidance_scale=guidance_scale, eta=eta)
    batch_size = check_count("batch_size", batch_size, call="synthesize")
    seed = check_seed(seed)
    # What is quickly known comes before the model, whose weights may take seconds to read.
    check_suffix(out)
    check_output(out, overwrite=overwrite)
    cells = _opened(grid)
    loaded = _loaded(model, device, dtype)
    cells.check_for(_wanted(loaded, cells))
    plan = _Plan.make(loaded, cells, chosen, seed, stride, decode_stride, batch_size)
    recipe = plan.recipe()
    metadata = {
        "synthetic": True,
        "seed": seed,
        "recipe": recipe,
        "recipe_hash": _hash(recipe),
        "source_region_px": list(cells.region_px),  # decides no byte, but where to compare
    }
    width, height = plan.size_px
    with open_writer(
        out,
        width,
        height,
        plan.mpp,
        codec=codec,
        quality=quality,
        metadata=metadata,
        overwrite=overwrite,
    ) as writer:
        start = time.perf_counter()
        canvas = plan.denoise(seed, callback_on_step_end, progress)
        denoised = time.perf_counter()
        for band in plan.decode(canvas, progress):
            writer.write_rows(band)
    seconds = {"denoise": denoised - start, "decode and write": time.perf_counter() - denoised}
    return Synthesis(Path(out), plan.size_px, plan.mpp, seconds, recipe, seed)


def _settle(preset: str | Preset, **changes: Any) -> Preset:
    """The preset with the caller's settings in place of its own."""
    chosen = preset if isinstance(preset, Preset) else get_preset(preset)
    given = {name: value for name, value in changes.items() if value is not None}
    if "steps" in given:
        given["steps"] = check_count("steps", given["steps"], call="synthesize")
    for name in ("guidance_scale", "eta"):
        if name in given:
            given[name] = check_number(name, given[name], call="synthesize")
    return dataclasses.replace(chosen, **given)


def _opened(grid: Grid | str | os.PathLike[str]) -> Grid:
    if isinstance(grid, Grid):
        return grid
    if not isinstance(grid, str | os.PathLike):
        raise TypeError(
            f"synthesize: grid is a {type(grid).__name__}, but a Grid or the path of its file was "
            "expected; see sf.encode and sf.Grid."
        )
    return Grid.open(grid)


def _loaded(
    model: LatentDiffusion | str | os.PathLike[str], device: str | None, dtype: str | None
) -> LatentDiffusion:
    if isinstance(model, LatentDiffusion):
        if device is not None or dtype is not None:
            raise ValueError(
                "synthesize: device and dtype are for a model that is loaded here, but a loaded "
                "one was given; pass them to sf.load instead."
            )
        return model
    from ssldiff_fast.models.load import load

    return load(model, device=device or "cpu", dtype=dtype or "float32")


def _wanted(model: LatentDiffusion, grid: Grid) -> EncoderSpec | dict[str, int]:
    """What a grid for the model must be; published models do not name their encoder."""
    conditioner = model.conditioner
    if model.encoder_spec is not None or conditioner is None:  # LDMDenoiser refuses the latter
        return model.encoder_spec or {"tokens": grid.tokens, "width": grid.width}
    if grid.tokens == 1 and isinstance(conditioner, PatchRegionConditioner):
        return {"tokens": 1, "width": conditioner.patch_width}  # patches without their regions
    return {"tokens": conditioner.tokens, "width": conditioner.width}


@dataclass(frozen=True)
class _Plan:
    """A run, checked and ready."""

    model: LatentDiffusion
    grid: Grid
    preset: Preset
    canvas_denoiser: CanvasDenoiser
    decode_stride: tuple[int, int]
    batch_size: int
    stride: tuple[int, int] | None

    @classmethod
    def make(
        cls,
        model: LatentDiffusion,
        grid: Grid,
        preset: Preset,
        seed: int,
        stride: int | tuple[int, int] | None,
        decode_stride: int | tuple[int, int] | None,
        batch_size: int,
    ) -> _Plan:
        window = model.window
        size = (grid.shape[0] * window[0], grid.shape[1] * window[1])
        if stride is not None:
            stride = window_strides(stride, window)
        windows = preset.windows(*size, window, seed=seed, steps=preset.steps, stride=stride)
        tiles = preset.decode_stride(window)
        if decode_stride is not None:
            tiles = window_strides(decode_stride, window, name="decode_stride")
        window_denoiser = LDMDenoiser(model)
        embeddings, valid = background_filled(model, grid)
        denoiser = CanvasDenoiser(
            window_denoiser,
            windows,
            GridField(embeddings, window, preset.interpolation, valid=valid),
            guidance_scale=preset.guidance_scale,
            batch_size=batch_size,
        )
        return cls(model, grid, preset, denoiser, tiles, batch_size, stride)

    @property
    def _factor(self) -> int:
        return self.model.downsample_factor

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) of the image."""
        height, width = self.canvas_denoiser.size
        return width * self._factor, height * self._factor

    @property
    def tiles(self) -> int:
        """Tiles of one call of the decoder, at most."""
        on_cpu = next(self.model.vae.parameters()).device.type == "cpu"
        return min(self.batch_size, _CPU_TILES) if on_cpu else self.batch_size

    @property
    def mpp(self) -> float:
        """Micrometres per pixel of the image: a cell of the grid becomes one window of it."""
        return self.grid.mpp * self.grid.cell_px / (self.model.window[1] * self._factor)

    def recipe(self) -> dict[str, Any]:
        """Everything besides the seed that decides the bytes."""
        model = self.model
        return {
            "model": {
                "name": model.name,
                "weights": model.weights_hash,
                "config": _hash(model.to_config()),
            },
            "grid": {
                "hash": grid_hash(self.grid),
                "shape": list(self.grid.shape),
                "encoder": self.grid.encoder.get("name"),
                "source": self.grid.source.get("name"),
                "source_hash": self.grid.source.get("hash"),
            },
            "size_px": list(self.size_px),
            "window": list(model.window),
            "stride": self.stride and list(self.stride),
            "preset": dataclasses.asdict(self.preset),
            "decode_stride": list(self.decode_stride),
            "batch_size": self.batch_size,
            "decode_batch_size": self.tiles,
            "dtype": str(next(model.unet.parameters()).dtype).removeprefix("torch."),
        }

    def denoise(self, seed: int, callback: StepCallback | None, progress: bool) -> Tensor:
        """The denoised canvas [C, H, W]."""
        # The canvas lives where the network does, and so do the averages and the solver's steps.
        device = next(self.model.unet.parameters()).device
        size = self.canvas_denoiser.size
        return sample(
            self.canvas_denoiser,
            canvas_noise(seed, self.model.latent_channels, *size, device=device),
            schedule=self.model.schedule,
            solver=self.preset.solver,
            steps=self.preset.steps,
            spacing=self.preset.spacing,
            eta=self.preset.eta,
            seed=seed,
            callback_on_step_end=callback,
            progress=progress,
        )

    def decode(self, canvas: Tensor, progress: bool) -> Any:
        """Bands of pixel rows."""
        return decode_overlapped(
            self.model,
            canvas,
            stride=self.decode_stride,
            weights=self.preset.decode_weights,
            batch_size=self.tiles,
            progress=progress,
        )


def background_filled(
    model: LatentDiffusion, grid: Grid
) -> tuple[Tensor, Tensor]:  # embeddings [R, K, T, D], valid [R, K]
    """A grid whose cells without tissue hold the embedding of an empty slide.

    A model without its encoder cannot say what that is; such cells then stay out of the
    interpolation, and windows far from any other cell are unconditional, as published.
    """
    if bool(grid.valid.all()) or model.encoder_spec is None or not model.encoder_weights:
        return grid.embeddings, grid.valid
    side = model.encoder_spec.patch_px
    white = torch.full((1, side, side, 3), _WHITE, dtype=torch.uint8)
    embeddings = grid.embeddings.clone()
    embeddings[~grid.valid] = model.encoder(white)[0]
    return embeddings, torch.ones_like(grid.valid)


def grid_hash(grid: Grid) -> str:
    """sha256 over the embeddings and the valid mask."""
    digest = hashlib.sha256(str(tuple(grid.embeddings.shape)).encode())
    digest.update(grid.embeddings.contiguous().numpy().tobytes())
    digest.update(grid.valid.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _hash(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
