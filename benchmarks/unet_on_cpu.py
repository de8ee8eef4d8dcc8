# SPDX-License-Identifier: Apache-2.0
"""What unet.py measures on a CPU alone: tricks left out one at a time, their prediction, kinds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sampler import matrix_rate
from ssldiff_fast.models import products
from ssldiff_fast.models.attention import CrossAttention
from ssldiff_fast.models.feed_forward import FeedForward
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.unet_blocks import ResBlock
from ssldiff_fast.models.winograd import Conv3x3, serves
from timing import alternate, copy_bandwidth

if TYPE_CHECKING:
    from unet import Pairs

Evaluation = Callable[[], Tensor]
# A convolution by Winograd's F(4x4, 3x3) has a quarter of the products, and transforms beside them.
WINOGRAD = 0.25 * 1.15


def without_each(pairs: Pairs) -> dict[str, Evaluation]:
    """Ours without one trick each."""

    def without(change: Any) -> Tensor:
        with change:
            return pairs.ours()

    def twice() -> Tensor:
        return pairs.last(pairs.x.repeat(2, 1, 1, 1), pairs.time, pairs.prepared)

    changes = {
        "group_norm_silu": patch.object(GroupNormSiLU, "forward", _plain_norm),
        "q, k, v in one product": patch(
            "ssldiff_fast.models.attention.is_inference", lambda x: False
        ),
        "Winograd's convolutions": patch("ssldiff_fast.models.winograd.serves", lambda conv: False),
    }
    if pairs.dtype == torch.float32:
        changes["feed_forward"] = patch(
            "ssldiff_fast.models.feed_forward.is_fused", lambda *_: False
        )
        changes["products by oneDNN"] = patch.object(products, "has_onednn", lambda: False)
    else:
        changes["geglu"] = patch("ssldiff_fast.models.feed_forward.geglu", _plain_geglu)
        changes["attention by products"] = patch(
            "ssldiff_fast.models.attention.attention", F.scaled_dot_product_attention
        )
    return {
        "shared prefix": twice,
        "prepared tokens": lambda: pairs.last(pairs.x, pairs.time, pairs.context),
        "prepared timesteps": lambda: pairs.last(pairs.x, pairs.t[:1].squeeze(), pairs.prepared),
        **{name: partial(without, change) for name, change in changes.items()},
    }


def _plain_norm(self: GroupNormSiLU, x: Tensor, **options: Any) -> Tensor:
    """GroupNormSiLU in passes of their own."""
    add, scale, shift = (options.get(name) for name in ("add", "scale", "shift"))
    x = x if add is None else x + add[:, :, None, None].to(x.dtype)
    x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
    x = x if scale is None else x * (1 + scale[:, :, None, None].to(x.dtype))
    x = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    return F.silu(x) if self.silu else x


def _plain_geglu(projected: Tensor) -> Tensor:
    values, gates = projected.chunk(2, dim=-1)
    return values * F.gelu(gates)


@dataclass
class _Work:
    """Multiplications and values of one evaluation."""

    winograd: float = 0.0  # as direct convolutions
    products: float = 0.0  # linear layers, 1x1 convolutions and attention
    other: float = 0.0
    shared_winograd: float = 0.0  # before the context
    shared_other: float = 0.0
    qkv: float = 0.0  # of the products
    tokens: float = 0.0
    timesteps: float = 0.0
    normed: float = 0.0  # values, once more for each addition before the norm
    inner: float = 0.0  # values of the feed-forwards' inner layers
    attended: float = 0.0  # values of the maps that are projected to q, k and v


def _work(pairs: Pairs) -> _Work:
    """Counted on one window."""
    work = _Work()
    seen = False

    def count(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal seen
        seen = seen or isinstance(module, CrossAttention)
        if isinstance(module, nn.Conv2d):
            done = out.numel() * module.weight[0].numel()
            if isinstance(module, Conv3x3) and serves(module):
                work.winograd += done
                work.shared_winograd += 0 if seen else done
            else:
                work.other += done
                work.shared_other += 0 if seen else done
        elif isinstance(module, CrossAttention):
            _, length, width = args[0].shape
            work.qkv += 3 * length * width**2
            work.products += 4 * length * width**2 + 2 * length**2 * width
            work.attended += length * width
        elif isinstance(module, FeedForward):
            _, length, width = args[0].shape
            work.products += 12 * length * width**2
            work.inner += 4 * length * width
        elif isinstance(module, GroupNormSiLU):
            work.normed += out.numel() * (1 if module.silu else 0)
        elif isinstance(module, ResBlock):
            work.normed += out.numel()
            work.timesteps += sum(p.numel() for p in module.emb_layers.parameters())

    def conv1x1(x: Tensor, conv: nn.Module, **options: Any) -> Tensor:
        weight = conv.weight
        assert isinstance(weight, Tensor)
        work.products += x[:, 0].numel() * weight.numel()
        return products.conv1x1(x, conv, **options)

    hooks = [module.register_forward_hook(count) for module in pairs.last.modules()]
    context = pairs.last.prepare(pairs.context[:1])
    with (
        patch("ssldiff_fast.models.attention.conv1x1", conv1x1),
        patch("ssldiff_fast.models.unet_blocks.conv1x1", conv1x1),
    ):
        pairs.last(pairs.x[:1], pairs.time, context)
    for hook in hooks:
        hook.remove()
    for name, parameter in pairs.last.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out" in name:
            work.tokens += parameter.numel()
    return work


def predicted(pairs: Pairs) -> dict[str, float]:
    """How many times longer ours takes without a trick: from the operations and passes that it
    saves, the machine's matrix rate and copy bandwidth, and the ratio of two products."""
    work, size = _work(pairs), pairs.x.new_empty(0, dtype=pairs.dtype).element_size()
    # As the convolutions of Winograd's are counted, all of one evaluation of a pair.
    shared = work.shared_winograd * WINOGRAD + work.shared_other
    whole = work.winograd * WINOGRAD + work.products + work.other - shared / 2
    rate = matrix_rate("cpu", pairs.dtype) * 1e12 / 2
    bandwidth = copy_bandwidth(torch.empty(2**25, dtype=torch.uint8)) * 1e9
    passes = 2 * size / bandwidth * rate / whole  # of one value read and written once more

    found = {
        "shared prefix": 1 + shared / 2 / whole,
        "prepared tokens": 1 + work.tokens / whole,
        "prepared timesteps": 1 + work.timesteps / len(pairs.context) / whole,
        "group_norm_silu": 1 + work.normed * passes,
        "q, k, v in one product": 1 + work.attended * passes,
        "Winograd's convolutions": 1
        + (1 - WINOGRAD) * (work.winograd - work.shared_winograd / 2) / whole,
    }
    if pairs.dtype == torch.float32:
        x, weight = (torch.randn(*s) for s in ((2048, 384), (1536, 384)))
        times = alternate(
            {"plain": lambda: F.linear(x, weight), "ours": lambda: products.linear(x, weight)}, 9
        )
        ratio = times["plain"]["median_ms"] / times["ours"]["median_ms"]
        found["products by oneDNN"] = 1 + (ratio - 1) * work.products / whole
        found["feed_forward"] = 1 + 3 * work.inner * passes
    else:
        found["geglu"] = 1 + work.inner * passes
    return {name: round(value, 3) for name, value in found.items()}


def kinds_of_layers(pairs: Pairs) -> dict[str, float]:
    """Share of the time of ours by kind of layer."""
    kinds: dict[type[nn.Module], str] = {
        Conv3x3: "3x3 convolutions",
        nn.Conv2d: "other convolutions",
        GroupNormSiLU: "group_norm_silu",
        CrossAttention: "self-attention",
        FeedForward: "feed-forward",
        nn.LayerNorm: "first LayerNorm",
    }
    spent = dict.fromkeys(kinds.values(), 0.0)
    starts: list[float] = []
    hooks = []
    for module in pairs.last.modules():
        if type(module) in kinds:
            hooks.append(
                module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
            )

            def stop(module: nn.Module, *_: Any) -> None:
                spent[kinds[type(module)]] += time.perf_counter() - starts.pop()

            hooks.append(module.register_forward_hook(stop))
    start = time.perf_counter()
    pairs.ours()
    whole = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    shares = {name: round(seconds / whole, 3) for name, seconds in spent.items()}
    return {**shares, "1x1 convolutions and the rest": round(1 - sum(shares.values()), 3)}
