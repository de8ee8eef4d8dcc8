# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that the package reads, each at call time and only here.

| variable | default | what |
|---|---|---|
| `SSLDIFF_CACHE` | `~/.cache/ssldiff_fast` | folder for files fetched once (the demo slide) |
| `XDG_CACHE_HOME` | `~/.cache` | holds that folder where `SSLDIFF_CACHE` is not set |
| `DISPLAY`, `WAYLAND_DISPLAY` | unset | without either, on Linux, `ssldiff view` opens no browser |
| `TORCHINDUCTOR_CACHE_DIR` | `inductor` in that folder | what `execution="compile"` compiled |
| `SSLDIFF_LIBRARIES` | the package's own | folder of the compiled operators (`make sanitize`) |

The build reads `SSLDIFF_CUDA`, `SSLDIFF_CUDA_ARCHS`, `CUDA_HOME` and `SSLDIFF_VIEWER` in setup.py,
before the package exists. The number of threads is PyTorch's (`OMP_NUM_THREADS`,
`MKL_NUM_THREADS`, `torch.set_num_threads`); where none is given, fewer may be taken
(`models.threads`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """Folder for files fetched once; not created here."""
    value = os.environ.get("SSLDIFF_CACHE")
    if value:
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ssldiff_fast"


def keep_compiled() -> None:
    """Have torch.compile keep what it compiles in the cache folder, unless the user says where."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))


def has_display() -> bool:
    """Whether a browser opened here would be seen; over ssh there is usually no display."""
    if sys.platform != "linux":
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def has_thread_number() -> bool:
    """Whether the user says how many threads there are."""
    return bool(os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS"))


def library_dir() -> Path:
    """Folder of the compiled operators: the package's own, unless another build is tested."""
    value = os.environ.get("SSLDIFF_LIBRARIES")
    return Path(value).expanduser() if value else Path(__file__).parent
