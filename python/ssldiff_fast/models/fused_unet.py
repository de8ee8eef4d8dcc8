# SPDX-License-Identifier: Apache-2.0
"""The U-Net's inference on a GPU, with every map read and written as seldom as it can be.

It reads the parameters of a `UNet` and computes what that computes, up to rounding:

- GroupNorm's statistics are made where a map is written, with the residual and the bias that are
  added to it; two maps side by side (a skip connection) are normed without being joined.
- Biases before a norm travel with the timestep's shift, those before a residual with the residual.
- Nearest-neighbour enlargement and the 3x3 convolution that follows are one transposed convolution
  of stride 2 with a 4x4 filter (each output meets four inputs, not nine): 16 products for 36.
- Products add to the residual stream in place; gates are made where their product is; heads wider
  than any fused attention kernel takes go through products.
- A batch goes in parts that run side by side, so that what waits for memory in one hides behind the
  arithmetic of another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast.models.attention import BasicTransformerBlock, SpatialTransformer
from ssldiff_fast.models.feed_forward import GEGLU
from ssldiff_fast.models.folded import carried, enlarging, summed
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.prepared import PreparedContext, TimeVectors, TokenVectors
from ssldiff_fast.models.side_by_side import side_by_side
from ssldiff_fast.models.unet import UNet
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

# Values of a batch's first map from which on it is halved. On an H200 16 pairs of the published
# model's windows are the faster for it by 2 % and 64 by 8 %, 256 of the bundled one's by 3 %; of
# the latter's 64 are the slower by 5 %, 8 by 16 %.
HALVED = 2**24

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def versions_of(parameters: list[nn.Parameter]) -> tuple[int, ...]:
    """Numbers that change with every change of values in place."""
    return tuple(-1 if p.is_inference() else p._version for p in parameters)


def why_not(unet: UNet) -> str | None:
    """Why a U-Net cannot be evaluated this way; None where it can."""
    config, parameter = unet.config, next(unet.parameters())
    if config.context_dim is None:
        return "it takes no context"
    if config.use_scale_shift_norm or config.resblock_updown or not config.conv_resample:
        return "its residual blocks are not of the published kind"
    if parameter.dtype not in _DTYPES:
        return f"it is in {str(parameter.dtype).removeprefix('torch.')}"
    return None


@dataclass(frozen=True)
class _Map:
    """A feature map, channels-last, and the statistics of its chunks."""

    values: Tensor  # [N, L, C]
    mean: Tensor  # [N, chunks, C]
    m2: Tensor  # [N, chunks, C]
    size: tuple[int, int]  # (h, w)

    @property
    def maps(self) -> Tensor:  # [N, C, h, w], channels-last
        """As convolutions take it."""
        return self.values.unflatten(1, self.size).permute(0, 3, 1, 2)


class FusedUNet:
    """A `UNet` for inference, by kernels of its own (`map_statistics`, `geglu`, `rows`).

    Args:
        unet: whose parameters are read, as they are at each call.

    Raises:
        ValueError: a U-Net of another kind; see `why_not`.
    """

    def __init__(self, unet: UNet) -> None:
        reason = why_not(unet)
        if reason is not None:
            raise ValueError(
                f"FusedUNet: this U-Net cannot be evaluated by it, since {reason}; call the U-Net "
                "itself."
            )
        self.unet = unet
        self._blocks = _transformer_blocks(unet)
        self._read = [
            parameter
            for block in self._blocks
            for part in (block.attn2, block.attn1.to_out)
            for parameter in part.parameters()
        ]
        self._absorbed: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    def prepare(
        self,
        context: Tensor,  # [N, T, D]
    ) -> PreparedContext:
        """As `UNet.prepare`; of one token one product makes the vectors of all blocks, and they
        hold the biases of the self-attentions too."""
        if context.ndim != 3 or context.shape[1:] != (1, self.unet.context_dim):
            return self.unet.prepare(context)
        weight, bias = self._one_token()
        packed = F.linear(context[:, 0].to(weight), weight, bias)
        widths = [block.norm3.normalized_shape[0] for block in self._blocks]
        return PreparedContext.of_one_token(packed, widths)

    @torch.no_grad()
    def _one_token(self) -> tuple[Tensor, Tensor]:
        """W_o W_v and the biases of every block, one below the other, in float32."""
        made_from = versions_of(self._read)
        if self._absorbed is None or self._absorbed[0] != made_from:
            weights, biases = [], []
            for block in self._blocks:
                out, before = _linear(block.attn2.to_out[0]), _linear(block.attn1.to_out[0])
                weights.append(out.weight.double() @ block.attn2.to_v.weight.double())
                biases.append(out.bias.double() + before.bias.double())
            self._absorbed = made_from, torch.cat(weights).float(), torch.cat(biases).float()
        return self._absorbed[1:]

    def prepare_time(
        self,
        t: Tensor,  # [S] or []
    ) -> TimeVectors:
        """As `UNet.prepare_time`, with the biases of the blocks' first convolutions."""
        time = self.unet.prepare_time(t)
        blocks = [b for b in self.unet.modules() if isinstance(b, ResBlock)]
        vectors = []
        for block in sorted(blocks, key=lambda b: b.number):
            shift = time.blocks[block.number]
            vectors.append(shift + _conv(block.in_layers[2]).bias.to(shift.dtype))
        return TimeVectors(tuple(vectors))

    def __call__(
        self,
        x: Tensor,  # [B, C, h, w]
        time: TimeVectors,  # of this object's prepare_time, of one timestep
        context: PreparedContext,  # of this object's prepare, of B windows, or 2 B: guided pairs
    ) -> Tensor:  # [B or 2 B, C, h, w], dtype of x
        """The model output, as `UNet.forward`; float32 is never rounded to TF32, and the same
        input gives the same bits."""
        with torch.no_grad(), exact_convolutions():
            evaluate = partial(self._evaluated, time)
            return side_by_side(evaluate, x, context, parts=parts_of(self.unet, x, context))

    def _evaluated(self, time: TimeVectors, x: Tensor, context: PreparedContext) -> Tensor:
        unet = self.unet
        first = _conv(next(unet.input_blocks[0].children()))
        hidden = _first(x.to(first.weight.dtype), first)
        skips = [hidden]
        for stage in list(unet.input_blocks)[1:]:
            hidden = _stage(stage, [hidden], time, context)
            skips.append(hidden)
        hidden = _stage(unet.middle_block, [hidden], time, context)
        for stage in unet.output_blocks:
            hidden = _stage(stage, [hidden, skips.pop()], time, context)
        last = _conv(unet.out[2])
        maps = _as_maps(_norm(unet.out[0], [hidden]), hidden.size)
        return F.conv2d(maps, last.weight, last.bias, padding=1).to(x.dtype)


