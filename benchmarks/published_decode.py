# SPDX-License-Identifier: Apache-2.0
"""The VQ model's decode in its published form, as a baseline: what is computed, in that order.

It reads the parameters of our `VQModel`. Nothing is fused: distances to all codes are a matrix,
GroupNorm and SiLU are passes of their own, attention is two products with a softmax in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssldiff_fast.models import VQModel


def published_decode(
    vae: VQModel,
    z: Tensor,  # [B, embed_dim, h, w]
) -> Tensor:  # [B, 3, H, W]
    """The image of the latents' nearest codes."""
    decoder: Any = vae.decoder
    rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    codes = vae.quantize.embedding.weight
    distance = (rows**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * rows @ codes.T
    quantized = codes[distance.argmin(1)].view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
    h = _conv(decoder.conv_in, _conv(vae.post_quant_conv, quantized))
    h = _block(decoder.mid.block_1, h)
    h = _block(decoder.mid.block_2, _attention(decoder.mid.attn_1, h))
    for level in reversed(decoder.up):
        for number, block in enumerate(level.block):
            h = _block(block, h)
            h = _attention(level.attn[number], h) if len(level.attn) else h
        if level.upsample is not None:
            h = _conv(level.upsample.conv, F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return _conv(decoder.conv_out, F.silu(_norm(decoder.norm_out, h)))


def _conv(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)  # not our layer's


def _norm(layer: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, layer.weight, layer.bias, layer.eps)


def _block(block: Any, x: Tensor) -> Tensor:
    h = _conv(block.conv1, F.silu(_norm(block.norm1, x)))
    h = _conv(block.conv2, F.silu(_norm(block.norm2, h)))
    return h + (_conv(block.nin_shortcut, x) if hasattr(block, "nin_shortcut") else x)


def _attention(layer: Any, x: Tensor) -> Tensor:
    normed = _norm(layer.norm, x)
    query, key, value = (_conv(to, normed).flatten(2) for to in (layer.q, layer.k, layer.v))
    weights = torch.bmm(query.mT, key) * query.shape[1] ** -0.5
    out = torch.bmm(value, weights.softmax(2).mT).unflatten(2, x.shape[2:])
    return x + _conv(layer.proj_out, out)
