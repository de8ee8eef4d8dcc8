# SPDX-License-Identifier: Apache-2.0
"""A whole latent diffusion model: U-Net, autoencoder, conditioner, schedule, encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssldiff_fast._checks import check_choice
from ssldiff_fast.diffusion.schedule import Schedule
from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel
from ssldiff_fast.models.conditioner import Conditioner, build_conditioner
from ssldiff_fast.models.local_autoencoder import norm_names, statistics_to_tensors
from ssldiff_fast.models.preview import LatentPreview
from ssldiff_fast.models.unet import UNet
from ssldiff_fast.ops import GroupNormStatistics

if TYPE_CHECKING:
    from ssldiff_fast.encoders.encoder import Encoder
    from ssldiff_fast.encoders.spec import EncoderSpec

FORMAT = "ssldiff_fast"
VERSION = 1
PREDICTIONS = ("eps", "v", "x0")

# What a part is called in checkpoints.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "conditioner": "cond_stage_model.",
}
ENCODER_PREFIX = "encoder."
STATISTICS_PREFIX = "first_stage_statistics."

_VAES: dict[str, type[VQModel] | type[AutoencoderKL]] = {"vq": VQModel, "kl": AutoencoderKL}
_REQUIRED = ("unet", "vae")
_OPTIONAL = {
    "format": FORMAT,
    "version": VERSION,
    "name": "",
    "conditioner": None,
    "schedule": {},
    "prediction": "eps",
    "scale_factor": 1.0,
    "window": None,
    "encoder": None,
    "preview": None,
}


class LatentDiffusion(nn.Module):
    """Everything that makes images of embeddings.

    Args:
        unet: predicts `prediction` from a noisy window, a timestep and the conditioner's tokens.
        vae: autoencoder; a canvas holds its latents times `scale_factor`.
        conditioner: embeddings to tokens; None for an unconditioned U-Net.
        schedule: noise level of each timestep.
        prediction: what the network predicts: "eps", "v" or "x0".
        scale_factor: canvas = latent * scale_factor.
        window: (h, w) in latents of the windows that the U-Net was trained on.
        name: for messages and for the recipe.
        encoder_spec: the encoder whose embeddings condition the model, where it is known.

    Raises:
        ValueError: the parts do not fit together.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VQModel | AutoencoderKL,
        conditioner: Conditioner | None = None,
        *,
        schedule: Schedule,
        prediction: str = "eps",
        scale_factor: float = 1.0,
        window: Sequence[int] = (64, 64),
        name: str = "",
        encoder_spec: EncoderSpec | None = None,
    ) -> None:
        super().__init__()
        check_choice("prediction", prediction, PREDICTIONS, call="LatentDiffusion")
        _check_fit(unet, vae, conditioner)
        self.unet = unet
        self.vae = vae
        self.conditioner = conditioner
        self.schedule = schedule
        self.prediction = prediction
        self.scale_factor = _check_scale(scale_factor)
        self.window = _check_window(window, unet)
        self.name = name
        self.encoder_spec = encoder_spec
        self.encoder_weights: dict[str, Tensor] = {}
        # Of the autoencoder's norms over all that it was trained on, by the names of its modules,
        # where it was trained with them: what the local way fixes.
        self.statistics: dict[str, GroupNormStatistics] = {}
        # Latents to colours, where it was fitted; shows a canvas while it is denoised.
        self.preview: LatentPreview | None = None
        self.execution = "auto"  # how the U-Net is run, see `models.execution`
        self.source: Path | None = None
        self._encoder: list[Encoder] = []  # in a list, so that it is no part of this module

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, empty: bool = False) -> LatentDiffusion:
        """Model of a configuration (config.json), with initial weights.

        Args:
            config: what `to_config` returns.
            empty: leave the parameters without memory (on the meta device), to be loaded.

        Raises:
            ValueError: an entry is unknown, missing or wrong.
        """
        settings = _complete(config)
        with torch.device("meta" if empty else "cpu"):
            unet = UNet(**settings["unet"])
            vae = _build_vae(settings["vae"])
            conditioner = settings["conditioner"]
            if conditioner is not None:
                conditioner = build_conditioner(conditioner)
        window = settings["window"] or unet.config.image_size or 64
        model = cls(
            unet,
            vae,
            conditioner,
            schedule=Schedule.from_config(settings["schedule"]),
            prediction=settings["prediction"],
            scale_factor=settings["scale_factor"],
            window=(window, window) if isinstance(window, int) else window,
            name=settings["name"],
            encoder_spec=_build_spec(settings["encoder"]),
        )
        if settings["preview"] is not None:
            model.preview = LatentPreview.from_config(settings["preview"])
        return model

    def to_config(self) -> dict[str, Any]:
        """The configuration, as JSON values."""
        kinds = {kind: name for name, kind in _VAES.items()}
        preview = {} if self.preview is None else {"preview": self.preview.to_config()}
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "unet": self.unet.config.to_config(),
            "vae": {"type": kinds[type(self.vae)], **self.vae.config()},
            "conditioner": None if self.conditioner is None else self.conditioner.config(),
            "schedule": self.schedule.to_config(),
            "prediction": self.prediction,
            "scale_factor": self.scale_factor,
            "window": list(self.window),
            "encoder": None if self.encoder_spec is None else _spec_to_config(self.encoder_spec),
            **preview,
        }

    @property
    def latent_channels(self) -> int:
        """Channels C of a canvas."""
        return self.unet.out_channels

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along one side."""
        return self.vae.downsample_factor

    @property
    def encoder(self) -> Encoder:
        """The encoder that makes grids for this model, built at first use.

        Raises:
            ValueError: the model does not say which encoder it belongs to.
        """
        if self.encoder_spec is None:
            raise ValueError(
                f"model {self.name!r} does not name its encoder; encode with the encoder it was "
                "trained with and pass the grid."
            )
        if not self._encoder:
            from ssldiff_fast.encoders.encoder import Encoder

            self._encoder.append(Encoder(self.encoder_spec, self.encoder_weights or None))
        return self._encoder[0].to(next(self.parameters()).device)

    @property
    def weights_hash(self) -> str:
        """sha256 of the file that holds all weights; where there is no such file (a model made in
        memory, or put together of a checkpoint's averages and another one's autoencoder), of names,
        shapes and values."""
        if self.source is not None:
            return file_hash(self.source)
        digest = hashlib.sha256()
        for name, value in sorted(self.published_state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def published_state_dict(self) -> dict[str, Tensor]:
        """All weights by their names in checkpoints, the encoder's and the autoencoder's statistics
        included, on the CPU."""
        state = {ENCODER_PREFIX + name: value for name, value in self.encoder_weights.items()}
        for name, value in statistics_to_tensors(self.statistics).items():
            state[STATISTICS_PREFIX + name] = value
        for part, prefix in PREFIXES.items():
            module = getattr(self, part)
            if module is not None:
                for name, value in module.state_dict().items():
                    state[prefix + name] = value
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def set_statistics(self, statistics: Mapping[str, GroupNormStatistics]) -> None:
        """Take statistics of the autoencoder's norms.

        Raises:
            ValueError: they name a module that is no norm of this autoencoder.
        """
        unknown = sorted(set(statistics) - set(norm_names(self.vae)))
        if unknown:
            raise ValueError(
                f"LatentDiffusion: statistics are given of {unknown[0]!r}, which is no norm of "
                "this autoencoder; they belong to another one."
            )
        self.statistics = dict(statistics)

    def to_latent(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> Tensor:  # [B, C, h, w]
        """Latents of images, in the scale of a canvas."""
        return self.vae.encode(images) * self.scale_factor

    def from_latent(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, 3, H, W], about [-1, 1], unclipped
        """Images of latents in the scale of a canvas."""
        return self.vae.decode(x / self.scale_factor)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        card: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write config.json, model.safetensors and, with `card`, README.md; see `pretrained`."""
        from ssldiff_fast.models.pretrained import save_pretrained

        return save_pretrained(self, folder, dtype=dtype, card=card, overwrite=overwrite)


