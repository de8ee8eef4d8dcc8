# SPDX-License-Identifier: Apache-2.0
"""Claim: a guided pair costs much less than in the published form, with the same result.

Same weights (random) and inputs. B0 is the published form: the pair by concatenation, one large
batch, contiguous, unfused. B1 is the same in batches of two windows. B2 is what a good engineer
gets in an afternoon: scaled_dot_product_attention, channels-last, torch.compile; in bfloat16 under
autocast. Then ours, exact, and ours without one trick at a time.

    python benchmarks/unet.py [--size paper | demo] [--dtype float32 | bfloat16] [--device cuda]

A whole run on a CPU takes a quarter of an hour; with `--keep` sizes and dtypes may be run one after
another into the same result.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import unet_on_cpu
import unet_on_gpu
from published_unet import published_unet
from report import RESULTS, aim, commit, save
from sampler import matrix_rate, random_model
from ssldiff_fast.models import UNet
from ssldiff_fast.models.execution import network_for
from ssldiff_fast.models.fused_unet import exact_convolutions
from timing import alternate, arguments, peak_megabytes

WINDOWS = {("cpu", "paper"): 2, ("cpu", "demo"): 16, ("cuda", "paper"): 64, ("cuda", "demo"): 64}
SIZES, DTYPES = ("demo", "paper"), ("float32", "bfloat16")
TIME = 500.0
# Times faster at least, by device and size, in the dtype that the aim is about.
AIMS = {
    ("cpu", "paper", "float32"): {"B0": 1.3, "B2": 1.15},
    ("cpu", "demo", "float32"): {"B0": 1.5},
    ("cpu", "paper", "bfloat16"): {"B2": 1.3},
    ("cuda", "paper", "bfloat16"): {"B0": 3.0, "B2": 1.35},
}
Evaluation = Callable[[], Tensor]


class Pairs:
    """The evaluations of N guided pairs, each as a function that returns [2 N, C, h, w]."""

    def __init__(self, size: str, device: str, dtype: torch.dtype, windows: int) -> None:
        torch.manual_seed(0)
        with torch.device(device):  # drawn where they stay: on a CPU that takes most of a minute
            self.unet: UNet = random_model(size, device, torch.float32).unet
            # Weights contiguous and in float32, as published.
            self.published = random_model(size, device, torch.float32).unet
            self.last = (
                self.unet if dtype == torch.float32 else random_model(size, device, dtype).unet
            )
        self.published.load_state_dict(self.unet.state_dict())
        self.published.to(memory_format=torch.contiguous_format)
        self.last.load_state_dict(self.unet.state_dict())
        self.dtype, self.device = dtype, device
        sides = random_model_window(size)
        self.x = torch.randn(windows, self.unet.in_channels, *sides, device=device)
        width = self.unet.context_dim
        assert width is not None
        self.cond = torch.randn(windows, 1, width, device=device)
        self.uncond = torch.randn(1, 1, width, device=device).expand(windows, -1, -1)
        self.context = torch.cat((self.cond, self.uncond))
        self.t = torch.full((2 * windows,), TIME, device=device)
        self.network = network_for(self.last)
        self.prepared = self.network.prepare(self.context)
        self.time = self.network.prepare_time(self.t[0])

    def b0(self) -> Tensor:
        return published_unet(self.published, self.x.repeat(2, 1, 1, 1), self.t, self.context)

    def b1(self) -> Tensor:
        parts = []
        for first in range(0, len(self.x), 2):
            x, cond, uncond = (y[first : first + 2] for y in (self.x, self.cond, self.uncond))
            out = published_unet(
                self.published,
                x.repeat(2, 1, 1, 1),
                self.t[: 2 * len(x)],
                torch.cat((cond, uncond)),
            )
            parts.append(out.unflatten(0, (2, -1)))
        return torch.cat(parts, 1).flatten(0, 1)

    def b2(self, function: Callable[..., Tensor] = published_unet) -> Tensor:
        x = self.x.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        kind = torch.device(self.device).type
        with torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
            return function(self.unet, x, self.t, self.context, sdpa=True).float()

    def ours(self) -> Tensor:
        return self.network(self.x, self.time, self.prepared)

    def ours_anew(self) -> Tensor:
        return network_for(self.last)(self.x, self.time, self.prepared)


def random_model_window(size: str) -> tuple[int, int]:
    return (64, 64) if size == "paper" else (32, 32)


@contextlib.contextmanager
def compiled(pairs: Pairs, figures: dict[str, Any]) -> Iterator[Evaluation | None]:
    """B2 through torch.compile, or None where that fails; how long it took is noted."""
    start = time.perf_counter()
    function = partial(pairs.b2, torch.compile(published_unet))
    try:
        function()
    except Exception as error:  # whatever the compiler lacks here
        figures["compile"] = f"failed: {str(error).splitlines()[0]}"
        yield None
        return
    figures["compile_seconds"] = round(time.perf_counter() - start, 1)
    yield function


def relative(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


@torch.no_grad()
def measure(pairs: Pairs, size: str, rounds: int, compile_b2: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {"windows": len(pairs.x), "threads": torch.get_num_threads()}
    functions: dict[str, Evaluation] = {"ours": pairs.ours, "B0": pairs.b0, "B1": pairs.b1}
    functions["B2 eager"] = pairs.b2
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(compiled(pairs, figures)) if compile_b2 else None
        if made is not None:
            functions["B2 compiled"] = made
        with exact_convolutions():
            exact = pairs.b0()
        figures["relative_error"] = {n: relative(f(), exact) for n, f in functions.items()}
        times = alternate(functions, rounds, pairs.device)
        own = times["ours"]["median_ms"]
        figures["times"] = times
        figures["ratio"] = {n: round(t["median_ms"] / own, 3) for n, t in times.items()}
        seconds = {n: t["median_ms"] for n, t in times.items() if n.startswith("B2")}
        figures["ratio"]["B2"] = round(min(seconds.values()) / own, 3)
        # A graph that is replayed allocates nothing: of ours, what capturing it takes.
        figures["peak_megabytes"] = peak_megabytes(
            {**functions, "ours": pairs.ours_anew}, pairs.device
        )
    evaluations = 2 * len(pairs.x)
    operations_done = evaluation_flops_of(pairs)
    figures["ms_of_one_evaluation"] = round(own / evaluations, 4)
    figures["gigaflops"] = {
        n: round(operations_done * evaluations / t["median_ms"] / 1e6) for n, t in times.items()
    }
    rate = matrix_rate(pairs.device, pairs.dtype) * 1e3
    figures["gigaflops"]["matrix product"] = round(rate)
    figures["tricks"] = tricks(pairs, rounds)
    if pairs.device == "cuda":
        figures["reuse"] = unet_on_gpu.reuse(pairs, rounds)
        figures["breakdown"] = unet_on_gpu.kinds_of_kernels(pairs)
        figures["prefix_by_kind"] = unet_on_gpu.prefix_by_kind(pairs)
    else:
        figures["breakdown"] = unet_on_cpu.kinds_of_layers(pairs)
    return figures


def tricks(pairs: Pairs, rounds: int) -> dict[str, Any]:
    """How many times longer ours takes without each trick, measured and as predicted.

    By the faster rounds, as what disturbs them is larger than some of the shares.
    """
    of_device = unet_on_gpu if pairs.device == "cuda" else unet_on_cpu
    without = of_device.without_each(pairs)
    times = alternate({"": pairs.ours, **without}, 3 * rounds, pairs.device)
    own = times[""]["quantile_20_ms"]
    predicted = unet_on_gpu.PREDICTED if pairs.device == "cuda" else unet_on_cpu.predicted(pairs)
    return {
        name: {
            "measured": round(times[name]["quantile_20_ms"] / own, 3),
            "predicted": predicted.get(name),
        }
        for name in without
    }


def evaluation_flops_of(pairs: Pairs) -> float:
    """Operations of one evaluation in the published form."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        one = slice(0, 1)
        published_unet(pairs.published, pairs.x[one], pairs.t[one], pairs.context[one])
    return float(counter.get_total_flops())


