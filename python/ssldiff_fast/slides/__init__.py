# SPDX-License-Identifier: Apache-2.0
"""Reading slides and images, embedding grids on disk, writing pyramids.

Names load on first use: OpenSlide and h5py are imported by what needs them.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Georeference": ".cog",
    "Grid": ".grid",
    "ImageSlide": ".images",
    "PyramidWriter": ".pyramid",
    "Slide": ".slide",
    "check_output": ".output",
    "open_slide": ".reader",
    "open_writer": ".writers",
    "slide_mask": ".mask",
    "tissue_mask": ".tissue",
    "write_preview": ".preview",
}

# `encode` is the module; its function is `ssldiff_fast.encode`.
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
