# SPDX-License-Identifier: Apache-2.0
"""Our own latent diffusion models as window denoisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ssldiff_fast.models.ldm import LatentDiffusion


@dataclass(frozen=True)
class LDMState:
    """Conditioning tokens of a window set."""

    cond: Tensor  # [N, T, context_dim]
    uncond: Tensor | None  # [1, T, context_dim]


class LDMDenoiser:
    """The U-Net and conditioner of a `LatentDiffusion` as a `WindowDenoiser`."""

    def __init__(self, model: LatentDiffusion) -> None:
        if model.conditioner is None:
            raise ValueError(
                f"LDMDenoiser: model {model.name!r} has no conditioner, so a grid cannot guide it; "
                "load a model that was trained on embeddings."
            )
        self.model = model
        self.conditioner = model.conditioner

    @property
    def window(self) -> tuple[int, int]:
        """(h, w) in latents."""
        h, w = self.model.window
        return h, w

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return int(self.model.latent_channels)

    @property
    def prediction(self) -> str:
        """What the U-Net predicts: "eps", "v" or "x0"."""
        return str(self.model.prediction)

    def prepare(
        self,
        cond: Tensor,  # [N, T, D] fp32
        uncond: Tensor | None,  # [1, T, D] fp32
    ) -> LDMState:
        """Conditioning tokens of all windows, and the null token once."""
        # In float32 whatever the network's precision: the conditioner normalises before it casts.
        device = next(self.conditioner.parameters()).device
        tokens = self.conditioner(cond.to(device))
        return LDMState(tokens, None if uncond is None else self.conditioner(uncond.to(device)))

    def __call__(
        self,
        x: Tensor,  # [B, C, h, w] fp32
        t: float,
        state: LDMState,
        index: Tensor,  # [B] int64
    ) -> Tensor:
        """[2, B, C, h, w] conditional and unconditional, or [1, B, C, h, w] without guidance."""
        parameter = next(self.model.unet.parameters())
        # Not waited for: pageable memory has been read on return, and a wait would idle a GPU.
        context = state.cond[index.to(state.cond.device, non_blocking=True)]
        pair = 1
        if state.uncond is not None:
            pair = 2
            context = torch.cat((context, state.uncond.expand_as(context)))
        stacked = x.to(parameter.device, parameter.dtype).repeat(pair, 1, 1, 1)
        time = torch.full((stacked.shape[0],), t, device=parameter.device)
        output = self.model.unet(stacked, time, context)
        return output.view(pair, x.shape[0], *output.shape[1:]).to(x.device)
