# SPDX-License-Identifier: Apache-2.0
"""What options.py measures of int8 on a CPU: PyTorch's operators for it beside ours, by layer.

"int8" has the quantisation of its input, which varies from step to step, before it; "int8 ready"
has not: the limit of what a norm that writes int8 itself could give. (fp8 has no arithmetic on any
CPU that PyTorch knows: its products are made in another type.)
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from report import RESULTS
from ssldiff_fast.models import UNet, products
from ssldiff_fast.models.winograd import Conv3x3
from timing import alternate

# Rows, columns in and out of products: 16 guided pairs of the demo's, 2 of the published size.
PRODUCTS = {
    "demo: q, k, v of 64": (8192, 64, 192),
    "demo: gates of 64": (8192, 64, 512),
    "demo: after the gates, 64": (8192, 256, 64),
    "demo: q, k, v of 128": (2048, 128, 384),
    "demo: gates of 128": (2048, 128, 1024),
    "demo: 1x1 of a skip connection": (32768, 128, 64),
    "paper: q, k, v of 384": (4096, 384, 1152),
    "paper: gates of 384": (4096, 384, 3072),
    "paper: after the gates, 384": (4096, 1536, 384),
    "paper: gates of 960": (256, 960, 7680),
}
# Maps, channels, side, channels out of 3x3 convolutions.
CONVOLUTIONS = {
    "demo: 3x3, 128 to 64 at 32": (32, 128, 32, 64),
    "demo: 3x3, 64 to 64 at 32": (32, 64, 32, 64),
    "demo: 3x3, 128 to 64 at 16": (32, 128, 16, 64),
    "demo: 3x3, 256 to 128 at 8": (32, 256, 8, 128),
    "paper: 3x3, 384 to 192 at 64": (4, 384, 64, 192),
    "paper: 3x3, 768 to 384 at 32": (4, 768, 32, 384),
    "paper: 3x3, 1920 to 960 at 8": (4, 1920, 8, 960),
}
ROUNDS = 15
ZERO = 128  # of uint8 activations
_PLAIN: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")  # float32 out, nothing after
Function = Callable[[], Tensor]


def by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:  # int8 like it, and fp32 [out]
    """Symmetric int8 of each output channel, and the scales."""
    scales = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    rounded = (weight / scales.view(-1, *[1] * (weight.ndim - 1))).round()
    return rounded.to(torch.int8), scales


def round_weights(unet: UNet) -> None:
    """The weights of all products and convolutions as int8 by output channel, in place."""
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            values, scales = by_channel(module.weight.data)
            module.weight.data = values * scales.view(-1, *[1] * (values.ndim - 1))


def _quantised(x: Tensor) -> tuple[Tensor, float]:  # uint8, and the scale
    scale = float(x.abs().amax()) / 127
    return torch.quantize_per_tensor(x, scale, ZERO, torch.quint8).int_repr(), scale


def _product(rows: int, width: int, out: int) -> dict[str, Function]:
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
    weight /= width**0.5
    halves = [y.to(torch.bfloat16) for y in (x, weight, bias)]
    values, scales = by_channel(weight)
    of_half, packed = scales.to(torch.bfloat16), torch.ops.onednn.qlinear_prepack(values, None)
    zeros, columns = torch.zeros(out, dtype=torch.int64), values.t().contiguous()
    ready = _quantised(x)
    signed = (ready[0].to(torch.int16) - ZERO).to(torch.int8)

    def int8(given: tuple[Tensor, float]) -> Tensor:
        operator: Callable[..., Tensor] = torch.ops.onednn.qlinear_pointwise.default
        return operator(given[0], given[1], ZERO, packed, scales, zeros, bias, *_PLAIN)

    return {
        "float32": lambda: products.linear(x, weight, bias),
        "bfloat16": lambda: F.linear(*halves),
        "int8 ready": lambda: int8(ready),
        "int8": lambda: int8(_quantised(x)),
        "_int_mm ready": lambda: torch._int_mm(signed, columns) * (scales * ready[1]) + bias,
        "int8 weights alone": lambda: (
            torch.ops.aten._weight_int8pack_mm(halves[0], values, of_half) + halves[2]
        ),
    }


def _convolution(maps: int, channels: int, side: int, out: int) -> dict[str, Function]:
    conv = Conv3x3(channels, out)
    half = Conv3x3(channels, out).to(torch.bfloat16)
    half.load_state_dict(conv.state_dict())
    x = torch.randn(maps, channels, side, side).contiguous(memory_format=torch.channels_last)
    of_half = x.to(torch.bfloat16)
    ready = _quantised(x)
    values, scales = by_channel(conv.weight.detach())
    ones = ([1, 1], [1, 1], [1, 1])  # stride, padding, dilation
    prepack: Callable[..., Tensor] = torch.ops.onednn.qconv_prepack
    packed = prepack(values, scales, ready[1], ZERO, *ones, 1, list(x.shape))
    zeros = torch.zeros(out, dtype=torch.int64)

    def int8(given: tuple[Tensor, float]) -> Tensor:
        operator: Callable[..., Tensor] = torch.ops.onednn.qconv_pointwise.default
        made = (given[0], given[1], ZERO, packed, scales, zeros, conv.bias, *ones, 1)
        return operator(*made, *_PLAIN)

    return {
        "float32": lambda: conv(x),
        "bfloat16": lambda: half(of_half),
        "int8 ready": lambda: int8(ready),
        "int8": lambda: int8(_quantised(x)),
    }


@torch.no_grad()
def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of each layer: milliseconds, error, and how many times faster than our best int8 is."""
    # PyTorch's quantised tensors go, its operators for int8 stay.
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    cases = [(name, _product, sizes) for name, sizes in PRODUCTS.items()]
    cases += [(name, _convolution, sizes) for name, sizes in CONVOLUTIONS.items()]
    for name, make, sizes in cases:
        functions = make(*sizes)
        exact = functions["float32"]()
        times = alternate(functions, ROUNDS)
        own = min(times[dtype]["median_ms"] for dtype in ("float32", "bfloat16"))
        found[name] = {
            kind: {
                "ms": times[kind]["median_ms"],
                "times_faster_than_our_best": round(own / times[kind]["median_ms"], 2),
                "relative_error": float(f"{_relative(function(), exact):.2g}"),
            }
            for kind, function in functions.items()
        }
        print(name, {kind: one["times_faster_than_our_best"] for kind, one in found[name].items()})
    found["whole_evaluation"] = {size: _whole(found, size) for size in ("demo", "paper")}
    return found, []


def _whole(layers: dict[str, Any], size: str) -> dict[str, float]:
    """How many times faster than in bfloat16 an evaluation would be with int8 in its products,
    self-attention's among them, and 3x3 convolutions, by the shares that unet.py measured."""
    shares = json.loads((RESULTS / "unet.json").read_text())[f"{size} bfloat16"]["breakdown"]
    convolutions = shares["3x3 convolutions"]
    kinds = ("feed-forward", "self-attention", "1x1 convolutions and the rest")
    of_products = sum(shares[kind] for kind in kinds)
    found = {}
    for kind in ("int8", "int8 ready"):
        conv, product = (
            statistics.geometric_mean(
                layers[name]["bfloat16"]["ms"] / layers[name][kind]["ms"]
                for name in names
                if name.startswith(size)
            )
            for names in (CONVOLUTIONS, PRODUCTS)
        )
        rest = 1 - convolutions - of_products
        found[kind] = round(1 / (rest + convolutions / conv + of_products / product), 3)
    return found


def _relative(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())
