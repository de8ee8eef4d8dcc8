# SPDX-License-Identifier: Apache-2.0
"""Autoencoders of diffusers as ours, with their own weights, so that every decoder serves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssldiff_fast.models.autoencoder import Autoencoder, AutoencoderKL, VQModel

_CALL = "first_stage_from_diffusers"
_KINDS = ("AutoencoderKL", "VQModel", "AutoencoderTiny")


class FirstStage(nn.Module):
    """An autoencoder and the scale in which a canvas holds its latents.

    Attributes:
        vae: the autoencoder.
        scale_factor: canvas = (latent - shift) * scale_factor.
        shift: see above; 0 for most.
    """

    def __init__(self, vae: nn.Module, scale_factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.vae = vae
        self.scale_factor = scale_factor
        self.shift = shift


class TinyAutoencoder(nn.Module):
    """diffusers' AutoencoderTiny in the shape of our autoencoders; convolutions alone."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = network.encoder, network.decoder
        self.downsample_factor = int(network.spatial_scale_factor)

    def encode(self, x: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1] -> [B, C, h, w]
        """The latent of images."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:  # [B, C, h, w] -> [B, 3, H, W]
        """Images of a latent."""
        return self.decoder(z)


def first_stage_from_diffusers(vae: Any) -> FirstStage:
    """An autoencoder of diffusers for `sf.open_decoder`.

    `AutoencoderKL` and `VQModel` become our own classes: the weights are the same tensors, under
    the names of latent diffusion. `AutoencoderTiny` is used as it is.

    Args:
        vae: the autoencoder, for example `pipeline.vae`.

    Raises:
        TypeError: another class.
        ValueError: an AutoencoderKL or VQModel of another build than latent diffusion's.
    """
    kind = type(vae).__name__
    if kind not in _KINDS:
        raise TypeError(
            f"{_CALL}: vae is a {kind}, but one of diffusers' {', '.join(_KINDS)} was expected."
        )
    config = vae.config
    scale = float(getattr(config, "scaling_factor", None) or 1.0)
    shift = float(getattr(config, "shift_factor", None) or 0.0)
    if kind == "AutoencoderTiny":
        # Its latents are already in the canvas's scale.
        return FirstStage(TinyAutoencoder(vae), 1.0)
    _check_build(config, kind)
    state = dict(vae.state_dict())
    ours = _empty(config, kind)
    wanted = ours.state_dict()
    renamed = {_renamed(name, len(config.block_out_channels)): v for name, v in state.items()}
    # Linear layers of attention are 1x1 convolutions here.
    fitted = {
        name: value[:, :, None, None]
        if value.dim() == 2 and name in wanted and wanted[name].dim() == 4
        else value
        for name, value in renamed.items()
    }
    for name in ("quant_conv", "post_quant_conv"):
        if f"{name}.weight" not in fitted:
            fitted.update(_identity(name, wanted[f"{name}.weight"], state))
    missing, unknown = set(wanted) - set(fitted), set(fitted) - set(wanted)
    if missing or unknown:
        raise ValueError(
            f"{_CALL}: vae has {len(unknown)} tensors that latent diffusion's {kind} lacks and "
            f"lacks {len(missing)} of its own (such as {sorted(missing | unknown)[0]}); only that "
            "build can be used."
        )
    ours.load_state_dict(fitted, assign=True)
    return FirstStage(ours.eval().requires_grad_(False), scale, shift)


def _check_build(config: Any, kind: str) -> None:
    """The parts of a configuration that latent diffusion's networks cannot express."""
    blocks = set(config.down_block_types) | set(config.up_block_types)
    plain = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    wrong = {
        "block types": blocks - plain,
        "norm_num_groups": {config.norm_num_groups} - {32},
        "act_fn": {config.act_fn} - {"silu"},
        "norm_type": {getattr(config, "norm_type", "group")} - {"group"},
        "mid_block_add_attention": {getattr(config, "mid_block_add_attention", True)} - {True},
    }
    for name, values in wrong.items():
        if values:
            raise ValueError(
                f"{_CALL}: vae has {name} {', '.join(map(str, sorted(values, key=str)))}, which "
                f"latent diffusion's {kind} does not have; decode it with tiles of its own."
            )


def _empty(config: Any, kind: str) -> Autoencoder:
    widths = list(config.block_out_channels)
    if any(width % widths[0] for width in widths):
        raise ValueError(
            f"{_CALL}: vae has block_out_channels {widths}, but multiples of the first were "
            "expected."
        )
    ddconfig: Mapping[str, Any] = {
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.layers_per_block,
        "z_channels": config.latent_channels,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "double_z": kind == "AutoencoderKL",
    }
    with torch.device("meta"):
        if kind == "AutoencoderKL":
            return AutoencoderKL(ddconfig=ddconfig, embed_dim=config.latent_channels)
        return VQModel(
            ddconfig=ddconfig,
            n_embed=config.num_vq_embeddings,
            embed_dim=config.vq_embed_dim or config.latent_channels,
        )


def _identity(name: str, weight: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A 1x1 convolution that does nothing, for a vae that has none."""
    first = next(iter(like.values()))
    eye = torch.eye(weight.shape[0], weight.shape[1], dtype=first.dtype, device=first.device)
    return {
        f"{name}.weight": eye[:, :, None, None],
        f"{name}.bias": eye.new_zeros(weight.shape[0]),
    }


_NAMES = (
    (".conv_norm_out.", ".norm_out."),
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.", ".mid.attn_1."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".down_blocks.", ".down."),
    (".up_blocks.", ".up."),
    (".resnets.", ".block."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
)


def _renamed(name: str, levels: int) -> str:
    """A parameter's name in latent diffusion."""
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    head, _, rest = name.partition(".up.")
    if rest:  # counted from fine to coarse, where diffusers counts upwards
        number, _, tail = rest.partition(".")
        name = f"{head}.up.{levels - 1 - int(number)}.{tail}"
    return name
