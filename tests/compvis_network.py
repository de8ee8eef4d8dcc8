# SPDX-License-Identifier: Apache-2.0
"""A network of the shape of CompVis' `UNetModel`, of plain PyTorch layers: names, settings, call.

Written from the published names and shapes; the golden outputs hold it to what that one computes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, embed: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        parts = (self.to_q(x), self.to_k(source), self.to_v(source))
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GatedGELU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.proj(x).chunk(2, dim=-1)
        return values * F.gelu(gates)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 4 * width
        self.net = nn.Sequential(GatedGELU(width, inner), nn.Dropout(0.0), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x  # type: ignore[no-any-return]


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([Block(channels, context_dim, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        maps = tokens.transpose(1, 2).unflatten(2, (height, -1))
        return self.proj_out(maps) + x  # type: ignore[no-any-return]


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))  # type: ignore[no-any-return]


class Sequence(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            else:
                x = layer(x, context) if isinstance(layer, SpatialTransformer) else layer(x)
        return x


class UNetModel(nn.Module):
    """With the attributes that the published class keeps of its keywords."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.image_size = given["image_size"]
        self.in_channels, self.model_channels = given["in_channels"], given["model_channels"]
        self.out_channels, self.num_res_blocks = given["out_channels"], given["num_res_blocks"]
        self.attention_resolutions = given["attention_resolutions"]
        self.channel_mult, self.num_heads = given["channel_mult"], given["num_heads"]
        self.dropout, self.conv_resample, self.use_checkpoint = 0, True, False
        self.num_head_channels, self.num_heads_upsample = -1, given["num_heads"]
        self.num_classes, self.dtype, self.predict_codebook_ids = None, torch.float32, False
        width = self.model_channels
        embed, context_dim = 4 * width, given["context_dim"]
        self.time_embed = nn.Sequential(nn.Linear(width, embed), nn.SiLU(), nn.Linear(embed, embed))

        def attention(channels: int, level: int) -> list[nn.Module]:
            wanted = 2**level in self.attention_resolutions
            return [SpatialTransformer(channels, context_dim, self.num_heads)] if wanted else []

        stages, channels = [Sequence(nn.Conv2d(self.in_channels, width, 3, padding=1))], width
        skips = [width]
        for level, mult in enumerate(self.channel_mult):
            for _ in range(self.num_res_blocks):
                block = ResBlock(channels, mult * width, embed)
                channels = mult * width
                stages.append(Sequence(block, *attention(channels, level)))
                skips.append(channels)
            if level + 1 < len(self.channel_mult):
                stages.append(Sequence(Downsample(channels)))
                skips.append(channels)
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = Sequence(
            ResBlock(channels, channels, embed),
            SpatialTransformer(channels, context_dim, self.num_heads),
            ResBlock(channels, channels, embed),
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for number in range(self.num_res_blocks + 1):
                block = ResBlock(channels + skips.pop(), mult * width, embed)
                channels = mult * width
                up = [Upsample(channels)] if level and number == self.num_res_blocks else []
                self.output_blocks.append(Sequence(block, *attention(channels, level), *up))
        self.out = nn.Sequential(
            nn.GroupNorm(32, channels),
            nn.SiLU(),
            nn.Conv2d(channels, self.out_channels, 3, padding=1),
        )

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None = None
    ) -> Tensor:
        half = self.model_channels // 2
        angles = timesteps[:, None] * torch.exp(-math.log(1e4) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x))
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)  # type: ignore[no-any-return]
