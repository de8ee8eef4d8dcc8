# SPDX-License-Identifier: Apache-2.0
"""The codebook that an autoencoder begins its quantised training with."""

from __future__ import annotations

import torch
from torch import Tensor

from ssldiff_fast.ops.vq_nearest import vq_nearest

_KMEANS_STEPS = 10


@torch.no_grad()
def codes_from_latents(
    latents: Tensor,  # [M, D] fp32
    n_embed: int,
) -> Tensor:  # [n_embed, D]
    """Lloyd's algorithm from a random subset; a code that attracts nothing stays where it is.

    With fewer latents than codes some codes are equal, and only the first of equals is used.
    """
    chosen = torch.randperm(len(latents), device=latents.device)[:n_embed]
    codes = latents[chosen.repeat(-(-n_embed // len(chosen)))[:n_embed]].clone()
    for _ in range(_KMEANS_STEPS):
        _, indices = vq_nearest(latents, codes)
        sums = torch.zeros_like(codes).index_add_(0, indices, latents)
        counts = torch.bincount(indices, minlength=n_embed)
        used = counts > 0
        codes[used] = sums[used] / counts[used, None]
    return codes
