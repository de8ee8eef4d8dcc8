# SPDX-License-Identifier: Apache-2.0
"""Attention of the latent-diffusion U-Net, with the published parameter names.

`SpatialTransformer` is what conditioned models use (Rombach et al., "High-resolution image
synthesis with latent diffusion models", section 3.3); `AttentionBlock` is the unconditioned
block of the older models. Shape letters: B batch, C channels, h w window, L = h * w positions,
T tokens, D width of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def zeroed(module: nn.Module) -> nn.Module:
    """Zero a module's parameters, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GEGLU(nn.Module):
    """Gated GELU: `a * gelu(b)` with `a, b` the two halves of one projection."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner_width * 2)

    def forward(
        self,
        x: Tensor,  # [B, L, C]
    ) -> Tensor:  # [B, L, inner]
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU feed-forward with an inner width of 4 C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The dropout (rate 0 in the published models) holds the place that numbers net.2.
        self.net = nn.Sequential(
            GEGLU(width, width * 4), nn.Dropout(0.0), nn.Linear(width * 4, width)
        )

    def forward(
        self,
        x: Tensor,  # [B, L, C]
    ) -> Tensor:  # [B, L, C]
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of `x` to `context`, or to itself where there is no context."""

    def __init__(
        self, width: int, *, heads: int, head_width: int, context_dim: int | None = None
    ) -> None:
        super().__init__()
        inner = heads * head_width
        context_dim = width if context_dim is None else context_dim
        self.heads = heads
        self.head_width = head_width
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(0.0))

    def split_heads(
        self,
        x: Tensor,  # [B, L, heads * head_width]
    ) -> Tensor:  # [B, heads, L, head_width]
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,  # [B, L, C]
        context: Tensor | None = None,  # [B, T, D]
    ) -> Tensor:  # [B, L, C]
        source = x if context is None else context
        query = self.split_heads(self.to_q(x))
        key = self.split_heads(self.to_k(source))
        value = self.split_heads(self.to_v(source))
        out = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(out.transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the conditioning tokens, feed-forward; each a residual."""

    def __init__(self, width: int, *, heads: int, head_width: int, context_dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, heads=heads, head_width=head_width)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(
            width, heads=heads, head_width=head_width, context_dim=context_dim
        )
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,  # [B, L, C]
        context: Tensor,  # [B, T, D]
    ) -> Tensor:  # [B, L, C]
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, as one residual."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_width: int,
        depth: int,
        context_dim: int,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.use_checkpoint = use_checkpoint
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner, heads=heads, head_width=head_width, context_dim=context_dim
            )
            for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Conv2d(inner, channels, 1))

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
        context: Tensor,  # [B, T, D]
    ) -> Tensor:  # [B, C, h, w]
        height, width = x.shape[-2:]
        tokens = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)
        for block in self.transformer_blocks:
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, context, use_reentrant=False)
            else:
                tokens = block(tokens, context)
        maps = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        # x first: an elementwise sum takes the memory format of its first operand.
        return x + self.proj_out(maps)


class AttentionBlock(nn.Module):
    """Self-attention of unconditioned models; `qkv` is interleaved by head unless `new_order`."""

    def __init__(self, channels: int, *, heads: int, new_order: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(
        self,
        x: Tensor,  # [B, C, h, w]
    ) -> Tensor:  # [B, C, h, w]
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:  # channels are (q | k | v), each by head
            parts = qkv.unflatten(1, (3, self.heads, -1)).transpose(1, 2)
        else:  # channels are by head, each (q | k | v)
            parts = qkv.unflatten(1, (self.heads, 3, -1))
        query, key, value = (part.transpose(-1, -2) for part in parts.unbind(2))
        out = F.scaled_dot_product_attention(query, key, value)
        out = out.transpose(-1, -2).flatten(1, 2)
        return x + self.proj_out(out).unflatten(2, x.shape[-2:])
