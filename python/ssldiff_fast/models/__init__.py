# SPDX-License-Identifier: Apache-2.0
"""U-Net, autoencoders, conditioners and whole models; checkpoints in and out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssldiff_fast.models.autoencoder import AutoencoderKL, VQModel
    from ssldiff_fast.models.checkpoint import load_weights
    from ssldiff_fast.models.conditioner import PatchConditioner, PatchRegionConditioner
    from ssldiff_fast.models.ldm import LatentDiffusion
    from ssldiff_fast.models.unet import UNet

# Names are imported at first use, so that a part needs only what it uses itself. `load` is not
# among them: its module has that name.
_MODULES = {
    "AutoencoderKL": "autoencoder",
    "LatentDiffusion": "ldm",
    "PatchConditioner": "conditioner",
    "PatchRegionConditioner": "conditioner",
    "UNet": "unet",
    "VQModel": "autoencoder",
    "load_weights": "checkpoint",
}

__all__ = [
    "AutoencoderKL",
    "LatentDiffusion",
    "PatchConditioner",
    "PatchRegionConditioner",
    "UNet",
    "VQModel",
    "load_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)
