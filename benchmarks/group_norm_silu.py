# SPDX-License-Identifier: Apache-2.0
"""Claim: group_norm_silu is faster than PyTorch's GroupNorm, then SiLU, forwards and backwards.

The maps are channels-last and larger than the caches. On the CPU freed memory is kept for the next
call, as in a process that has run for a while: otherwise both sides would mostly wait for the
system to clear new pages. End to end: one evaluation of the bundled model's U-Net, and one decode
of a batch of tiles, with PyTorch's two operators in the place of ours and without.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ssldiff_fast as sf
from report import aim, save
from ssldiff_fast import _C
from ssldiff_fast.models.fused_unet import exact_convolutions
from ssldiff_fast.models.group_norm import GROUPS, GroupNormSiLU
from ssldiff_fast.ops import group_norm_silu, group_norm_silu_reference
from timing import alternate, arguments, copy_bandwidth, peak_megabytes, ratios_to

CHANNELS, SIDE = 192, 64  # the first level of the published U-Net
SAMPLES = {"cpu": 24, "cuda": 256}
DTYPES = (torch.float32, torch.bfloat16)
WINDOWS = 8  # of the end-to-end figures
# assert_close's own; inputs are rounded to their dtype first.
TOLERANCES = {torch.float32: (1.3e-6, 1e-5), torch.bfloat16: (1.6e-2, 1e-5)}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt


def keep_freed_memory() -> None:
    """Tell glibc to reuse memory instead of returning it to the system."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(M_MMAP_THRESHOLD, 2**30)
            library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measure(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Figures of one dtype; what is wrong is not timed."""
    x = torch.randn(SAMPLES[device], CHANNELS, SIDE, SIDE, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    seed = torch.randn_like(x)
    weight, bias = (torch.randn(CHANNELS, device=device).to(dtype) for _ in range(2))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, GROUPS, weight=weight, bias=bias)

    def baseline(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, GROUPS, weight, bias))

    few = slice(0, 2)
    expected = group_norm_silu_reference(
        x[few].double(), GROUPS, weight=weight.double(), bias=bias.double()
    )
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(ours(x[few], weight, bias).double(), expected, rtol=rtol, atol=atol)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, bias)]
    functions = {"group_norm_silu": ours, "GroupNorm, SiLU": baseline}

    def forward(name: str) -> Callable[[], Tensor]:
        return lambda: functions[name](x, weight, bias)

    def both(name: str) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(functions[name](*leaves), leaves, seed)

    times = alternate({name: forward(name) for name in functions}, device=device)
    training = alternate({name: both(name) for name in functions}, 12, device)
    moved = 2 * x.nbytes / times["group_norm_silu"]["median_ms"] / 1e6
    figures = {
        "ratio": ratios_to(times, "group_norm_silu"),
        "ratio_with_backward": ratios_to(training, "group_norm_silu"),
        "times": times,
        "times_with_backward": training,
        "shape": list(x.shape),
        "gigabytes_per_second": {
            "group_norm_silu": round(moved, 1),
            "copy": round(copy_bandwidth(x), 1),
        },
    }
    if device == "cuda":
        figures["peak_megabytes"] = peak_megabytes({name: forward(name) for name in functions})
    return figures


@contextmanager
def torchs_operators() -> Iterator[None]:
    """PyTorch's GroupNorm and SiLU in all networks."""

    def forward(
        self: GroupNormSiLU,
        x: Tensor,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        x = x if add is None else x + add[:, :, None, None]
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if scale is not None and shift is not None:
            x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(x) if self.silu else x

    own = GroupNormSiLU.forward
    GroupNormSiLU.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        GroupNormSiLU.forward = own  # type: ignore[method-assign]


@torch.no_grad()
def end_to_end(device: str) -> dict[str, Any]:
    """The bundled model with our operator and with PyTorch's, alternating."""
    model = sf.load("he-demo").to(device)
    x = torch.randn(WINDOWS, model.latent_channels, *model.window, device=device)
    t = torch.full((WINDOWS,), 500, device=device)
    context = torch.randn(WINDOWS, 1, model.unet.context_dim or 0, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    calls = {
        "unet": lambda: model.unet(x, t, context),
        "decode": lambda: model.vae.decode(x),
    }

    def other(call: Callable[[], Tensor]) -> Tensor:
        with torchs_operators():
            return call()

    found = {}
    for name, call in calls.items():
        with exact_convolutions():
            torch.testing.assert_close(call(), other(call), rtol=1e-3, atol=1e-3)
        times = alternate(
            {"group_norm_silu": call, "GroupNorm, SiLU": lambda call=call: other(call)}, 12, device
        )
        found[name] = {"ratio": ratios_to(times, "group_norm_silu"), "times": times}
    return found


def main() -> None:
    """Time maps of 192 channels and the bundled model, and save group_norm_silu.json."""
    chosen = arguments(__doc__).parse_args()
    keep_freed_memory()
    figures = {str(d).removeprefix("torch."): measure(chosen.device, d) for d in DTYPES}
    networks = end_to_end(chosen.device)
    aims = []
    for dtype, found in figures.items():
        bandwidth = found["gigabytes_per_second"]
        share = bandwidth["group_norm_silu"] / bandwidth["copy"]
        aims += [
            aim(
                f"times GroupNorm, SiLU ({dtype})",
                found["ratio"]["GroupNorm, SiLU"],
                1.5,
                "at least",
            ),
            aim(f"share of the copy bandwidth ({dtype})", share, 0.8, "at least"),
        ]
    backend = f"C++, {_C.build_info()['cpu_path']}" if chosen.device == "cpu" else "Triton"
    figures = {"backend": backend, **figures, "networks": networks}
    save("group_norm_silu", figures, aims, chosen.device)
    for name, found in networks.items():
        print(name, found["ratio"])


if __name__ == "__main__":
    main()