def aims_of(size: str, dtype: str, device: str, figures: dict[str, Any]) -> list[dict[str, Any]]:
    label = f"{size}, {dtype}"
    bound = 1e-5 if dtype == "float32" else 2e-2
    found = [aim(f"relative error ({label})", figures["relative_error"]["ours"], bound, "at most")]
    for name, least in AIMS.get((device, size, dtype), {}).items():
        found.append(aim(f"times {name} ({label})", figures["ratio"][name], least, "at least"))
    if (device, size, dtype) == ("cuda", "paper", "bfloat16"):
        share = figures["gigaflops"]["ours"] / figures["gigaflops"]["matrix product"]
        found.append(aim(f"share of the matrix rate ({label})", share, 0.6, "at least"))
        per_call = figures["ms_of_one_evaluation"]
        found.append(aim(f"ms of one evaluation ({label})", per_call, 0.4, "at most"))
    return found


def kept(device: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and aims of the last result."""
    path = (RESULTS if device == "cpu" else RESULTS / "gpu") / "unet.json"
    last = json.loads(path.read_text()) if path.exists() else {"aims": []}
    known = [f"{size} {dtype}" for size in SIZES for dtype in DTYPES]
    return {name: last[name] for name in known if name in last}, last["aims"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--windows", type=int, help="guided pairs of one batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="B2 without torch.compile")
    parser.add_argument("--keep", action="store_true", help="what the last result has of the rest")
    parser.add_argument(
        "--compile-only", action="store_true", help="B2 into torch.compile's cache, and no more"
    )
    chosen = parser.parse_args()
    figures, aims = kept(chosen.device) if chosen.keep else ({}, [])
    for size in chosen.size or SIZES:
        for dtype in chosen.dtype or DTYPES:
            windows = chosen.windows or WINDOWS[chosen.device, size]
            pairs = Pairs(size, chosen.device, getattr(torch, dtype), windows)
            if chosen.compile_only:
                with torch.no_grad(), compiled(pairs, {}):
                    continue
            found = measure(pairs, size, chosen.rounds, not chosen.no_compile)
            figures[f"{size} {dtype}"] = {"commit": commit(), **found}
            aims = [a for a in aims if f"({size}, {dtype})" not in a["name"]]
            aims += aims_of(size, dtype, chosen.device, found)
            print(size, dtype, found["ratio"], found["relative_error"], flush=True)
            save("unet", figures, aims, chosen.device)  # a run that is ended keeps what it has


if __name__ == "__main__":
    main()
