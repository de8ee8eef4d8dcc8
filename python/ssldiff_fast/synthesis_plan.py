# SPDX-License-Identifier: Apache-2.0
"""A synthesis, checked and ready: what is denoised, how it is decoded, and the recipe of both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssldiff_fast._checks import check_choice, check_count, check_number
from ssldiff_fast.canvas.decode import DecodeSettings, RowDecoder, open_decoder
from ssldiff_fast.canvas.denoiser import CanvasDenoiser
from ssldiff_fast.canvas.field import GridField
from ssldiff_fast.canvas.glass import LEVEL, Glass
from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.canvas.mask import TissueMask
from ssldiff_fast.canvas.noise import INITIAL_STEP, canvas_noise
from ssldiff_fast.canvas.presets import Preset, get_preset
from ssldiff_fast.canvas.reuse import deep_maps
from ssldiff_fast.canvas.sampler import StepCallback, sample
from ssldiff_fast.canvas.stages import Rows
from ssldiff_fast.canvas.state import StateFolder
from ssldiff_fast.canvas.tile_decoder import Pixels
from ssldiff_fast.canvas.trial import fitting_tiles, fitting_windows
from ssldiff_fast.canvas.wavefront import sample_rows
from ssldiff_fast.canvas.wide import Where
from ssldiff_fast.canvas.windows import ShiftedWindows
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.ops import philox_normal
from ssldiff_fast.ops.window_plan import WindowPlan, window_strides
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.slides.pixel_band import PixelBand
from ssldiff_fast.synthesis_inputs import (
    background_filled,
    glass_latent,
    grid_hash,
    precision_of,
)

# Tiles decoded at once on a CPU: 24 a second and core of the bundled model, against 16 at 16, whose
# feature maps leave the caches and are mapped anew by the allocator for every layer.
CPU_TILES = 4
WRAPS = {"y": (True, False), "x": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class Geometry:
    """Where windows and tiles are.

    Attributes:
        stride: of regular windows in latents, in place of the preset's own.
        decode_stride: of the reference decoder's tiles, likewise.
        decoder: "reference", "global" or "local", in place of the preset's own.
        wrap: along which axes the image is tileable: None, "x", "y" or "both".
        mask: whether windows without tissue are left out.
    """

    stride: int | tuple[int, int] | None = None
    decode_stride: int | tuple[int, int] | None = None
    decoder: str | None = None
    wrap: str | None = None
    mask: bool = False

    @property
    def wraps(self) -> tuple[bool, bool]:
        """Whether the image is tileable along y, and along x."""
        if self.wrap is None:
            return False, False
        check_choice("wrap", self.wrap, WRAPS, call="synthesize")
        return WRAPS[self.wrap]


def settle(preset: str | Preset, **changes: Any) -> Preset:
    """The preset with the caller's settings in place of its own."""
    chosen = preset if isinstance(preset, Preset) else get_preset(preset)
    given = {name: value for name, value in changes.items() if value is not None}
    for name in ("steps", "reuse"):
        if name in given:
            given[name] = check_count(name, given[name], call="synthesize")
    for name in ("guidance_scale", "eta"):
        if name in given:
            given[name] = check_number(name, given[name], call="synthesize")
    if "guidance_interval" in given:
        low, high = given["guidance_interval"]
        given["guidance_interval"] = (float(low), float(high))
    return dataclasses.replace(chosen, **given)


