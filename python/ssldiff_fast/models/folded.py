# SPDX-License-Identifier: Apache-2.0
"""What the fused U-Net makes of weights once: filters that enlarge, and biases that meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssldiff_fast.models.packed import PackedWeights


def _enlarged(weight: Tensor) -> tuple[Tensor]:
    w = weight.detach().double()
    for axis in (2, 3):
        a, b, c = w.unbind(axis)
        w = torch.stack((c, b + c, a + b, a), axis)
    made = w.transpose(0, 1).to(weight.dtype)
    return (made.contiguous(memory_format=torch.channels_last),)


def _product_added(bias: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor]:
    return (bias + weight.flatten(1) @ before,)


_filters = PackedWeights(_enlarged)
_sums = PackedWeights(lambda first, second: (first + second,))
_products = PackedWeights(_product_added)


def enlarging(conv: nn.Conv2d) -> Tensor:  # [C, out, 4, 4]
    """The filter with which a transposed convolution of stride 2 is `conv` of the enlarged map.

    With out(p) = sum_d w(d) up(p + d - 1) and up(q) = x(q // 2), the input i meets the output p by
    w(2 - k) + w(3 - k), where k = p + 1 - 2 i is one of 0 to 3 and w is zero outside 0 to 2.
    """
    return _filters.of(conv, conv.weight)[0]


def summed(
    module: nn.Module,
    first: Tensor,  # [C]
    second: Tensor,  # [C]
) -> Tensor:  # [C]
    """Two biases of a module that are added to the same map."""
    return _sums.of(module, first, second)[0]


def carried(
    module: nn.Module,
    bias: Tensor,  # [C]
    weight: Tensor,  # [C, K, ...] of a product
    before: Tensor,  # [K]
) -> Tensor:  # [C]
    """A module's last bias, and with it one that its last product would have met."""
    return _products.of(module, bias, weight, before)[0]