def parts_of(unet: UNet, x: Tensor, context: PreparedContext) -> int:
    """How many parts of a batch run side by side."""
    values = (
        len(context) * x[0, 0].numel() * unet.config.model_channels * unet.config.channel_mult[0]
    )
    return 2 if x.is_cuda and len(x) > 1 and values >= HALVED else 1


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """float32 proper and the same bits again: cuDNN's convolutions of float32 keep ten bits of the
    mantissa, and transposed ones sum in any order, unless they are told not to."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic = before


def _transformer_blocks(unet: UNet) -> list[BasicTransformerBlock]:
    """As a prepared context counts them."""
    transformers = [m for m in unet.modules() if isinstance(m, SpatialTransformer)]
    transformers.sort(key=lambda transformer: transformer.first_block)
    blocks = [block for t in transformers for block in t.transformer_blocks]
    return [block for block in blocks if isinstance(block, BasicTransformerBlock)]


def _stage(
    stage: nn.Module, sources: list[_Map], time: TimeVectors, context: PreparedContext
) -> _Map:
    assert isinstance(stage, Stage)
    for block in stage:
        if isinstance(block, ResBlock):
            sources = [_res_block(block, sources, time.blocks[block.number])]
        elif isinstance(block, SpatialTransformer):
            sources = [_transformer(block, sources[0], context)]
        elif isinstance(block, Downsample):
            conv = _conv(block.op)
            maps = F.conv2d(sources[0].maps, conv.weight, None, stride=2, padding=1)
            sources = [_finished(maps, conv.bias)]
        else:
            assert isinstance(block, Upsample)
            conv, maps = _conv(block.conv), sources[0].maps
            maps = F.conv_transpose2d(maps, enlarging(conv), None, stride=2, padding=1)
            sources = [_finished(maps, conv.bias)]
    return sources[0]


def _first(x: Tensor, conv: nn.Conv2d) -> _Map:
    maps = F.conv2d(x.contiguous(memory_format=torch.channels_last), conv.weight, None, padding=1)
    return _finished(maps, conv.bias)


def _res_block(
    block: ResBlock,
    sources: list[_Map],
    shift: Tensor,  # [1, C]
) -> _Map:
    size = sources[0].size
    first, second = _conv(block.in_layers[2]), _conv(block.out_layers[3])
    hidden = _as_maps(_norm(block.in_layers[0], sources), size)
    middle = _finished(F.conv2d(hidden, first.weight, None, padding=1), None)
    hidden = _as_maps(_norm(block.out_layers[0], [middle], add=shift), size)
    out = _rows(F.conv2d(hidden, second.weight, None, padding=1))
    if not isinstance(block.skip_connection, nn.Conv2d):
        return _added(out, size, sources[0].values, second.bias)
    skip = _conv(block.skip_connection)
    weights = skip.weight.flatten(1).split([source.values.shape[2] for source in sources], dim=1)
    other: Tensor | None = None
    for source, weight in zip(sources, weights, strict=True):
        rows = source.values.flatten(0, 1)
        if len(source.values) == len(out):
            out.view(-1, out.shape[2]).addmm_(rows, weight.t())
        else:  # half as many, of a guided pair before its two differ: once for both
            made = (rows @ weight.t()).unflatten(0, source.values.shape[:2])
            other = made if other is None else other + made
    return _added(out, size, other, summed(block, second.bias, skip.bias))


def _transformer(block: SpatialTransformer, source: _Map, context: PreparedContext) -> _Map:
    into, out = _conv(block.proj_in), _conv(block.proj_out)
    tokens = F.linear(_norm(block.norm, [source]), into.weight.flatten(1), into.bias)
    bias = out.bias
    last = len(block.transformer_blocks) - 1
    for number, inner in enumerate(block.transformer_blocks):
        assert isinstance(inner, BasicTransformerBlock)
        tokens = _tokens(inner, tokens, context.blocks[block.first_block + number])
        after = _linear(inner.ff.net[2]).bias
        if number == last:
            bias = carried(block, bias, out.weight, after)
        else:
            tokens += after
    made = tokens @ out.weight.flatten(1).t()
    return _added(made, source.size, source.values, bias)


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
    _accumulate(tokens, rows, _linear(first.to_out[0]).weight)
    if len(vectors.values) != len(tokens):
        tokens = torch.cat((tokens, tokens))
    if vectors.keys is not None:
        tokens += _linear(first.to_out[0]).bias
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
    _accumulate(tokens, gated, _linear(block.ff.net[2]).weight)
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


def _norm(norm: nn.Module, sources: list[_Map], *, add: Tensor | None = None) -> Tensor:
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


def _finished(maps: Tensor, bias: Tensor | None) -> _Map:
    """What a convolution made, [N, C, h, w], with its bias."""
    return _added(_rows(maps), (maps.shape[2], maps.shape[3]), None, bias)


def _added(
    rows: Tensor,  # [N, L, C], changed
    size: tuple[int, int],
    other: Tensor | None,  # [M, L, C]
    bias: Tensor | None,  # [C]
) -> _Map:
    from ssldiff_fast.kernels.map_statistics import add_statistics

    mean, m2 = add_statistics(rows, other, bias)
    return _Map(rows, mean, m2, size)


def _rows(maps: Tensor) -> Tensor:  # [N, C, h, w] to [N, L, C]
    return maps.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)


def _as_maps(rows: Tensor, size: tuple[int, int]) -> Tensor:  # [N, L, C] to [N, C, h, w]
    return rows.unflatten(1, size).permute(0, 3, 1, 2)


def _conv(module: nn.Module) -> Any:
    assert isinstance(module, nn.Conv2d)
    return module


def _linear(module: nn.Module) -> Any:
    assert isinstance(module, nn.Linear)
    return module
