# SPDX-License-Identifier: Apache-2.0
"""Attention of the latent-diffusion U-Net, with the published parameter names.

`SpatialTransformer` is what conditioned models use (Rombach et al., "High-resolution image
synthesis with latent diffusion models", section 3.3); `AttentionBlock` is the unconditioned
block of the older models. Shape letters: B batch, C channels, h w window, L = h * w positions,
T tokens, D width of a token. What depends on the tokens alone can be prepared once for all
timesteps: every block takes either the tokens or what its `prepare` made of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssldiff_fast.models.feed_forward import FeedForward
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.prepared import PreparedContext, TokenVectors
from ssldiff_fast.models.products import (
    attention,
    conv1x1,
    is_inference,
    linear,
    twice,
    widened,
)
from ssldiff_fast.ops import few_tokens, token_attention


def zeroed(module: nn.Module) -> nn.Module:
    """Zero a module's parameters, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


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
        self._stacked: Tensor | None = None

    def _out(self) -> nn.Linear:
        linear = self.to_out[0]
        assert isinstance(linear, nn.Linear)  # for the type checker
        return linear

    def split_heads(
        self,
        x: Tensor,  # [B, L, heads * head_width]
    ) -> Tensor:  # [B, heads, L, head_width]
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,  # [B, L, C]
        context: Tensor | None = None,  # [B, T, D]
        *,
        add: Tensor | None = None,  # [B, L, C]
    ) -> Tensor:  # [B, L, C]
        """Attention of `x` to the context or itself, plus `add`."""
        if context is None and is_inference(x):
            queries, keys, values = linear(x, self._stack()).chunk(3, dim=-1)
            return self._attend(queries, keys, values, add)
        source = x if context is None else context
        keys, values = (linear(source, to.weight) for to in (self.to_k, self.to_v))
        return self.attend(x, keys, values, add=add)

    def _stack(self) -> Tensor:  # [3 * heads * head_width, C]
        """W_q, W_k and W_v of self-attention as one matrix, of which they are views from then on.

        So it follows every change of their values and takes no memory. Parameters that were moved,
        cast or replaced since are no views any more, and it is made anew.
        """
        weights = (self.to_q.weight, self.to_k.weight, self.to_v.weight)
        stacked = self._stacked
        if torch.compiler.is_compiling():  # which knows no addresses
            return torch.cat(weights) if stacked is None else stacked
        if stacked is not None and _are_its_rows(weights, stacked):
            return stacked
        self._stacked = None
        if any(type(w) is not nn.Parameter or w.is_inference() or w.is_meta for w in weights):
            return torch.cat(weights)
        with torch.inference_mode(False), torch.no_grad():
            stacked = torch.cat(weights)
            for weight, rows in zip(weights, stacked.chunk(3), strict=True):
                weight.data = rows
        self._stacked = stacked
        return stacked

    def attend(
        self,
        x: Tensor,  # [B, L, C]
        keys: Tensor,  # [B, T, heads * head_width], projected
        values: Tensor,  # [B, T, heads * head_width], projected
        *,
        add: Tensor | None = None,  # [B, L, C]
    ) -> Tensor:  # [B, L, C]
        """Attention of `x` to keys and values that are projected already, plus `add`."""
        return self._attend(linear(x, self.to_q.weight), keys, values, add)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, add: Tensor | None
    ) -> Tensor:  # [B, L, C]
        out = attention(*(self.split_heads(y) for y in (queries, keys, values)))
        to_out = self._out()
        return linear(out.transpose(1, 2).flatten(2), to_out.weight, to_out.bias, add=add)

    def absorb(
        self,
        context: Tensor,  # [B, T, D]
        norm: nn.LayerNorm,
    ) -> TokenVectors:
        """The vectors with which `token_attention` is this attention to `context`.

        `norm` is the LayerNorm before it. For one token neither it nor W_q and W_k are read.
        """
        out = self._out()
        # Once for all timesteps, so in float32 whatever the network's own precision.
        exact = torch.float64 if out.weight.dtype == torch.float64 else torch.float32
        context = context.to(exact)
        value = widened(self.to_v, context)
        if context.shape[1] == 1:
            return TokenVectors(widened(out, value[:, 0]).to(exact))
        key = widened(self.to_k, context).unflatten(-1, (self.heads, -1))
        # By head: what a key is in the space of LN(x), and what a value adds to x.
        by_head = self.to_q.weight.to(exact).unflatten(0, (self.heads, -1))
        keys = torch.einsum("bthd,hdc->bhtc", key, by_head) / math.sqrt(self.head_width)
        by_head = out.weight.to(exact).unflatten(1, (self.heads, -1))
        value = value.unflatten(-1, (self.heads, -1))
        values = torch.einsum("bthd,chd->bhtc", value, by_head) + out.bias.to(exact) / self.heads
        offsets = keys @ norm.bias.to(exact)
        keys = keys * norm.weight.to(exact)
        return TokenVectors(*(y.flatten(1, 2).to(exact) for y in (values, keys, offsets)))


