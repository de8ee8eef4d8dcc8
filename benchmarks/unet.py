# SPDX-License-Identifier: Apache-2.0
"""Claim: a guided pair costs much less than in the published form, with the same result.

Same weights (random) and inputs. B0 is the published form: the pair by concatenation, one large
batch, contiguous, unfused. B1 is the same in batches of two windows. B2 is what a good engineer
gets in an afternoon: scaled_dot_product_attention, channels-last, torch.compile; in bfloat16 under
autocast. Then ours, exact, and ours without one trick at a time.

    python benchmarks/unet.py [--size paper | demo] [--device cuda] [--no-compile]
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from published_unet import published_unet
from report import aim, save
from sampler import matrix_rate, random_model
from ssldiff_fast.models import UNet, products
from ssldiff_fast.models.attention import CrossAttention
from ssldiff_fast.models.execution import network_for
from ssldiff_fast.models.feed_forward import FeedForward
from ssldiff_fast.models.fused_unet import without_tf32
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.winograd import Conv3x3
from timing import alternate, arguments, peak_megabytes
from unet_on_gpu import kinds_of_kernels, without_each

WINDOWS = {("cpu", "paper"): 2, ("cpu", "demo"): 16, ("cuda", "paper"): 32, ("cuda", "demo"): 64}
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


def random_model_window(size: str) -> tuple[int, int]:
    return (64, 64) if size == "paper" else (32, 32)


def plain_norm(self: GroupNormSiLU, x: Tensor, **options: Any) -> Tensor:
    """GroupNormSiLU in passes of their own."""
    add, scale, shift = (options.get(name) for name in ("add", "scale", "shift"))
    x = x if add is None else x + add[:, :, None, None].to(x.dtype)
    x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
    x = x if scale is None else x * (1 + scale[:, :, None, None].to(x.dtype))
    x = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    return F.silu(x) if self.silu else x


def plain_geglu(projected: Tensor) -> Tensor:
    values, gates = projected.chunk(2, dim=-1)
    return values * F.gelu(gates)


def ablations(pairs: Pairs) -> dict[str, Evaluation]:
    """Ours without one trick each."""
    if pairs.device == "cuda":
        return without_each(pairs)

    def without(change: Any) -> Tensor:
        with change:
            return pairs.ours()

    def twice() -> Tensor:
        return pairs.last(pairs.x.repeat(2, 1, 1, 1), pairs.time, pairs.prepared)

    found = {
        "shared prefix": twice,
        "prepared tokens": lambda: pairs.last(pairs.x, pairs.time, pairs.context),
        "prepared timesteps": lambda: pairs.last(pairs.x, pairs.t[:1].squeeze(), pairs.prepared),
        "group_norm_silu": partial(without, patch.object(GroupNormSiLU, "forward", plain_norm)),
    }
    if pairs.device == "cpu":
        sdpa = patch.object(products, "attention", F.scaled_dot_product_attention)
        in_blocks = patch("ssldiff_fast.models.attention.attention", sdpa.new)
        found["attention by products"] = partial(without, in_blocks)
        onednn = patch.object(products, "_has_onednn", lambda *_: False)
        found["products by oneDNN"] = partial(without, onednn)
        plain = patch("ssldiff_fast.models.attention.geglu", plain_geglu)
        found["geglu"] = partial(without, plain)
        direct = patch("ssldiff_fast.models.winograd.serves", lambda conv: False)
        found["Winograd's convolutions"] = partial(without, direct)
    return found


def predicted(pairs: Pairs) -> dict[str, float]:
    """Times faster by a trick alone, from the operations it saves and rates measured here."""
    counts = operations(pairs)
    whole, shared = counts["all"], counts["before the context"]
    found = {"shared prefix": round(whole / (whole - shared / 2), 3)}
    if pairs.device == "cpu" and pairs.dtype == torch.float32:
        x, weight = (torch.randn(*s) for s in ((2048, 384), (1536, 384)))
        times = alternate(
            {"plain": lambda: F.linear(x, weight), "ours": lambda: products.linear(x, weight)}, 9
        )
        ratio = times["plain"]["median_ms"] / times["ours"]["median_ms"]
        share = counts["products"] / whole
        found["products by oneDNN"] = round(1 - share + share * ratio, 3)
    return found


def operations(pairs: Pairs) -> dict[str, float]:
    """Multiplications of one evaluation: all, those before the context, those of products."""
    counts = {"all": 0.0, "before the context": 0.0, "products": 0.0}
    seen = False

    def count(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal seen
        seen = seen or (isinstance(module, CrossAttention))
        if isinstance(module, nn.Conv2d):
            done = out.numel() * module.weight[0].numel() / len(out)
            counts["all"] += done
            counts["before the context"] += 0 if seen else done
        elif isinstance(module, CrossAttention | FeedForward):
            weights = sum(p.numel() for p in module.parameters())
            length, width = args[0].shape[1:]
            done = length * weights
            done += 2 * length**2 * width if isinstance(module, CrossAttention) else 0
            counts["all"] += done
            counts["products"] += done

    hooks = [module.register_forward_hook(count) for module in pairs.last.modules()]
    pairs.last(pairs.x[:1], pairs.time, pairs.last.prepare(pairs.context[:1]))
    for hook in hooks:
        hook.remove()
    return counts


def breakdown(pairs: Pairs) -> dict[str, float]:
    """Share of the time of ours by kind of layer."""
    if pairs.device == "cuda":
        return kinds_of_kernels(pairs)
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

    def now() -> float:
        if pairs.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    hooks = []
    for module in pairs.last.modules():
        if type(module) in kinds:
            hooks.append(module.register_forward_pre_hook(lambda *_: starts.append(now())))

            def stop(module: nn.Module, *_: Any) -> None:
                spent[kinds[type(module)]] += now() - starts.pop()

            hooks.append(module.register_forward_hook(stop))
    start = now()
    pairs.ours()
    whole = now() - start
    for hook in hooks:
        hook.remove()
    shares = {name: round(seconds / whole, 3) for name, seconds in spent.items()}
    return {**shares, "all else": round(1 - sum(shares.values()), 3)}


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
        with without_tf32():
            exact = pairs.b0()
        figures["relative_error"] = {n: relative(f(), exact) for n, f in functions.items()}
        functions.update({f"ours without {n}": f for n, f in ablations(pairs).items()})
        times = alternate(functions, rounds, pairs.device)
        own = times["ours"]["median_ms"]
        figures["times"] = times
        figures["ratio"] = {n: round(t["median_ms"] / own, 3) for n, t in times.items()}
        seconds = {n: t["median_ms"] for n, t in times.items() if n.startswith("B2")}
        figures["ratio"]["B2"] = round(min(seconds.values()) / own, 3)
        kept = {n: f for n, f in functions.items() if "without" not in n}
        figures["peak_megabytes"] = peak_megabytes(kept, pairs.device)
    evaluations = 2 * len(pairs.x)
    operations_done = evaluation_flops_of(pairs)
    figures["ms_of_one_evaluation"] = round(own / evaluations, 4)
    figures["gigaflops"] = {
        n: round(operations_done * evaluations / t["median_ms"] / 1e6) for n, t in times.items()
    }
    rate = matrix_rate(pairs.device, pairs.dtype) * 1e3
    figures["gigaflops"]["matrix product"] = round(rate)
    figures["predicted"] = predicted(pairs)
    figures["breakdown"] = breakdown(pairs)
    return figures


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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", action="append", choices=["paper", "demo"])
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--windows", type=int, help="guided pairs of one batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="B2 without torch.compile")
    chosen = parser.parse_args()
    figures: dict[str, Any] = {}
    aims = []
    for size in chosen.size or ["demo", "paper"]:
        for dtype in chosen.dtype or ["float32", "bfloat16"]:
            windows = chosen.windows or WINDOWS[chosen.device, size]
            pairs = Pairs(size, chosen.device, getattr(torch, dtype), windows)
            found = measure(pairs, size, chosen.rounds, not chosen.no_compile)
            figures[f"{size} {dtype}"] = found
            aims += aims_of(size, dtype, chosen.device, found)
            print(size, dtype, found["ratio"], found["relative_error"], flush=True)
            save("unet", figures, aims, chosen.device)  # a run that is ended keeps what it has


if __name__ == "__main__":
    main()
