# SPDX-License-Identifier: Apache-2.0
"""What one benchmark of an operator is, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _C
from .timing import alternate, peak_megabytes, ratios_to, stopwatch

Figures = dict[str, Any]  # as JSON takes them


@dataclass(frozen=True)
class Case:
    """An operator on one set of inputs, beside what it is compared with.

    Args:
        operator: its name.
        label: what tells this case from the operator's others, "" for the only one.
        device: "cpu" or "cuda".
        functions: what is timed: first the operator under its own name, then its other backends
            and the baselines.
        check: raises AssertionError where one of them is wrong; what is wrong is not timed.
        shape: of inputs and outputs, by name.
        dtype: of the inputs.
        moved: bytes of inputs and outputs, each counted once.
        operations: floating-point operations (of `philox_normal` those on words too).
        aims: how many times as long as the operator a baseline should take at least.
        share_aim: the share of the copy bandwidth to reach, where memory is the limit.
        megabytes_aim: how much memory the operator may take beside its inputs.
        cuda_sources: whether the operator exists in CUDA C++ too.
    """

    operator: str
    label: str
    device: str
    functions: dict[str, Callable[[], Any]]
    check: Callable[[], None]
    shape: dict[str, list[int]]
    dtype: torch.dtype
    moved: int
    operations: int
    aims: dict[str, float] = field(default_factory=dict)
    share_aim: float | None = None
    megabytes_aim: float | None = None
    cuda_sources: bool = True

    @property
    def name(self) -> str:
        """The operator's name, with the label."""
        return f"{self.operator} {self.label}".rstrip()

    @property
    def backend(self) -> str:
        """What runs the operator."""
        if self.device == "cpu":
            return f"C++, {_C.build_info()['cpu_path']}"
        return "CUDA C++" if self.cuda_sources and _C.CUDA_PROBLEM is None else "Triton"

    @property
    def backends(self) -> list[str]:
        """The operator itself and its other backends: whatever is no baseline."""
        return [name for name in self.functions if name in (self.operator, "Triton")]


def require_device(device: str) -> None:
    """Raise RuntimeError where PyTorch has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"bench: torch {torch.__version__} sees no CUDA device; choose the device cpu, or see "
            f"`ssldiff doctor`."
        )


def measure(case: Case, matrix: float, rounds: int = 30) -> Figures:
    """Time a case, once it has been found right.

    A copy of as many bytes as the operator moves runs in turn with it, so that both meet the same
    machine; its bandwidth is what `share_of_copy` refers to. The roofline's limit is what that
    bandwidth or the matrix rate allows, whichever is less.

    Args:
        case: what is timed.
        matrix: the machine's matrix rate in billions of operations a second.
        rounds: how often, at most, each function runs.

    Returns:
        Ratios to the operator's time, times, rates of the operator's backends, memory.
    """
    case.check()
    # Half is read and half is written; a copy within the caches would be no limit of the memory.
    source = torch.zeros(max(case.moved // 2, 2**25), dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    functions = {**case.functions, "copy": lambda: target.copy_(source)}
    times = alternate(functions, rounds, case.device)
    copy = 2 * source.nbytes / times.pop("copy")["median_ms"] / 1e6
    milliseconds = {name: times[name]["median_ms"] for name in case.backends}
    rates = {name: case.moved / ms / 1e6 for name, ms in milliseconds.items()}
    flops = {name: case.operations / ms / 1e6 for name, ms in milliseconds.items()}
    intensity = case.operations / case.moved
    limit = min(matrix, copy * intensity)
    return {
        "ratio": ratios_to(times, case.operator),
        "times": times,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "gigabytes_per_second": {
            **{name: _digits(rate) for name, rate in rates.items()},
            "copy": _digits(copy),
        },
        "share_of_copy": {name: _digits(rate / copy) for name, rate in rates.items()},
        "gigaflops": {
            **{name: _digits(rate) for name, rate in flops.items()},
            "matrix product": _digits(matrix),
        },
        "operations_per_byte": _digits(intensity),
        "limit": "matrix rate" if limit == matrix else "copy bandwidth",
        "share_of_limit": {name: _digits(rate / limit) for name, rate in flops.items()},
        "peak_megabytes": peak_megabytes(case.functions, case.device),
    }


def _digits(value: float) -> float:
    """Four digits that count: small figures of small inputs do not vanish."""
    return float(f"{value:.4g}")


def once(case: Case, name: str) -> Callable[[], Any]:
    """One of the case's functions, which returns when the device is done: for other timers."""
    function, measured = case.functions[name], stopwatch(case.device)
    return function if case.device == "cpu" else lambda: measured(function)
