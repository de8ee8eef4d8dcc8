# SPDX-License-Identifier: Apache-2.0
"""The first stage: VQ-f4 (the paper's) and KL autoencoders of CompVis latent diffusion.

Images are `[B, 3, H, W]` in [-1, 1]; latents are `[B, embed_dim, h, w]` with h = H / factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssldiff_fast.models.autoencoder_blocks import Decoder, Encoder
from ssldiff_fast.models.products import conv1x1
from ssldiff_fast.ops.vq_nearest import vq_nearest

_DDCONFIG_DEFAULTS: dict[str, Any] = {
    "double_z": False,
    "in_channels": 3,
    "out_ch": 3,
    "dropout": 0.0,
    "attn_resolutions": (),
    "resolution": 256,
}
_DDCONFIG_KEYS = {*_DDCONFIG_DEFAULTS, "ch", "ch_mult", "num_res_blocks", "z_channels"}


def _complete(ddconfig: Mapping[str, Any], *, double_z: bool) -> dict[str, Any]:
    """`ddconfig` with its defaults, or one sentence about what is wrong with it."""
    unknown = sorted(set(ddconfig) - _DDCONFIG_KEYS)
    missing = sorted(_DDCONFIG_KEYS - set(ddconfig) - set(_DDCONFIG_DEFAULTS))
    if unknown or missing:
        raise ValueError(
            f"ddconfig has unknown entries {unknown} and lacks {missing}; "
            f"expected the entries {sorted(_DDCONFIG_KEYS)}"
        )
    config = {**_DDCONFIG_DEFAULTS, **ddconfig}
    if bool(config["double_z"]) != double_z:
        raise ValueError(
            f"ddconfig has double_z={config['double_z']}, but this autoencoder needs {double_z}; "
            "use VQModel for double_z=False and AutoencoderKL for double_z=True"
        )
    widths = [config["ch"] * mult for mult in config["ch_mult"]]
    if any(width % 32 for width in (config["ch"], *widths)):
        raise ValueError(
            f"ddconfig gives the widths {widths} (ch x ch_mult), but GroupNorm has 32 groups; "
            "choose ch so that every width is a multiple of 32"
        )
    return config


class _Autoencoder(nn.Module):
    """What both kinds share: encoder, decoder, and the bookkeeping of sizes."""

    ddconfig: dict[str, Any]
    embed_dim: int
    post_quant_conv: Projection

    def _build(self, ddconfig: Mapping[str, Any], embed_dim: int, *, double_z: bool) -> None:
        self.ddconfig = config = _complete(ddconfig, double_z=double_z)
        self.embed_dim = embed_dim
        common = {
            key: config[key]
            for key in (
                "ch",
                "ch_mult",
                "num_res_blocks",
                "attn_resolutions",
                "resolution",
                "z_channels",
                "dropout",
            )
        }
        self.encoder = Encoder(**common, in_channels=config["in_channels"], double_z=double_z)
        self.decoder = Decoder(**common, out_ch=config["out_ch"])

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent along one side: 4 for VQ-f4."""
        return 2 ** (len(self.ddconfig["ch_mult"]) - 1)

    def decoder_input(
        self,
        z: Tensor,  # [B, embed_dim, h, w], quantised
    ) -> Tensor:  # [B, z_channels, h, w] in the dtype of the decoder
        """What the decoder makes an image of. It alone may be of half precision: of latents that
        are, a twentieth have another nearest code."""
        return self.post_quant_conv(z).to(self.decoder.conv_in.weight.dtype)

    def _check_image(self, x: Tensor) -> None:
        channels, factor = self.ddconfig["in_channels"], self.downsample_factor
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"encode: x has shape {list(x.shape)}; expected [B, {channels}, H, W] with H and W "
                f"multiples of {factor}; crop or pad the image"
            )

    def _check_latent(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != self.embed_dim:
            raise ValueError(
                f"decode: z has shape {list(z.shape)}; expected [B, {self.embed_dim}, h, w]"
            )


class Codebook(nn.Module):
    """The codes of a VQ model (`quantize.embedding.weight` in checkpoints)."""

    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_embed, 1.0 / n_embed)

    def forward(
        self,
        z: Tensor,  # [B, embed_dim, h, w]
    ) -> tuple[Tensor, Tensor]:  # codes [B, embed_dim, h, w], indices int64 [B, h, w]
        rows = z.permute(0, 2, 3, 1)
        # In float32 whatever the network's dtype: neighbouring codes differ by less than bf16 does.
        vectors, indices = vq_nearest(
            rows.reshape(-1, z.shape[1]).float(), self.embedding.weight.float()
        )
        quantized = vectors.view(rows.shape).permute(0, 3, 1, 2).to(z.dtype)
        return quantized, indices.view(rows.shape[:3])


