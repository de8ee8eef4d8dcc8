# SPDX-License-Identifier: Apache-2.0
"""The stages of `FusedUNet`: what it says of maps, biases and products is done here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast.models.attention import BasicTransformerBlock, SpatialTransformer
from ssldiff_fast.models.feed_forward import GEGLU
from ssldiff_fast.models.folded import carried, enlarging, summed
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.prepared import PreparedContext, TimeVectors, TokenVectors
from ssldiff_fast.models.unet_blocks import Downsample, ResBlock, Stage, Upsample
from ssldiff_fast.ops import token_attention

# Heads so wide are in no fused attention kernel for GPUs but PyTorch's slowest (measured on an
# H100 in bfloat16, 32 windows: 1024 positions of 384 in 172 us by products, 390 us by it, 222 us by
# a flash kernel in Triton; 256 positions of 576 in 34, 52 and 45 us).
WIDE_HEAD = 256
# Of positions, below which a single launch is the faster: 64 positions of 960 in 31 and 25 us.
FEW_POSITIONS = 128
# Logits of more positions than this would take more memory than all else.
MOST_POSITIONS = 2048


@dataclass(frozen=True)
class Map:
    """A feature map, channels-last, and the statistics of its chunks."""

    values: Tensor  # [N, L, C]
    mean: Tensor  # [N, chunks, C]
    m2: Tensor  # [N, chunks, C]
    size: tuple[int, int]  # (h, w)

    @property
    def maps(self) -> Tensor:  # [N, C, h, w], channels-last
        """As convolutions take it."""
        return maps_of(self.values, self.size)


def evaluate_stage(
    stage: nn.Module, sources: list[Map], time: TimeVectors, context: PreparedContext
) -> Map:
    """What a `Stage` makes of one map, or of two side by side."""
    assert isinstance(stage, Stage)
    for block in stage:
        if isinstance(block, ResBlock):
            sources = [_res_block(block, sources, time.blocks[block.number])]
        elif isinstance(block, SpatialTransformer):
            sources = [_transformer(block, sources[0], context)]
        elif isinstance(block, Downsample):
            conv = convolution(block.op)
            maps = F.conv2d(sources[0].maps, conv.weight, None, stride=2, padding=1)
            sources = [map_of(maps, conv.bias)]
        else:
            assert isinstance(block, Upsample)
            conv, maps = convolution(block.conv), sources[0].maps
            maps = F.conv_transpose2d(maps, enlarging(conv), None, stride=2, padding=1)
            sources = [map_of(maps, conv.bias)]
    return sources[0]


def first_map(x: Tensor, stage: nn.Module) -> Map:
    """What the first stage makes of the windows [B, C, h, w]."""
    conv = convolution(next(stage.children()))
    x = x.to(conv.weight.dtype, memory_format=torch.channels_last)
    return map_of(F.conv2d(x, conv.weight, None, padding=1), conv.bias)


def output_of(
    out: nn.Sequential,  # of the U-Net
    source: Map,
) -> Tensor:  # [N, C, h, w]
    """What the last norm and convolution make."""
    last = convolution(out[2])
    return F.conv2d(
        maps_of(_norm(out[0], [source]), source.size), last.weight, last.bias, padding=1
    )


def _res_block(
    block: ResBlock,
    sources: list[Map],
    shift: Tensor,  # [1, C]
) -> Map:
    size = sources[0].size
    first, second = convolution(block.in_layers[2]), convolution(block.out_layers[3])
    hidden = maps_of(_norm(block.in_layers[0], sources), size)
    middle = map_of(F.conv2d(hidden, first.weight, None, padding=1))
    hidden = maps_of(_norm(block.out_layers[0], [middle], add=shift), size)
    out = rows_of(F.conv2d(hidden, second.weight, None, padding=1))
    if not isinstance(block.skip_connection, nn.Conv2d):
        return with_statistics(out, size, sources[0].values, second.bias)
    skip = convolution(block.skip_connection)
    weights = skip.weight.flatten(1).split([source.values.shape[2] for source in sources], dim=1)
    other: Tensor | None = None
    for source, weight in zip(sources, weights, strict=True):
        rows = source.values.flatten(0, 1)
        if len(source.values) == len(out):
            out.view(-1, out.shape[2]).addmm_(rows, weight.t())
        else:  # half as many, of a guided pair before its two differ: once for both
            made = (rows @ weight.t()).unflatten(0, source.values.shape[:2])
            other = made if other is None else other + made
    return with_statistics(out, size, other, summed(block, second.bias, skip.bias))


def _transformer(block: SpatialTransformer, source: Map, context: PreparedContext) -> Map:
    into, out = convolution(block.proj_in), convolution(block.proj_out)
    tokens = F.linear(_norm(block.norm, [source]), into.weight.flatten(1), into.bias)
    bias = out.bias
    last = len(block.transformer_blocks) - 1
    for number, inner in enumerate(block.transformer_blocks):
        assert isinstance(inner, BasicTransformerBlock)
        tokens = _tokens(inner, tokens, context.blocks[block.first_block + number])
        after = linear(inner.ff.net[2]).bias
        if number == last:
            bias = carried(block, bias, out.weight, after)
        else:
            tokens += after
    made = tokens @ out.weight.flatten(1).t()
    return with_statistics(made, source.size, source.values, bias)


def _tokens(
    block: BasicTransformerBlock,
    tokens: Tensor,  # [N, L, C], changed
    vectors: TokenVectors,
) -> Tensor:  # [N or 2 N, L, C], without the feed-forward's last bias
    from ssldiff_fast.kernels.rows import layer_norm

    first, norm, before = block.attn1, block.norm3, block.norm1
    # All three products at once: the module's own way to one matrix.
    normed = layer_norm(tokens, before.weight, before.bias, before.eps)
    qkv = F.linear(normed, first._stack())
    mixed = _attention(*(first.split_heads(part) for part in qkv.chunk(3, dim=-1)))
    rows = mixed.transpose(1, 2).flatten(2)
    _accumulate(tokens, rows, linear(first.to_out[0]).weight)
    if len(vectors.values) != len(tokens):
        tokens = torch.cat((tokens, tokens))
    if vectors.keys is not None:
        tokens += linear(first.to_out[0]).bias
    if vectors.keys is None or vectors.offsets is not None:
        tokens, normed = token_attention(
            *(tokens, vectors.values, norm.weight, norm.bias),
            keys=vectors.keys,
            offsets=vectors.offsets,
            heads=1 if vectors.keys is None else block.attn2.heads,
            eps=norm.eps,
        )
    else:
        normed = block.norm2(tokens)
        tokens = block.attn2.attend(normed, vectors.keys, vectors.values, add=tokens)
        normed = norm(tokens)
    gated = _gated(block.ff.net[0], normed)
    _accumulate(tokens, gated, linear(block.ff.net[2]).weight)
    return tokens


def _gated(gates: nn.Module, x: Tensor) -> Tensor:
    from ssldiff_fast.kernels.geglu import HALF, geglu, geglu_linear

    assert isinstance(gates, GEGLU)  # for the type checker
    weight, bias = gates.proj.weight, gates.proj.bias
    # Before Hopper descriptors of tiles are addresses to Triton, and loads wait for each other.
    if x.dtype in HALF and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return geglu_linear(x, weight, bias)
    return geglu(F.linear(x, weight, bias))


def _accumulate(
    tokens: Tensor,  # [N, L, C], changed
    rows: Tensor,  # [N, L, K]
    weight: Tensor,  # [C, K]
) -> None:
    tokens.view(-1, tokens.shape[2]).addmm_(rows.flatten(0, 1), weight.t())


def _attention(
    query: Tensor,  # [N, heads, L, width]
    key: Tensor,
    value: Tensor,
) -> Tensor:  # [N, heads, L, width]
    from ssldiff_fast.kernels.rows import softmax_

    heads, positions, width = query.shape[1:]
    wide = width > WIDE_HEAD and FEW_POSITIONS <= positions <= MOST_POSITIONS
    if not wide:
        return F.scaled_dot_product_attention(query, key, value)
    q, k, v = (part.flatten(0, 1) for part in (query, key, value))
    empty = q.new_empty(()).expand(len(q), positions, positions)
    logits = torch.baddbmm(empty, q, k.mT, beta=0, alpha=width**-0.5)
    return torch.bmm(softmax_(logits), v).unflatten(0, (-1, heads))


def _norm(norm: nn.Module, sources: list[Map], *, add: Tensor | None = None) -> Tensor:
    from ssldiff_fast.kernels.map_statistics import norm_silu

    assert isinstance(norm, GroupNormSiLU)
    return norm_silu(
        [(source.values, source.mean, source.m2) for source in sources],
        norm.num_groups,
        norm.weight,
        norm.bias,
        add=add,
        eps=norm.eps,
        silu=norm.silu,
    )


def map_of(
    maps: Tensor,  # [N, C, h, w], changed where there is a bias
    bias: Tensor | None = None,  # [C]
) -> Map:
    """What a convolution made, with its bias."""
    return with_statistics(rows_of(maps), maps.shape[2:], None, bias)


def with_statistics(
    rows: Tensor,  # [N, L, C], changed where there is something to add
    size: Sequence[int],  # (h, w)
    other: Tensor | None = None,  # [M, L, C]
    bias: Tensor | None = None,  # [C]
) -> Map:
    """The map rows + other + bias."""
    from ssldiff_fast.kernels.map_statistics import add_statistics

    mean, m2 = add_statistics(rows, other, bias)
    return Map(rows, mean, m2, (size[0], size[1]))


def rows_of(maps: Tensor) -> Tensor:  # [N, C, h, w] to [N, L, C]
    """A view where maps are channels-last."""
    return maps.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)


def maps_of(rows: Tensor, size: Sequence[int]) -> Tensor:  # [N, L, C] to [N, C, h, w]
    """A view, channels-last."""
    return rows.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


def convolution(module: nn.Module) -> Any:
    """For the type checker."""
    assert isinstance(module, nn.Conv2d)
    return module


def linear(module: nn.Module) -> Any:
    """For the type checker."""
    assert isinstance(module, nn.Linear)
    return module
