# SPDX-License-Identifier: Apache-2.0
"""One table of all operators: what every backend of them is run on, and against what.

A new operator adds one entry to OPERATORS; tests/ops/test_parity.py runs it on every CPU path, and
on a GPU by CUDA C++ and by Triton; tests/triton_programs.py runs its kernel under the interpreter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from operator_cases import (
    GRIDS,
    MAPS,
    PLANS,
    TOKENS,
    assert_close,
    grid_points,
    map_parameters,
    token_case,
)
from scatter_cases import ASKED, GATHERS, make_call
from ssldiff_fast import ops
from ssldiff_fast.ops._register import TRITON

Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """Arguments of one call of an operator."""

    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, function: Callable[..., Any]) -> list[Tensor]:
        """What the function makes of them."""
        made = function(*self.arguments, **self.options)
        return [made] if isinstance(made, Tensor) else list(made)

    def map(self, change: Layout) -> Call:
        """The same with every tensor changed."""
        options = {name: _map(value, change) for name, value in self.options.items()}
        return Call(tuple(_map(value, change) for value in self.arguments), options)

    def on(self, device: str) -> Call:
        """The same on a device; numbers of windows stay on the CPU, where they are read."""
        return self.map(lambda t: t if t.dtype == torch.int64 else t.to(device))


def _map(value: Any, change: Layout) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        tensors = {name: change(v) for name, v in fields.items() if isinstance(v, Tensor)}
        return dataclasses.replace(value, **tensors) if tensors else value
    return value


def doubled(tensor: Tensor) -> Tensor:
    """Its values in float64; whole numbers and masks as they are."""
    return tensor.double() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Operator:
    """An operator of the package: how it is called, and on what; `thorough` names the case that
    Triton's slow interpreter runs in every dtype, and in every layout; `sums_as_stored` says that
    sums run in the order of memory, so that bits belong to a layout."""

    run: Callable[..., Any]
    reference: Callable[..., Any]
    cases: dict[str, Callable[[torch.dtype], Call]]
    dtypes: tuple[torch.dtype, ...]
    thorough: str
    sums_as_stored: bool = False


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WHOLE = (torch.float32, torch.float64)


def _scatter(name: str) -> Callable[[torch.dtype], Call]:
    if name in PLANS:
        return lambda dtype: Call((PLANS[name].windows(dtype), PLANS[name].plan))

    def asked(dtype: torch.dtype) -> Call:
        call = make_call(name, dtype)
        step = call.options.get("step")
        if step is not None and dtype == torch.float64:
            # Noise is float32, whose rounding alone is above the tolerance of float64.
            call.options["step"] = dataclasses.replace(step, noise=0.0)
        return Call((call.windows, call.plan, call.index), call.options)

    return asked


def _gather(name: str) -> Callable[[torch.dtype], Call]:
    case = GATHERS[name]
    index = torch.tensor(case.index, dtype=torch.int64)
    options = {"first_row": case.first_row}
    return lambda dtype: Call((case.canvas(dtype), case.case.plan, index), options)


def _interpolate(name: str, mode: str, masked: bool) -> Callable[[torch.dtype], Call]:
    def call(dtype: torch.dtype) -> Call:
        shape = GRIDS[name]
        valid = torch.rand(shape[:2]) < 0.6 if masked else None
        points = grid_points(shape)[::6]
        return Call((torch.randn(shape).to(dtype), points), {"mode": mode, "valid": valid})

    return call


def _token(name: str) -> Callable[[torch.dtype], Call]:
    return lambda dtype: Call((), token_case(TOKENS[name], dtype))


def _norm(name: str) -> Callable[[torch.dtype], Call]:
    def call(dtype: torch.dtype) -> Call:
        shape, groups = MAPS[name]
        parameters = {k: v.to(dtype) for k, v in map_parameters(shape).items()}
        x = torch.randn(shape).to(dtype)
        # So that sums over a map stay of order one.
        seed = (torch.randn(shape) / max(x.numel(), 1) ** 0.5).to(dtype)
        return Call((x, groups, seed), {**parameters, "eps": 1e-3})

    return call


def _with_gradients(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """A function that returns another's result, and the gradients of its arguments."""

    def both(x: Tensor, groups: int, seed: Tensor, *, eps: float, **others: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *others.values())]
        out = function(leaves[0], groups, eps=eps, **dict(zip(others, leaves[1:])))
        return [out.detach(), *torch.autograd.grad(out, leaves, seed)]

    return both