class Projection(nn.Conv2d):
    """A 1x1 convolution as the product that it is; parameters as torch's.

    PyTorch's own takes another algorithm on one thread than on several, and rounds differently.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, out, h, w]
        """The convolution of `x`."""
        return conv1x1(x.contiguous(memory_format=torch.channels_last), self)


class VQModel(_Autoencoder):
    """VQ-regularised autoencoder (VQ-f4 in the paper, section 4), as CompVis names its parameters.

    Args:
        ddconfig: the published dictionary: `ch`, `ch_mult`, `num_res_blocks`, `z_channels`,
            `attn_resolutions`, ...
        n_embed: number of codes.
        embed_dim: width of a code and of the latent.

    Raises:
        ValueError: where `ddconfig` has unknown, missing or impossible entries.
    """

    def __init__(self, *, ddconfig: Mapping[str, Any], n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self._build(ddconfig, embed_dim, double_z=False)
        self.n_embed = n_embed
        self.quantize = Codebook(n_embed, embed_dim)
        self.quant_conv = Projection(self.ddconfig["z_channels"], embed_dim)
        self.post_quant_conv = Projection(embed_dim, self.ddconfig["z_channels"])

    def encode(
        self,
        x: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> Tensor:  # [B, embed_dim, h, w]
        """The latent before quantisation, which is what the diffusion model learns."""
        self._check_image(x)
        return self.quant_conv(self.encoder(x))

    def decode(
        self,
        z: Tensor,  # [B, embed_dim, h, w]
        quantize: bool = True,
    ) -> Tensor:  # [B, 3, H, W], about [-1, 1], unclipped
        """Image of a latent; with `quantize` each latent is first replaced by its nearest code."""
        self._check_latent(z)
        if quantize:
            z, _ = self.quantize(z)
        return self.decoder(self.decoder_input(z))

    def config(self) -> dict[str, Any]:
        """The arguments that make this model again."""
        return {"ddconfig": self.ddconfig, "n_embed": self.n_embed, "embed_dim": self.embed_dim}


class AutoencoderKL(_Autoencoder):
    """KL-regularised autoencoder of CompVis latent diffusion (and of Stable Diffusion).

    Args:
        ddconfig: as for `VQModel`, with `double_z` true.
        embed_dim: width of the latent.

    Raises:
        ValueError: where `ddconfig` has unknown, missing or impossible entries.
    """

    def __init__(self, *, ddconfig: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        self._build(ddconfig, embed_dim, double_z=True)
        self.quant_conv = Projection(2 * self.ddconfig["z_channels"], 2 * embed_dim)
        self.post_quant_conv = Projection(embed_dim, self.ddconfig["z_channels"])

    def moments(
        self,
        x: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> tuple[Tensor, Tensor]:  # mean and log-variance, each [B, embed_dim, h, w]
        """Mean and log-variance (clamped to [-30, 20] as published) of the latent."""
        self._check_image(x)
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def encode(
        self,
        x: Tensor,  # [B, 3, H, W] in [-1, 1]
    ) -> Tensor:  # [B, embed_dim, h, w]
        """The mean of the latent: deterministic, as everything here that is not noise."""
        return self.moments(x)[0]

    def decode(
        self,
        z: Tensor,  # [B, embed_dim, h, w]
        quantize: bool = True,
    ) -> Tensor:  # [B, 3, H, W], about [-1, 1], unclipped
        """Image of a latent. `quantize` has no meaning here; it keeps one signature for both."""
        del quantize
        self._check_latent(z)
        return self.decoder(self.decoder_input(z))

    def config(self) -> dict[str, Any]:
        """The arguments that make this model again."""
        return {"ddconfig": self.ddconfig, "embed_dim": self.embed_dim}


Autoencoder = VQModel | AutoencoderKL
