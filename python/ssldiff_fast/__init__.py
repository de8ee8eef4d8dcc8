# SPDX-License-Identifier: Apache-2.0
"""Large images from diffusion models conditioned on self-supervised embeddings.

The names below load on first use, so that importing the package is quick and needs no optional
dependency.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it. One table serves __getattr__, __dir__ and __all__.
_EXPORTS = {
    "CanvasDenoiser": "ssldiff_fast.canvas",
    "Conditioning": "ssldiff_fast.canvas",
    "Encoder": "ssldiff_fast.encoders",
    "EncoderSpec": "ssldiff_fast.encoders",
    "Grid": "ssldiff_fast.slides",
    "GridField": "ssldiff_fast.canvas",
    "LatentDiffusion": "ssldiff_fast.models",
    "PRESETS": "ssldiff_fast.canvas",
    "Preset": "ssldiff_fast.canvas",
    "PatchSynthesis": "ssldiff_fast.patches",
    "PromptField": "ssldiff_fast.canvas",
    "RegionField": "ssldiff_fast.canvas",
    "Schedule": "ssldiff_fast.diffusion",
    "WindowPlan": "ssldiff_fast.canvas",
    "decode_image": "ssldiff_fast.canvas",
    "decode_rows": "ssldiff_fast.canvas",
    "encode_image": "ssldiff_fast.canvas",
    "encode_rows": "ssldiff_fast.canvas",
    "encode": "ssldiff_fast.slides.encode",
    "load": "ssldiff_fast.models.load",
    "open_decoder": "ssldiff_fast.canvas",
    "open_slide": "ssldiff_fast.slides",
    "optimize": "ssldiff_fast.models.optimize",
    "sample": "ssldiff_fast.canvas",
    "sample_rows": "ssldiff_fast.canvas",
    "StateFolder": "ssldiff_fast.canvas",
    "Synthesis": "ssldiff_fast.synthesis",
    "TissueMask": "ssldiff_fast.canvas",
    "synthesize": "ssldiff_fast.synthesis",
    "synthesize_patches": "ssldiff_fast.patches",
}

# Rooms that are attributes without an import of their own, as in `sf.ops.scatter_mean`.
_ROOMS = ("adapters", "canvas", "diffusion", "encoders", "evaluation", "models", "ops", "slides")

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