_HASHES: dict[tuple[str, int, int], str] = {}


def file_hash(path: Path) -> str:
    """sha256 of a file, remembered for as long as its size and time of change stay."""
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _HASHES:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        _HASHES[key] = digest.hexdigest()
    return _HASHES[key]


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(config) - set(_REQUIRED) - set(_OPTIONAL))
    if unknown:
        known = ", ".join(sorted([*_REQUIRED, *_OPTIONAL]))
        raise ValueError(f"model configuration: unknown entry {unknown[0]!r}, expected {known}.")
    missing = [name for name in _REQUIRED if name not in config]
    if missing:
        raise ValueError(f"model configuration: entry {missing[0]!r} is missing.")
    settings = {**_OPTIONAL, **config}
    if settings["format"] != FORMAT or settings["version"] != VERSION:
        raise ValueError(
            f"model configuration: format {settings['format']!r} version {settings['version']!r}, "
            f"expected {FORMAT!r} version {VERSION}; it was written by another program or a later "
            "version of this one."
        )
    for name in ("unet", "vae", "schedule"):
        if not isinstance(settings[name], Mapping):
            raise ValueError(
                f"model configuration: {name} is {settings[name]!r}, expected named settings."
            )
    return settings


def _build_vae(config: Mapping[str, Any]) -> VQModel | AutoencoderKL:
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in _VAES:
        raise ValueError(f"vae: type is {kind!r}, expected one of {', '.join(sorted(_VAES))}.")
    try:
        return _VAES[kind](**options)
    except TypeError as error:
        raise ValueError(
            f"vae: entries {sorted(options)} do not fit type {kind!r} ({error})."
        ) from None


