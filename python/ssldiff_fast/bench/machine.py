# SPDX-License-Identifier: Apache-2.0
"""Where a figure was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import _C


def processor() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [li.split(":", 1)[1] for li in info.read_text().splitlines() if "model name" in li]
        name = names[0].strip() if names else name
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {_cores()} cores, {isa}"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu() -> dict[str, Any] | None:
    """The GPU's name, memory and versions, and where its operators come from."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if find_spec("triton") else None,
        "cuda_operators": _C.CUDA_PROBLEM or "built",
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def machine() -> dict[str, Any]:
    """Processor, GPU, threads and versions."""
    return {
        "processor": processor(),
        "gpu": gpu(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
