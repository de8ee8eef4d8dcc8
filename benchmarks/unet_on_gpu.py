# SPDX-License-Identifier: Apache-2.0
"""What unet.py measures on a GPU alone: tricks left out one at a time, and kinds of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ssldiff_fast.models import UNet, fused_blocks, fused_unet
from ssldiff_fast.models.execution import GraphedNetwork, Network
from ssldiff_fast.models.feed_forward import GEGLU
from ssldiff_fast.models.fused_unet import FusedUNet
from timing import alternate

if TYPE_CHECKING:
    from unet import Pairs

Evaluation = Callable[[], Tensor]
# Words in the names of kernels, the first that fits counts.
KINDS = {
    "convolutions": ("fprop", "dgrad", "convolve", "cutlass__5x_cudnn"),
    "other products": ("nvjet", "gemm", "cutlass"),
    "norm_silu": ("norm_kernel", "combine_kernel"),
    "add_statistics": ("add_statistics",),
    "gates and their product": ("geglu",),
    "LayerNorm and tokens": ("layer_norm", "token_attention"),
    "softmax and attention": ("softmax", "fmha", "sdpa", "flash"),
}

# How many times longer without each at the published size, where that was foretold: by the times of
# parts that were measured alone, on an H100 or an H200, or by the arithmetic saved.
PREDICTED = {
    "fused maps": 1.59,
    "the shared prefix": 1.04,
    "the transposed convolution": 1.05,
    "wide heads by products": 1.1,
    "softmax in place": 1.006,
    "gates in their product": 1.03,
    "halves side by side": 1.04,
}


def without_each(pairs: Pairs) -> dict[str, Evaluation]:
    """Ours without one trick each, as graphs but for the graph itself."""
    from ssldiff_fast.kernels import rows  # needs Triton, which CPUs may lack

    unet = pairs.last

    def graphed(network: Network, change: Any = None, repeat: int = 1) -> Evaluation:
        kept = GraphedNetwork(network, unet)
        context = kept.prepare(pairs.context)
        time, x = kept.prepare_time(pairs.t[0]), pairs.x.repeat(repeat, 1, 1, 1)
        if change is not None:
            with change:  # captured now, replayed later
                kept(x, time, context)
        return lambda: kept(x, time, context)

    eager = FusedUNet(unet)
    context, time = eager.prepare(pairs.context), eager.prepare_time(pairs.t[0])
    return {
        "the graph": lambda: eager(pairs.x, time, context),
        "fused maps": graphed(unet),
        "the shared prefix": graphed(FusedUNet(unet), repeat=2),
        "the transposed convolution": graphed(
            FusedUNet(unet), patch.object(F, "conv_transpose2d", _Enlarging(unet))
        ),
        "wide heads by products": graphed(
            FusedUNet(unet), patch.object(fused_blocks, "WIDE_HEAD", 10**9)
        ),
        "softmax in place": graphed(FusedUNet(unet), patch.object(rows, "softmax_", _softmax)),
        "gates in their product": graphed(
            FusedUNet(unet), patch.object(fused_blocks, "_gated", _gated)
        ),
        "halves side by side": graphed(FusedUNet(unet), patch.object(fused_unet, "HALVED", 2**60)),
    }


def reuse(pairs: Pairs, rounds: int) -> dict[str, float]:
    """The outermost level's share of an evaluation, and what follows for reusing the rest."""
    given = pairs.x, pairs.time, pairs.prepared
    _, deep = pairs.network.with_deep(*given)
    times = alternate(
        {
            "whole": lambda: pairs.network(*given),
            "whole, kept": lambda: pairs.network.with_deep(*given),
            "outermost level": lambda: pairs.network.with_deep(*given, deep),
        },
        3 * rounds,
        pairs.device,
    )
    exact, kept, outer = (one["median_ms"] for one in times.values())
    return {
        "share": round(outer / exact, 3),
        **{f"times faster by {n}": round(n * exact / (kept + (n - 1) * outer), 3) for n in (2, 3)},
        "megabytes of a window": round(deep.nbytes / len(pairs.x) / 1e6, 3),
    }


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _gated(gates: nn.Module, x: Tensor) -> Tensor:
    from ssldiff_fast.kernels.geglu import geglu

    assert isinstance(gates, GEGLU)
    return geglu(F.linear(x, gates.proj.weight, gates.proj.bias))


class _Enlarging:
    """Enlargement, then the convolution, in place of the transposed one."""

    def __init__(self, unet: UNet) -> None:
        convolutions = [m for m in unet.modules() if isinstance(m, nn.Conv2d)]
        self._of = {c.in_channels: c for c in convolutions if _is_square(c)}

    def __call__(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
        conv = self._of[x.shape[1]]
        return F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, None, padding=1)


def _is_square(conv: nn.Conv2d) -> bool:
    same = conv.in_channels == conv.out_channels
    return same and conv.kernel_size == (3, 3) and conv.stride == (1, 1)


def kinds_of_kernels(pairs: Pairs) -> dict[str, float]:
    """Share of the GPU's time by kind of kernel."""
    spent = _microseconds(pairs)
    whole = sum(spent.values())
    return {kind: round(own / whole, 3) for kind, own in spent.items()}


def prefix_by_kind(pairs: Pairs) -> dict[str, float]:
    """How many times longer each kind of kernel takes where guided pairs share no prefix: where
    the whole is no longer, what the prefix saves shows here, and what loses that again."""
    shared, apart = _microseconds(pairs), _microseconds(pairs, repeat=2)
    return {kind: round(apart[kind] / own, 3) for kind, own in shared.items() if own}


def _microseconds(pairs: Pairs, repeat: int = 1) -> dict[str, float]:
    """Of an evaluation on a GPU by kind of kernel; the windows come `repeat` times."""
    eager = FusedUNet(pairs.last)
    context, time = eager.prepare(pairs.context), eager.prepare_time(pairs.t[0])
    x = pairs.x.repeat(repeat, 1, 1, 1)
    eager(x, time, context)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        eager(x, time, context)
        torch.cuda.synchronize()
    spent = dict.fromkeys([*KINDS, "all else"], 0.0)
    for event in found.key_averages():
        named = (kind for kind, words in KINDS.items() if any(w in event.key for w in words))
        spent[next(named, "all else")] += event.self_device_time_total
    return spent
