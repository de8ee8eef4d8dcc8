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
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast.models.attention import BasicTransformerBlock, SpatialTransformer
from ssldiff_fast.models.fused_blocks import (
    convolution,
    evaluate_stage,
    first_map,
    linear,
    maps_of,
    output_of,
    rows_of,
    with_statistics,
)
from ssldiff_fast.models.prepared import PreparedContext, TimeVectors
from ssldiff_fast.models.side_by_side import side_by_side
from ssldiff_fast.models.unet import UNet
from ssldiff_fast.models.unet_blocks import ResBlock

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
                out, before = linear(block.attn2.to_out[0]), linear(block.attn1.to_out[0])
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
            vectors.append(shift + convolution(block.in_layers[2]).bias.to(shift.dtype))
        return TimeVectors(tuple(vectors))

    def __call__(
        self,
        x: Tensor,  # [B, C, h, w]
        time: TimeVectors,  # of this object's prepare_time, of one timestep
        context: PreparedContext,  # of this object's prepare, of B windows, or 2 B: guided pairs
    ) -> Tensor:  # [B or 2 B, C, h, w], dtype of x
        """The model output, as `UNet.forward`; float32 is never rounded to TF32, and the same
        input gives the same bits."""

        def evaluate(x: Tensor, context: PreparedContext) -> tuple[Tensor]:
            return (self._evaluated(time, x, context)[0],)

        with torch.no_grad(), exact_convolutions():
            return side_by_side(evaluate, x, context, parts=parts_of(self.unet, x, context))[0]

    def with_deep(
        self,
        x: Tensor,  # [B, C, h, w]
        time: TimeVectors,
        context: PreparedContext,
        deep: Tensor | None = None,  # [B or 2 B, width, h, w]
    ) -> tuple[Tensor, Tensor]:  # [B or 2 B, C, h, w], and like `deep`
        """As `UNet.with_deep`."""
        given = () if deep is None else (rows_of(deep),)
        with torch.no_grad(), exact_convolutions():
            evaluate, parts = partial(self._evaluated, time), parts_of(self.unet, x, context)
            out, made = side_by_side(evaluate, x, context, *given, parts=parts)
            return out, maps_of(made, x.shape[2:])

    def _evaluated(
        self,
        time: TimeVectors,
        x: Tensor,  # [B, C, h, w]
        context: PreparedContext,
        deep: Tensor | None = None,  # [B or 2 B, L, width]
    ) -> tuple[Tensor, Tensor]:  # [B or 2 B, C, h, w], and like `deep`
        """The output, and what the lower levels hand to the outermost one, which alone is evaluated
        where that is given."""
        outer = self.unet.config.num_res_blocks + 1  # stages of the outermost level on either side
        down, up = list(self.unet.input_blocks), list(self.unet.output_blocks)
        hidden = first_map(x, down[0])
        skips = [hidden]
        for stage in down[1:] if deep is None else down[1:outer]:
            hidden = evaluate_stage(stage, [hidden], time, context)
            skips.append(hidden)
        if deep is None:
            hidden = evaluate_stage(self.unet.middle_block, [hidden], time, context)
            for stage in up[:-outer]:
                hidden = evaluate_stage(stage, [hidden, skips.pop()], time, context)
            deep = hidden.values
        else:
            hidden = with_statistics(deep, hidden.size)
        for stage in up[-outer:]:
            hidden = evaluate_stage(stage, [hidden, skips.pop()], time, context)
        return output_of(self.unet.out, hidden).to(x.dtype), deep


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
