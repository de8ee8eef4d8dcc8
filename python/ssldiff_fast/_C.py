# SPDX-License-Identifier: Apache-2.0
"""The compiled operators: loads their libraries, and says what they were built with.

The libraries use PyTorch's stable ABI and no Python headers, so one build serves every Python and
every torch from 2.10 on; this module is the thin Python face that an extension module would have.
"""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path

import torch

from . import settings

# Every operator of csrc/library.cpp, and how many arguments the Python code gives it.
OPERATORS = {
    "feed_forward": 6,
    "gather_windows": 7,
    "geglu": 1,
    "group_norm_silu": 11,
    "group_norm_silu_backward": 12,
    "group_norm_statistics": 2,
    "halve": 2,
    "interpolate_grid": 4,
    "philox4x32": 2,
    "philox_normal": 4,
    "scatter_mean": 12,
    "scatter_mean_step": 16,
    "token_attention": 8,
    "vq_nearest": 2,
    "winograd": 6,
}

HOW_TO_BUILD = (
    "build them anew with `pip install --no-build-isolation -e .` in the repository (`make build` "
    "does it too), or install a wheel; `ssldiff doctor` shows what was found"
)


def library_path(device: str) -> Path:
    """Where the library of "cpu" or "cuda" operators lies, built or not."""
    return settings.library_dir() / f"libssldiff_{device}.so"


def _load(device: str) -> str | None:
    """Load one library; None if that worked, otherwise a clause that says why not."""
    path = library_path(device)
    if not path.exists():
        return f"{path.name} is not in {path.parent}"
    if device == "cuda" and not _goes_with_cpu(path):
        return f"{path} was built from other sources than {library_path('cpu').name}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load with torch {torch.__version__} ({error})"
    difference = _difference()
    return None if difference is None else f"{path} {difference}"


def _goes_with_cpu(path: Path) -> bool:
    """Whether a library of CUDA operators says that it is of the sources of the CPU's. Asked before
    it is loaded, since its operators could not be taken back."""
    said = f"ssldiff_fast built from {build_info().get('sources')}\0".encode()
    return said in path.read_bytes()


def _difference() -> str | None:
    """What an operator of the loaded library says of its age; None where all are as expected."""
    for name, expected in OPERATORS.items():
        operator = getattr(torch.ops.ssldiff, name, None)
        if operator is None:
            return f"is older than the Python code: it has no operator {name}"
        given = len(operator.default._schema.arguments)
        if given != expected:
            what = f"its {name} takes another number of arguments ({given}, not {expected})"
            return f"is of another version than the Python code: {what}"
    return None


def require(call: str) -> None:
    """Raise RuntimeError with the way out if the operators are not built, or are older."""
    if CPU_PROBLEM is not None:
        raise RuntimeError(
            f"{call}: the compiled operators cannot be used ({CPU_PROBLEM}); {HOW_TO_BUILD}."
        )


def build_info() -> dict[str, str]:
    """Compiler, torch and CUDA of the build, and the instruction set chosen at run time."""
    require("build_info")
    library = ctypes.CDLL(str(library_path("cpu")))
    library.ssldiff_build_info.restype = ctypes.c_char_p
    info: dict[str, str] = json.loads(library.ssldiff_build_info().decode())
    return {**info, "cpu_path": cpu_path()}


@functools.cache
def cpu_path() -> str:
    """The instruction set chosen at run time: "portable", "avx2" or "avx512"."""
    require("cpu_path")
    library = ctypes.CDLL(str(library_path("cpu")))
    library.ssldiff_cpu_path.restype = ctypes.c_char_p
    path: str = library.ssldiff_cpu_path().decode()
    return path


def has_vectors() -> bool:
    """Whether the operators are there, with the fused multiply-adds that products live on."""
    return CPU_PROBLEM is None and cpu_path() != "portable"


def set_cpu_path(name: str) -> None:
    """Choose "portable", "avx2", "avx512", or "best" (this processor's own), for tests.

    Raises:
        ValueError: if this processor cannot run it.
    """
    require("set_cpu_path")
    library = ctypes.CDLL(str(library_path("cpu")))
    library.ssldiff_set_cpu_path.argtypes = [ctypes.c_char_p]
    if not library.ssldiff_set_cpu_path(name.encode()):
        raise ValueError(f"set_cpu_path: {name!r} is unknown or cannot run on this processor.")
    cpu_path.cache_clear()


# Known once the module is imported: torch.compile meets plain constants, no file system.
CPU_PROBLEM = _load("cpu")
CUDA_PROBLEM: str | None = "this torch is built without CUDA"
if torch.version.cuda is not None:
    CUDA_PROBLEM = CPU_PROBLEM or _load("cuda")
