# SPDX-License-Identifier: Apache-2.0
"""Adds to the compiled operators what is written in Python: fakes, gradients, Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _C

# Kept alive: a Library that is collected takes its registrations with it.
_library: list[torch.library.Library] = []

# The Triton kernels by operator, also where CUDA C++ is what CUDA tensors go to.
TRITON: dict[str, Callable[..., Any]] = {}


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    triton: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    cuda_sources: bool = True,
) -> None:
    """Complete the operator `name`; without the compiled library there is nothing to complete.

    CUDA tensors go to CUDA C++ where that was built (and has the operator), otherwise to Triton.
    """
    if _C.CPU_PROBLEM is not None:
        return
    TRITON[name] = _on_its_device(triton)
    qualified = f"ssldiff::{name}"
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    if not (cuda_sources and _C.CUDA_PROBLEM is None):
        if not _library:
            _library.append(torch.library.Library("ssldiff", "IMPL"))
        _library[0].impl(name, TRITON[name], "CUDA")


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the GPU of the first argument: Triton takes the current one, whatever it is."""

    def launch_there(first: torch.Tensor, *others: Any) -> Any:
        if first.device.type != "cuda":  # Triton's interpreter takes any
            return launch(first, *others)
        with torch.cuda.device(first.device):
            return launch(first, *others)

    return launch_there
