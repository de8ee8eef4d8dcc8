# SPDX-License-Identifier: Apache-2.0
"""The U-Net in its published form, as a baseline: what is computed, in the order published.

It reads the parameters of our `UNet`, so that weights are the same. Nothing is prepared or fused:
every call projects timesteps and tokens, softmax weights are a matrix in memory, GroupNorm, SiLU
and residuals are passes of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast.models import UNet
from ssldiff_fast.models.attention import SpatialTransformer
from ssldiff_fast.models.unet_blocks import ResBlock, Stage, Upsample, timestep_embedding


def published_unet(
    unet: UNet,
    x: Tensor,  # [B, C, h, w]
    t: Tensor,  # [B]
    context: Tensor,  # [B, T, D]
    *,
    sdpa: bool = False,
) -> Tensor:  # [B, C, h, w]
    """The model output; with `sdpa` attention goes through scaled_dot_product_attention."""
    first, second = unet.time_embed[0], unet.time_embed[2]
    weight: Tensor = first.weight  # type: ignore[assignment]
    emb = second(F.silu(first(timestep_embedding(t, unet.config.model_channels).to(weight.dtype))))
    hidden, skips = x, []
    for stage in unet.input_blocks:
        hidden = _stage(stage, hidden, emb, context, sdpa)
        skips.append(hidden)
    hidden = _stage(unet.middle_block, hidden, emb, context, sdpa)
    for stage in unet.output_blocks:
        hidden = _stage(stage, torch.cat([hidden, skips.pop()], dim=1), emb, context, sdpa)
    return _convolution(unet.out[2], F.silu(_group_norm(unet.out[0], hidden)))


def _group_norm(norm: Any, x: Tensor) -> Tensor:
    return F.group_norm(x.float(), 32, norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)


def _stage(stage: Any, x: Tensor, emb: Tensor, context: Tensor, sdpa: bool) -> Tensor:
    assert isinstance(stage, Stage)
    for block in stage:
        if isinstance(block, ResBlock):
            x = _res_block(block, x, emb)
        elif isinstance(block, SpatialTransformer):
            x = _transformer(block, x, context, sdpa)
        elif isinstance(block, Upsample) and block.with_conv:
            x = _convolution(block.conv, F.interpolate(x, scale_factor=2, mode="nearest"))
        elif isinstance(block, nn.Conv2d):
            x = _convolution(block, x)
        else:
            x = block(x)
    return x


def _convolution(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)  # not our layer's


def _res_block(block: Any, x: Tensor, emb: Tensor) -> Tensor:
    hidden = _convolution(block.in_layers[2], F.silu(_group_norm(block.in_layers[0], x)))
    hidden = hidden + block.emb_layers[1](F.silu(emb))[:, :, None, None]
    hidden = _convolution(block.out_layers[3], F.silu(_group_norm(block.out_layers[0], hidden)))
    return block.skip_connection(x) + hidden


def _transformer(block: Any, x: Tensor, context: Tensor, sdpa: bool) -> Tensor:
    height, width = x.shape[2:]
    tokens = block.proj_in(_group_norm(block.norm, x)).flatten(2).transpose(1, 2).contiguous()
    for layer in block.transformer_blocks:
        tokens = _attention(layer.attn1, layer.norm1(tokens), None, sdpa) + tokens
        tokens = _attention(layer.attn2, layer.norm2(tokens), context, sdpa) + tokens
        value, gate = layer.ff.net[0].proj(layer.norm3(tokens)).chunk(2, dim=-1)
        tokens = layer.ff.net[2](value * F.gelu(gate)) + tokens
    maps = tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous()
    return block.proj_out(maps) + x


def _attention(layer: Any, x: Tensor, context: Tensor | None, sdpa: bool) -> Tensor:
    source = x if context is None else context
    parts = (layer.to_q(x), layer.to_k(source), layer.to_v(source))
    query, key, value = (p.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for p in parts)
    if sdpa:
        out = F.scaled_dot_product_attention(query, key, value)
    else:
        logits = torch.einsum("bhid,bhjd->bhij", query, key) * layer.head_width**-0.5
        out = torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), value)
    return layer.to_out(out.transpose(1, 2).flatten(2))