def _are_its_rows(weights: tuple[Tensor, ...], stacked: Tensor) -> bool:
    first, size = stacked.data_ptr(), weights[0].nbytes
    return all(
        weight.data_ptr() == first + number * size
        and weight.dtype == stacked.dtype
        and weight.device == stacked.device
        and weight.is_contiguous()
        for number, weight in enumerate(weights)
    )


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

    def prepare(
        self,
        context: Tensor,  # [B, T, D]
    ) -> TokenVectors:
        """All that `forward` needs of the context, by the way that is faster for its tokens."""
        attn, width = self.attn2, self.norm3.normalized_shape[0]
        dtype = attn.to_v.weight.dtype
        if few_tokens(width, attn.heads, context.shape[1], context.device.type, dtype):
            return attn.absorb(context, self.norm2)
        context = context.to(dtype)
        return TokenVectors(values=attn.to_v(context), keys=attn.to_k(context))

    def forward(
        self,
        x: Tensor,  # [B, L, C], or of a guided pair before the two differ [B / 2, L, C]
        context: Tensor | TokenVectors,  # [B, T, D], or prepared
    ) -> Tensor:  # [B, L, C]
        vectors = self.prepare(context) if isinstance(context, Tensor) else context
        x = self.attn1(self.norm1(x), add=x)
        if len(vectors.values) != len(x):
            x = torch.cat((x, x))
        if vectors.keys is None or vectors.offsets is not None:
            x, normed = token_attention(
                x,
                vectors.values,
                self.norm3.weight,
                self.norm3.bias,
                keys=vectors.keys,
                offsets=vectors.offsets,
                heads=1 if vectors.keys is None else self.attn2.heads,
                eps=self.norm3.eps,
            )
        else:
            x = self.attn2.attend(self.norm2(x), vectors.keys, vectors.values, add=x)
            normed = self.norm3(x)
        return self.ff(normed, add=x)


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
        # Where its blocks' vectors begin in a prepared context; the U-Net counts them.
        self.first_block = 0
        self.norm = GroupNormSiLU(channels, eps=1e-6, silu=False)
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner, heads=heads, head_width=head_width, context_dim=context_dim
            )
            for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Conv2d(inner, channels, 1))

    def prepare(
        self,
        context: Tensor,  # [B, T, D]
    ) -> list[TokenVectors]:
        """The vectors of each block."""
        blocks = [b for b in self.transformer_blocks if isinstance(b, BasicTransformerBlock)]
        return [block.prepare(context) for block in blocks]

    def forward(
        self,
        x: Tensor,  # [B, C, h, w], or of a guided pair before the two differ [B / 2, C, h, w]
        context: Tensor | PreparedContext,  # [B, T, D], or prepared
    ) -> Tensor:  # [B, C, h, w]
        height, width = x.shape[-2:]
        tokens = conv1x1(self.norm(x), self.proj_in).permute(0, 2, 3, 1).flatten(1, 2)
        for number, block in enumerate(self.transformer_blocks, self.first_block):
            given = context if isinstance(context, Tensor) else context.blocks[number]
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, given, use_reentrant=False)
            else:
                tokens = block(tokens, given)
        maps = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        if len(maps) != len(x):
            x = twice(x)
        return conv1x1(maps, self.proj_out, add=x)


class AttentionBlock(nn.Module):
    """Self-attention of unconditioned models; `qkv` is interleaved by head unless `new_order`."""

    def __init__(self, channels: int, *, heads: int, new_order: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = GroupNormSiLU(channels, silu=False)
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
        out = attention(query, key, value).transpose(-1, -2).flatten(1, 2)
        return x + self.proj_out(out).unflatten(2, x.shape[-2:])
