# SPDX-License-Identifier: Apache-2.0
"""Residual and resampling blocks of the latent-diffusion U-Net, with the published names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssldiff_fast.models.attention import SpatialTransformer, zeroed
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.prepared import PreparedContext, TimeVectors
from ssldiff_fast.models.products import conv1x1, widened
from ssldiff_fast.models.winograd import Conv3x3

# Longest wavelength of the timestep embedding is 2 pi MAX_PERIOD.
MAX_PERIOD = 10_000


def timestep_embedding(
    t: Tensor,  # [B] any real dtype
    width: int,
) -> Tensor:  # [B, width] fp32
    """Sinusoidal embedding of timesteps: cosines first, then sines, then a zero if width is odd."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, width % 2))


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then a 3x3 convolution unless `with_conv` is false."""

    def __init__(self, channels: int, *, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = Conv3x3(channels, channels)

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, C, 2h, 2w]
        if self.with_conv:
            return self.conv(x, zoom=2)
        return F.interpolate(x, scale_factor=2, mode="nearest")


class Downsample(nn.Module):
    """Half the size: a 3x3 convolution of stride 2, or the mean of 2x2 positions."""

    def __init__(self, channels: int, *, with_conv: bool) -> None:
        super().__init__()
        self.op: nn.Module = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1)
            if with_conv
            else nn.AvgPool2d(2, stride=2)
        )

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, C, h/2, w/2]
        return self.op(x)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the timestep added, or scaling and shifting, in between.

    Args:
        channels, out_channels: width of input and output.
        embed_width: width of the timestep's embedding.
        scale_shift: the timestep scales and shifts the second norm instead of being added.
        resample: "up" or "down" changes the size before the first convolution.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        embed_width: int,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: str | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        # Its place in `TimeVectors`; the U-Net counts them.
        self.number = 0
        self.use_checkpoint = use_checkpoint
        # The identities hold the places of the published SiLUs, which the norms do, so that the
        # convolutions keep their numbers.
        self.in_layers = nn.Sequential(
            GroupNormSiLU(channels),
            nn.Identity(),
            Conv3x3(channels, out_channels),
        )
        self.resample: nn.Module | None = None
        if resample is not None:
            kind = {"up": Upsample, "down": Downsample}[resample]
            self.resample = kind(channels, with_conv=False)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embed_width, out_channels * (2 if scale_shift else 1))
        )
        self.out_layers = nn.Sequential(
            GroupNormSiLU(out_channels),
            nn.Identity(),
            nn.Dropout(dropout),
            zeroed(Conv3x3(out_channels, out_channels)),
        )
        self.skip_connection: nn.Module = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
        shift: Tensor,  # [B, out_channels] or twice as many, of `time_vectors`
    ) -> Tensor:  # [B, out_channels, h, w], or half or twice the size
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x, shift, use_reentrant=False)
        return self._forward(x, shift)

    def time_vectors(
        self,
        emb: Tensor,  # [S, embed_width]
    ) -> Tensor:  # [S, out_channels], or scales and shifts of twice as many
        """What the block takes of the timesteps, in the dtype of `emb`."""
        activation, projection = self.emb_layers
        return widened(projection, activation(emb))

    def _forward(self, x: Tensor, shift: Tensor) -> Tensor:
        norm, _, conv = self.in_layers
        hidden = norm(x)
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        hidden = conv(hidden)
        norm, _, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            hidden = norm(hidden, scale=scale, shift=shift)
        else:
            hidden = norm(hidden, add=shift)
        if isinstance(self.skip_connection, nn.Conv2d):
            x = conv1x1(x, self.skip_connection)
        return conv(dropout(hidden), add=x)


class Stage(nn.Sequential):
    """Blocks in sequence, each given what it takes: the timestep, the context, or neither."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, C, h, w]
        time: TimeVectors,
        context: Tensor | PreparedContext | None,  # [B, T, D], or prepared
    ) -> Tensor:
        for block in self:
            if isinstance(block, ResBlock):
                x = block(x, time.of(block.number, len(x)))
            elif isinstance(block, SpatialTransformer):
                x = block(x, context)
            else:
                x = block(x)
        return x
