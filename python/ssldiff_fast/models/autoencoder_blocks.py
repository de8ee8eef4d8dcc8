# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder of the first stage, with the parameter names of CompVis latent diffusion.

Shape letters: `B` images, `C` channels, `H W` pixels, `h w` latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.products import attention, conv1x1, is_eager_inference
from ssldiff_fast.models.winograd import Conv3x3

# The first stage's GroupNorms have this eps.
EPS = 1e-6
# Attention's scores that exist at once, at most: those of a large map would not fit into memory.
SCORES = 2**26


def arranged(
    x: Tensor,  # [B, C, H, W]
) -> Tensor:  # [B, C, H, W]
    """`x` in the layout that convolutions of inference on a CPU read, so that none copies it."""
    return x.contiguous(memory_format=torch.channels_last) if is_eager_inference(x) else x


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each behind GroupNorm and SiLU, and a (1x1 where needed) shortcut."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(in_channels, eps=EPS)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = GroupNormSiLU(out_channels, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, out_channels, H, W]
        h = self.conv1(self.norm1(x))
        if hasattr(self, "nin_shortcut"):
            x = conv1x1(x, self.nin_shortcut)
        return self.conv2(self.dropout(self.norm2(h)), add=x)


class AttnBlock(nn.Module):
    """Self-attention of one head over all positions of the feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNormSiLU(channels, eps=EPS, silu=False)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H, W]
        height, width = x.shape[-2:]
        normed = self.norm(x)
        # [B, 1, H*W, C]: with a dimension for its one head and rows in one piece, or the fused
        # kernels are passed over (GPU) or take twice as long (CPU).
        q, k, v = (
            conv1x1(normed, conv).permute(0, 2, 3, 1).flatten(1, 2).contiguous()[:, None]
            for conv in (self.q, self.k, self.v)
        )
        out = attended(q, k, v)[:, 0].transpose(1, 2).unflatten(2, (height, width))
        return conv1x1(out, self.proj_out, add=x)


def attended(
    query: Tensor,  # [B, 1, L, C]
    key: Tensor,  # [B, 1, T, C]
    value: Tensor,  # [B, 1, T, C]
) -> Tensor:  # [B, 1, L, C]
    """Attention in parts of the queries, so that the scores of all of them never exist at once."""
    parts = query.split(max(1, SCORES // key.shape[2]), dim=2)
    made = [attention(part, key, value) for part in parts]
    return made[0] if len(made) == 1 else torch.cat(made, dim=2)


class Downsample(nn.Module):
    """Halves both sides; pads right and bottom only, as the published encoder does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
    ) -> Tensor:  # [B, C, H/2, W/2]
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, C, 2h, 2w]
        return self.conv(x, zoom=2)


class Level(nn.Module):
    """One resolution of the encoder or decoder, and the way to the next.

    The attribute names are those of checkpoints; a level has at most one of the two resamplings.
    """

    downsample: Downsample | None
    upsample: Upsample | None

    def __init__(self, in_channels: int, channels: int, blocks: int, attend: bool, drop: float):
        super().__init__()
        self.downsample = self.upsample = None
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for _ in range(blocks):
            self.block.append(ResnetBlock(in_channels, channels, drop))
            if attend:
                self.attn.append(AttnBlock(channels))
            in_channels = channels

    def forward(
        self,
        h: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, channels, H, W], half or twice that after resampling
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        if self.downsample is not None:
            h = self.downsample(h)
        return h if self.upsample is None else self.upsample(h)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, drop: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, drop)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, drop)

    def forward(
        self,
        h: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, C, h, w]
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Images to moments: `[B, in_channels, H, W] -> [B, z_channels (x2 if double_z), h, w]`."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            attend = resolution // 2**i in attn_resolutions
            level = Level(width, ch * mult, num_res_blocks, attend, dropout)
            width = ch * mult
            if i != len(ch_mult) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, dropout)
        self.norm_out = GroupNormSiLU(width, eps=EPS)
        self.conv_out = Conv3x3(width, 2 * z_channels if double_z else z_channels)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:  # [B, z_channels (x2), h, w]
        h = self.conv_in(arranged(x))
        for level in self.down:
            h = level(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Module):
    """Latents to images: `[B, z_channels, h, w] -> [B, out_ch, H, W]`, unclipped."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        out_ch: int,
        resolution: int,
        z_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, dropout)
        levels: list[Level] = []
        for i in reversed(range(len(ch_mult))):
            attend = resolution // 2**i in attn_resolutions
            level = Level(width, ch * ch_mult[i], num_res_blocks + 1, attend, dropout)
            width = ch * ch_mult[i]
            if i != 0:
                level.upsample = Upsample(width)
            levels.insert(0, level)  # stored from fine to coarse, as checkpoints have it
        self.up = nn.ModuleList(levels)
        self.norm_out = GroupNormSiLU(width, eps=EPS)
        self.conv_out = Conv3x3(width, out_ch)

    def forward(
        self,
        z: Tensor,  # [B, z_channels, h, w]
    ) -> Tensor:  # [B, out_ch, H, W]
        h = self.mid(self.conv_in(arranged(z)))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(self.norm_out(h))