@dataclass(frozen=True)
class Plan:
    """A run, checked and ready."""

    model: LatentDiffusion
    grid: Grid
    preset: Preset
    geometry: Geometry
    canvas_denoiser: CanvasDenoiser
    decode_settings: DecodeSettings
    batch_size: int

    @classmethod
    def make(
        cls,
        model: LatentDiffusion,
        grid: Grid,
        preset: Preset,
        seed: int,
        geometry: Geometry,
        batch_size: int,
    ) -> Plan:
        """A plan of settings that fit together, and of batches that fit into a GPU's memory."""
        window, wrap = model.window, geometry.wraps
        size = (grid.shape[0] * window[0], grid.shape[1] * window[1])
        stride, tiles = geometry.stride, preset.decode_stride(window)
        if stride is not None:
            stride = window_strides(stride, window)
        if geometry.decode_stride is not None:
            tiles = window_strides(geometry.decode_stride, window, name="decode_stride")
        windows = preset.windows(
            *size, window, seed=seed, steps=preset.steps, stride=stride, wrap=wrap
        )
        embeddings, valid = background_filled(model, grid)
        masked = geometry.mask and not bool(grid.valid.all())
        network = LDMDenoiser(model)
        batch_size = fitting_windows(
            network,
            batch_size,
            most=_widest(windows, preset.steps),
            guided=preset.guidance_scale != 1.0,
            reuses=preset.reuse != 1,
        )
        denoiser = CanvasDenoiser(
            network,
            windows,
            GridField(embeddings, window, preset.interpolation, valid=valid, wrap=wrap),
            guidance_scale=preset.guidance_scale,
            guidance_interval=preset.guidance_interval,
            batch_size=batch_size,
            mask=TissueMask(grid.valid) if masked else None,
            background=glass_latent(model) if masked else None,
        )
        if preset.reuse != 1:
            deep_maps(denoiser, preset.reuse, 1, call="synthesize")  # refuses before work begins
        geometry = dataclasses.replace(geometry, stride=stride, mask=masked)
        decode = DecodeSettings(
            geometry.decoder or preset.decoder,
            stride=tiles,
            weights=preset.decode_weights,
            batch_size=_tiles_at_once(model, batch_size),
        )
        decode = fitting_tiles(model, size, decode)
        return cls(model, grid, preset, geometry, denoiser, decode, batch_size)

    @property
    def is_on_cpu(self) -> bool:
        """Whether the network and its canvas are in the machine's own memory."""
        return next(self.model.unet.parameters()).device.type == "cpu"

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return self.model.downsample_factor

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) of the image."""
        height, width = self.canvas_denoiser.size
        return width * self.factor, height * self.factor

    @property
    def canvas_bytes(self) -> int:
        """Of the whole canvas, in float32."""
        height, width = self.canvas_denoiser.size
        return 4 * self.model.latent_channels * height * width

    @property
    def mpp(self) -> float:
        """Micrometres per pixel of the image: a cell of the grid becomes one window of it."""
        return self.grid.mpp * self.grid.cell_px / (self.model.window[1] * self.factor)

    def recipe(self) -> dict[str, Any]:
        """Everything besides the seed that decides the bytes."""
        model = self.model
        return {
            "model": {
                "name": model.name,
                "weights": model.weights_hash,
                "config": digest(_deciding(model.to_config())),
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
            "stride": self.geometry.stride
            and list(window_strides(self.geometry.stride, model.window)),
            "wrap": self.geometry.wrap,
            "mask": self.geometry.mask,
            "preset": dataclasses.asdict(self.preset),
            "decode": dataclasses.asdict(self.decode_settings),
            "decoder_dtype": precision_of(model.vae.decoder),
            "batch_size": self.batch_size,
            "dtype": precision_of(model.unet),
            "compiled": model.execution == "compile",
            **self._glass_recipe(),
        }

    def denoise(
        self,
        seed: int,
        *,
        state: StateFolder | None,
        resume: bool | None,
        callback: StepCallback | None,
        progress: bool,
    ) -> Tensor:
        """The denoised canvas [C, H, W], in the plain order."""
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
            reuse=self.preset.reuse,
            state=state,
            resume=resume,
            recipe=self.recipe(),
            callback_on_step_end=callback,
            progress=progress,
        )

    def evaluations(self) -> tuple[int, int]:
        """Evaluations of the network in a run, and those that the mask saves."""
        steps = self.preset.steps
        times = self.model.schedule.timesteps(steps, self.preset.spacing)
        counts = [self.canvas_denoiser.evaluations(n, t) for n, t in enumerate(times)]
        return sum(done for done, _ in counts), sum(saved for _, saved in counts)

    def rows(
        self,
        seed: int,
        *,
        state: StateFolder | None,
        resume: bool | None,
        durable: Callable[[], int],
        progress: bool,
        scratch: Where = None,
    ) -> Generator[Rows]:
        """Rows [C, n, W] of the denoised canvas as they become final, in the wavefront order."""
        width, channels = self.canvas_denoiser.size[1], self.model.latent_channels
        device = next(self.model.unet.parameters()).device

        def noise(begin: int, end: int) -> Tensor:
            return philox_normal(
                seed, channels, (begin, end), width, step=INITIAL_STEP, device=device
            )

        return sample_rows(
            self.canvas_denoiser,
            noise,
            schedule=self.model.schedule,
            solver=self.preset.solver,
            steps=self.preset.steps,
            spacing=self.preset.spacing,
            eta=self.preset.eta,
            seed=seed,
            state=state,
            resume=resume,
            recipe=self.recipe(),
            durable=durable,
            scratch=scratch,
            progress=progress,
        )

    def decoder(self, scratch: Where = None) -> RowDecoder:
        """What makes pixels of the canvas, continued round its ends where it is tileable."""
        size = [side + 2 * pad for side, pad in zip(self.canvas_denoiser.size, self._pads)]
        return open_decoder(
            self.model,
            (size[0], size[1]),
            self.decode_settings,
            glass=self._glass((size[0], size[1])),
            scratch=scratch,
        )

    def _glass(self, size: tuple[int, int]) -> Glass | None:
        """What the mask leaves out of a canvas of (H, W), continued round its ends."""
        mask = self.canvas_denoiser.mask
        if mask is None:
            return None
        tissue = mask.tissue
        for axis, wraps in enumerate(self.geometry.wraps):
            if wraps:  # by a window, which is a cell
                index = torch.arange(-1, tissue.shape[axis] + 1) % tissue.shape[axis]
                tissue = tissue.index_select(axis, index)
        return Glass(TissueMask(tissue), size, self._glass_reach, self.factor)

    @property
    def _glass_reach(self) -> tuple[int, int]:
        """Latents (y, x) from tissue at which all is glass; up to a window is evaluated."""
        y, x = (max(1, 3 * side // 4) for side in self.model.window)
        return y, x

    def _glass_recipe(self) -> dict[str, Any]:
        if self.canvas_denoiser.mask is None:
            return {}
        return {"glass": {"level": LEVEL, "reach": list(self._glass_reach), "balanced": True}}

    def first_latent(self, decoder: RowDecoder, row: int) -> int:
        """The first row of the canvas that pixels from latent row `row` down are made of."""
        top = self._pads[0]
        return 0 if top else decoder.first_latent(row)

    def decode(
        self, bands: Iterable[Tensor], *, decoder: RowDecoder, begin: int, progress: bool
    ) -> Iterator[Pixels | PixelBand]:
        """Bands of pixel rows from latent row `begin` down.

        Args:
            bands: [C, n, W], the canvas from row `first_latent(begin)` down.
            decoder: what `decoder` returned.
            begin: the first row of latents whose pixels are wanted.
            progress: show a progress bar.
        """
        top, left = self._pads
        whole = _continued(bands, self._pads)
        if top:  # all rows are there, from `top` rows above the first
            whole = (band[:, decoder.first_latent(begin + top) :] for band in whole)
        decoded = decoder.decode(whole, begin=begin + top, progress=progress)
        width, height = self.size_px
        left *= self.factor
        return _cropped(decoded, height - begin * self.factor, left, width)

    @property
    def _pads(self) -> tuple[int, int]:
        """Latents (y, x) that are decoded round the ends on either side, so that tiles match."""
        h, w = (side * wraps for side, wraps in zip(self.model.window, self.geometry.wraps))
        return h, w


def _continued(
    bands: Iterable[Tensor],  # [C, n, W]
    pads: tuple[int, int],
) -> Iterator[Tensor]:
    """A canvas that goes on round its ends."""
    if pads[0]:
        canvas = torch.cat(list(bands), dim=1)
        index = torch.arange(-pads[0], canvas.shape[1] + pads[0]) % canvas.shape[1]
        bands = [canvas.index_select(1, index.to(canvas.device))]
    for band in bands:
        index = torch.arange(-pads[1], band.shape[2] + pads[1]) % band.shape[2]
        yield band.index_select(2, index.to(band.device)) if pads[1] else band


def _widest(windows: WindowPlan | ShiftedWindows, steps: int) -> int:
    """Windows of a window row, at most."""
    plans = [windows] if isinstance(windows, WindowPlan) else map(windows, range(steps))
    return max(len(plan.origins_x) for plan in plans)


def _tiles_at_once(model: LatentDiffusion, batch_size: int) -> int:
    on_cpu = next(model.vae.parameters()).device.type == "cpu"
    return min(batch_size, CPU_TILES) if on_cpu else batch_size


def _cropped(
    bands: Iterator[Pixels | PixelBand], height: int, left: int, width: int
) -> Iterator[Pixels | PixelBand]:
    """The first `height` rows of bands, and of each the columns after `left`."""
    for band in bands:
        inside = band[:height, left : left + width]
        height -= len(inside)
        if len(inside):
            yield inside


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model's configuration that decides bytes."""
    return {name: value for name, value in config.items() if name != "preview"}


def digest(recipe: Mapping[str, Any]) -> str:
    """sha256 of JSON values."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
