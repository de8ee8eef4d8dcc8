# SPDX-License-Identifier: Apache-2.0
"""The feed-forward of a transformer block, with the published parameter names.

In float32 inference on a CPU it is one operator: some rows at a time go through both products, and
the inner layer, four to eight times as wide as the map, is never written to memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssldiff_fast import _C
from ssldiff_fast.models.packed import PANEL, PackedWeights, panels, takes_panels
from ssldiff_fast.models.products import geglu, linear


class GEGLU(nn.Module):
    """Gated GELU: `a * gelu(b)` with `a, b` the two halves of one projection."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner_width * 2)

    def forward(
        self,
        x: Tensor,  # [B, L, C]
    ) -> Tensor:  # [B, L, inner]
        return geglu(linear(x, self.proj.weight, self.proj.bias))


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
        *,
        add: Tensor | None = None,  # [B, L, C]
    ) -> Tensor:  # [B, L, C]
        """The network of `x`, plus another tensor."""
        gates, dropout, back = self.net
        assert isinstance(back, nn.Linear)  # for the type checker
        if is_fused(self, x, add):
            return fused(self, x, add=add)
        return linear(dropout(gates(x)), back.weight, back.bias, add=add)

    def _apply(self, *args: Any, **options: Any) -> FeedForward:
        _packed.forget(self)
        super()._apply(*args, **options)
        return self


def is_fused(
    module: Any,  # with the `net` of FeedForward, or of diffusers' FeedForward
    x: Tensor,  # [..., C]
    add: Tensor | None = None,  # [..., C]
) -> bool:
    """Whether a feed-forward of this input is one operator."""
    gates, dropout, back = module.net
    layers = (gates.proj, back)
    plain = all(type(layer) is nn.Linear and layer.bias is not None for layer in layers)
    return (
        plain
        and takes_panels(x, add, *(p for layer in layers for p in (layer.weight, layer.bias)))
        and back.in_features % (PANEL // 2) == 0
        and not (module.training and dropout.p)
    )


def fused(
    module: Any,  # for which `is_fused`
    x: Tensor,  # [..., C]
    *,
    add: Tensor | None = None,  # [..., C]
) -> Tensor:  # [..., C]
    """The feed-forward as one operator, without gradient."""
    proj, back = module.net[0].proj, module.net[2]
    inward, bias, outward = _packed.of(module, proj.weight, proj.bias, back.weight)
    rows = x.reshape(-1, x.shape[-1])
    added = None if add is None else add.reshape(-1, back.out_features)
    out: Tensor = torch.ops.ssldiff.feed_forward(rows, inward, bias, outward, back.bias, added)
    return out.view(*x.shape[:-1], back.out_features)


def _pack(
    weight: Tensor,  # [2 inner, C], values and gates
    bias: Tensor,  # [2 inner]
    back: Tensor,  # [out, inner]
) -> tuple[Tensor, ...]:
    """Both weights by panels; one of the first holds half a panel of values and their gates."""
    order = torch.arange(len(weight)).view(2, -1, PANEL // 2).transpose(0, 1).flatten()
    return panels(weight[order]), bias[order].detach(), panels(back)


_packed = PackedWeights(_pack)


def _fake_feed_forward(
    x: Tensor, inward: Tensor, bias: Tensor, outward: Tensor, out_bias: Tensor, add: Tensor | None
) -> Tensor:
    return x.new_empty(len(x), len(out_bias))


if _C.CPU_PROBLEM is None:
    torch.library.register_fake("ssldiff::feed_forward", _fake_feed_forward)
