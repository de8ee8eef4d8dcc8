# SPDX-License-Identifier: Apache-2.0
"""What is trained: the part of a run that differs between trainers, and its optimiser."""

from __future__ import annotations

import math

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ssldiff_fast.training.recipe import FitRecipe

LOG_EVERY = 50  # steps


class Task(L.LightningModule):
    """A training task: `fit` gives its optimiser; subclasses give `training_step`.

    Attributes:
        elapsed: share of the run's time that is over; 0 where the time is not limited.
    """

    def __init__(self, fit: FitRecipe) -> None:
        super().__init__()
        self.fit_recipe = fit
        self.elapsed = 0.0

    @property
    def done(self) -> float:
        """Share of the run that is over, by its steps or its time, whichever says more."""
        return max(self.global_step / self.fit_recipe.steps, self.elapsed)

    @property
    def logs(self) -> bool:
        """Whether this step's figures are written: reading them waits for the device."""
        return (self.global_step + 1) % LOG_EVERY == 0

    def held_out(self) -> dict[str, Tensor]:
        """Figures of what was set aside, with the weights as they are; `held_out_loss` chooses the
        weights that are kept. Empty where there are none (yet)."""
        return {}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses this for fused optimisers, because of scaled gradients, which bfloat16
        # and float32 do not have.
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        fit = self.fit_recipe
        optimiser = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad],
            lr=fit.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=fit.weight_decay,
            fused=True,
        )

        def factor(step: int) -> float:
            """Linear warm-up, then a cosine to a twentieth, which follows the time where that is
            limited."""
            if step < fit.warmup_steps:
                return (step + 1) / fit.warmup_steps
            done = (step - fit.warmup_steps) / max(1, fit.steps - fit.warmup_steps)
            done = max(done, self.elapsed)
            return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
