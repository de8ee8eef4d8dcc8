# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that the package reads, each at call time and only here.

| variable | default | what |
|---|---|---|
| `SSLDIFF_CACHE` | `~/.cache/ssldiff_fast` | folder for files fetched once (the demo slide) |
| `NO_COLOR` | unset | if set and not empty, the command line prints without colour |

The build reads `SSLDIFF_CUDA`, `SSLDIFF_CUDA_ARCHS` and `CUDA_HOME` in setup.py, before the
package exists. The number of threads is PyTorch's (`OMP_NUM_THREADS`, `torch.set_num_threads`).
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for files fetched once; not created here."""
    value = os.environ.get("SSLDIFF_CACHE")
    if value:
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ssldiff_fast"


def colour() -> bool:
    """Whether the command line may colour its output (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")
