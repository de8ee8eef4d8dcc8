# SPDX-License-Identifier: Apache-2.0
"""Other people's latent diffusion models on our canvas: diffusers, CompVis, k-diffusion.

Nothing here imports those libraries: models are recognised by what they offer, so their versions
are their users' choice.
"""

from ssldiff_fast.adapters.compvis import CompVisDenoiser, from_compvis
from ssldiff_fast.adapters.diffusers import DiffusersDenoiser, from_diffusers
from ssldiff_fast.adapters.first_stage import FirstStage, first_stage_from_diffusers
from ssldiff_fast.adapters.kdiffusion import DenoisedPrediction, KDiffusionDenoiser, from_kdiffusion
from ssldiff_fast.adapters.network import NetworkDenoiser
from ssldiff_fast.adapters.schedulers import check_scheduler

__all__ = [
    "CompVisDenoiser",
    "DenoisedPrediction",
    "DiffusersDenoiser",
    "FirstStage",
    "KDiffusionDenoiser",
    "NetworkDenoiser",
    "check_scheduler",
    "first_stage_from_diffusers",
    "from_compvis",
    "from_diffusers",
    "from_kdiffusion",
]