def _build_spec(config: Mapping[str, Any] | None) -> EncoderSpec | None:
    if config is None:
        return None
    from ssldiff_fast.encoders.spec import EncoderSpec

    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    try:
        return EncoderSpec(**values)
    except TypeError as error:
        raise ValueError(
            f"model configuration: the encoder's entries {sorted(values)} do not fit ({error})."
        ) from None


def _spec_to_config(spec: EncoderSpec) -> dict[str, Any]:
    import dataclasses

    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(spec).items()
    }


def _check_fit(unet: UNet, vae: VQModel | AutoencoderKL, conditioner: Conditioner | None) -> None:
    if not unet.in_channels == unet.out_channels == vae.embed_dim:
        raise ValueError(
            f"LatentDiffusion: the U-Net has {unet.in_channels} input and {unet.out_channels} "
            f"output channels, but the autoencoder's latents have {vae.embed_dim}; all three must "
            "be equal."
        )
    width = None if conditioner is None else conditioner.context_dim
    if width != unet.context_dim:
        raise ValueError(
            f"LatentDiffusion: the conditioner makes tokens of width {width}, but the U-Net has "
            f"context_dim {unet.context_dim}; both must be equal."
        )


def _check_scale(scale_factor: float) -> float:
    if not 0 < float(scale_factor) < float("inf"):
        raise ValueError(
            f"LatentDiffusion: scale_factor is {scale_factor!r}, expected a finite number above 0."
        )
    return float(scale_factor)


def _check_window(window: Sequence[int], unet: UNet) -> tuple[int, int]:
    factor = 2 ** (len(unet.config.channel_mult) - 1)
    sides = tuple(window)
    if len(sides) != 2 or any(side < 1 or side % factor for side in sides):
        raise ValueError(
            f"LatentDiffusion: window is {sides}, expected (h, w) in latents, positive multiples "
            f"of {factor}."
        )
    return int(sides[0]), int(sides[1])
