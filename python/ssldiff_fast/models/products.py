# SPDX-License-Identifier: Apache-2.0
"""Matrix products and attention of the networks, each by the fastest way there is for it.

In inference on a CPU, products of float32 go to oneDNN. PyTorch sends them to MKL, which on
processors of other makers than Intel's runs at less than half the rate (measured on an AVX-512
machine: 95 GFLOP/s beside 208), and oneDNN adds what follows the product before it is stored.
bfloat16 goes to oneDNN by PyTorch itself, which is the faster way for it (1.2 times, small model).
Everywhere else (training, GPUs, torch.compile, which fuses by itself) these are plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast import _C

# Subclasses of tensors have products of their own.
_PLAIN = (torch.Tensor, nn.Parameter)


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    add: Tensor | None = None,  # [..., N]
) -> Tensor:  # [..., N]
    """`x weight' + bias`, plus another tensor."""
    if _takes_onednn(x, weight, bias, add):
        # By overload: to choose among them PyTorch writes down the values of the weights first,
        # which takes 1.5 ms a product.
        product = torch.ops.mkldnn._linear_pointwise
        if add is not None:
            return product.binary(x, add, weight, bias, "add")
        return product.default(x, weight, bias, "none", [], "none")
    out = F.linear(x, weight, bias)
    return out if add is None else add + out


def geglu(
    projected: Tensor,  # [B, L, 2 N], values and gates
) -> Tensor:  # [B, L, N]
    """`values * gelu(gates)`; in inference on a CPU in one pass by a kernel of ours.

    PyTorch's and oneDNN's GELU take longer than the feed-forward's products (measured at 8192 x
    256: 8 ms beside 2.5).
    """
    halves = (torch.float32, torch.bfloat16, torch.float16)
    ours = is_eager_inference(projected) and projected.dtype in halves
    if ours and projected.is_contiguous() and type(projected) in _PLAIN and not _C.CPU_PROBLEM:
        return torch.ops.ssldiff.geglu(projected)
    values, gates = projected.chunk(2, dim=-1)
    return values * F.gelu(gates)


def widened(
    layer: nn.Module,  # a Linear
    x: Tensor,  # [..., K]
) -> Tensor:  # [..., N]
    """The layer with its parameters in the dtype of `x`."""
    assert isinstance(layer, nn.Linear)  # for the type checker
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return linear(x, layer.weight.to(x.dtype), bias)


def twice(
    maps: Tensor,  # [B, C, h, w]
) -> Tensor:  # [2 B, C, h, w], channels-last
    """The maps, then the same again. (`repeat` and `cat` of maps themselves lose the layout.)"""
    return maps.permute(0, 2, 3, 1).repeat(2, 1, 1, 1).permute(0, 3, 1, 2)


def conv1x1(
    x: Tensor,  # [B, C, h, w], best channels-last
    conv: nn.Module,  # a Conv2d of kernel 1
    *,
    add: Tensor | None = None,  # [B, out, h, w]
) -> Tensor:  # [B, out, h, w], channels-last
    """A 1x1 convolution as the product that it is, plus another map."""
    assert isinstance(conv, nn.Conv2d)  # for the type checker
    added = None if add is None else add.permute(0, 2, 3, 1)
    out = linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias, add=added)
    return out.permute(0, 3, 1, 2)


def attention(
    query: Tensor,  # [B, heads, L, width]
    key: Tensor,  # [B, heads, T, width]
    value: Tensor,  # [B, heads, T, width]
) -> Tensor:  # [B, heads, L, width]
    """softmax(query key' / sqrt(width)) value."""
    if is_eager_inference(query) and query.dtype == torch.bfloat16:
        # The flash kernel multiplies in float32 on CPUs without AMX: up to twice as slow.
        return _by_products(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def _by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = (query * query.shape[-1] ** -0.5) @ key.mT
    return logits.softmax(-1) @ value


def has_onednn() -> bool:
    """Whether this PyTorch multiplies by oneDNN on a CPU."""
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_inference(x: Tensor) -> bool:
    """Whether neither gradients nor autocast need each parameter by itself."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return not torch.is_grad_enabled() and not casts


def is_eager_inference(x: Tensor) -> bool:
    """Whether gradients, compilers and autocast leave the choice of kernels to us, on a CPU."""
    return x.device.type == "cpu" and is_inference(x) and not torch.compiler.is_compiling()


def _takes_onednn(x: Tensor, *others: Any) -> bool:
    if not is_eager_inference(x) or x.dtype != torch.float32 or x.numel() == 0:
        return False
    given = [x, *(other for other in others if other is not None)]
    # Any stride but the contiguous one falls to a loop that is a thousand times slower.
    plain = all(type(t) in _PLAIN and t.is_contiguous() and t.dtype == x.dtype for t in given)
    return plain and has_onednn()


def _fake_geglu(projected: Tensor) -> Tensor:
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)


if _C.CPU_PROBLEM is None:
    torch.library.register_fake("ssldiff::geglu", _fake_geglu)