def _nearest(m: int, k: int, d: int) -> Callable[[torch.dtype], Call]:
    # Multiples of 1/8: distances are exact, so that ties are ties and nothing is near one.
    def call(dtype: torch.dtype) -> Call:
        z, codes = ((torch.randn(n, d) * 8).round().to(dtype) / 8 for n in (m, k))
        return Call((z, codes))

    return call


def _noise(seed: int, channels: int, rows: tuple[int, int], width: int) -> Any:
    return lambda dtype: Call((seed, channels, rows, width), {"step": 3})


MODES = ("bilinear", "slerp", "nearest")
OPERATORS = {
    "gather_windows": Operator(
        ops.gather_windows,
        ops.gather_windows_reference,
        {name: _gather(name) for name in GATHERS},
        FLOATS,
        "wrapped",
    ),
    "scatter_mean": Operator(
        ops.scatter_mean,
        ops.scatter_mean_reference,
        {name: _scatter(name) for name in (*PLANS, *ASKED)},
        FLOATS,
        "everything",
    ),
    "interpolate_grid": Operator(
        ops.interpolate_grid,
        ops.interpolate_grid_reference,
        {
            f"{name}-{mode}{'-masked' if masked else ''}": _interpolate(name, mode, masked)
            for name in GRIDS
            for mode in MODES
            for masked in (False, True)
        },
        WHOLE,
        "odd-slerp-masked",
    ),
    "token_attention": Operator(
        ops.token_attention,
        ops.token_attention_reference,
        {name: _token(name) for name in TOKENS},
        FLOATS,
        "heads",
    ),
    "group_norm_silu": Operator(
        _with_gradients(ops.group_norm_silu),
        _with_gradients(ops.group_norm_silu_reference),
        {name: _norm(name) for name in MAPS},
        FLOATS,
        "odd",
        sums_as_stored=True,
    ),
    "vq_nearest": Operator(
        ops.vq_nearest,
        ops.vq_nearest_reference,
        {
            "one": _nearest(1, 1, 1),
            "odd": _nearest(19, 7, 3),
            "a-block": _nearest(64, 128, 3),
            "past-a-block": _nearest(65, 257, 4),
            "width-two": _nearest(31, 100, 2),
            "wide": _nearest(17, 50, 37),
            "no-vectors": _nearest(0, 5, 3),
        },
        WHOLE,
        "odd",
    ),
    "philox_normal": Operator(
        ops.philox_normal,
        ops.philox_normal_reference,
        {
            "one": _noise(0, 1, (0, 1), 1),
            "odd": _noise(7, 3, (5, 18), 23),
            "a-block": _noise(2**63, 2, (0, 2), 64),
            "past-a-block": _noise(2**64 - 1, 1, (2**32 - 3, 2**32), 257),
            "no-rows": _noise(1, 3, (5, 5), 4),
        },
        (torch.float32,),
        "odd",
    ),
}


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def _sliced(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        return tensor
    return torch.cat((tensor, tensor), -1)[..., : tensor.shape[-1]]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


# Other layouts in memory of the same values.
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda tensor: tensor,
    "transposed": _transposed,
    "sliced": _sliced,
    "channels-last": _channels_last,
}


def difference(actual: list[Tensor], expected: list[Tensor]) -> str:
    """ "" where both agree: whole numbers exactly, others within the table of tolerances."""
    if len(actual) != len(expected):
        return f"{len(actual)} results, but {len(expected)} were expected"
    try:
        for a, b in zip(actual, expected):
            if a.is_floating_point():
                assert_close(a.cpu(), b)
            else:
                torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0)
    except AssertionError as error:
        return str(error)
    return ""


class _TritonMode(TorchDispatchMode):
    """Sends the package's operators to their Triton kernels, wherever the tensors are."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "ssldiff":
            return TRITON[func.name().split("::")[1].split(".")[0]](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def through_triton() -> Iterator[None]:
    """Within, every operator runs its Triton kernel."""
    with _TritonMode():
        yield
