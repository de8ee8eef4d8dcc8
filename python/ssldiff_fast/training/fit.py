# SPDX-License-Identifier: Apache-2.0
"""What every trainer shares: the Lightning trainer, moving averages, saving and going on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ssldiff_fast.training.recipe import FitRecipe

_LAST = "last.ckpt"


class Task(L.LightningModule):
    """A training task: `recipe.fit` gives its optimiser; subclasses give `training_step`."""

    def __init__(self, fit: FitRecipe) -> None:
        super().__init__()
        self.fit_recipe = fit

    def configure_optimizers(self) -> dict[str, Any]:
        fit = self.fit_recipe
        optimiser = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad],
            lr=fit.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=fit.weight_decay,
        )

        def factor(step: int) -> float:
            """Linear warm-up, then a cosine to a twentieth."""
            if step < fit.warmup_steps:
                return (step + 1) / fit.warmup_steps
            done = (step - fit.warmup_steps) / max(1, fit.steps - fit.warmup_steps)
            return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class MovingAverage(Callback):
    """Exponential moving average of a task's weights, kept in its checkpoints.

    The decay grows as (1 + step) / (10 + step) up to the recipe's, so that short runs work too.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, value in pl_module.state_dict().items():
            self.average.setdefault(name, value.detach().clone())

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        decay = min(self.decay, (1 + trainer.global_step) / (10 + trainer.global_step))
        for name, value in pl_module.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value.detach(), 1 - decay)
            else:
                self.average[name].copy_(value)

    def restart(self, pl_module: nn.Module, prefix: str) -> None:
        """Take the present values of some parameters as their average (after a jump)."""
        for name, value in pl_module.state_dict().items():
            if name.startswith(prefix):
                self.average[name].copy_(value.detach())

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]


def run(
    task: Task,
    batches: IterableDataset[Any] | DataLoader[Any],
    folder: Path,
    *,
    resume: bool,
    device: str = "cpu",
    progress: bool = True,
    callbacks: list[Callback] | None = None,
) -> MovingAverage:
    """Train until the recipe's last step, saving into `folder` as often as the recipe says.

    Args:
        task: what is trained.
        batches: a dataset that yields whole batches.
        folder: gets `last.ckpt` and `metrics.csv`.
        resume: go on from `last.ckpt` where there is one.

    Returns:
        The moving average; `task` itself is left with the averaged weights.

    Raises:
        FileExistsError: `folder` has a checkpoint and `resume` is false.
    """
    checkpoint = folder / _LAST
    if checkpoint.exists() and not resume:
        raise FileExistsError(
            f"{checkpoint} exists already; add --resume to go on from it, or name another folder"
        )
    fit = task.fit_recipe
    L.seed_everything(fit.seed, verbose=False)
    average = MovingAverage(fit.ema_decay)
    saver = ModelCheckpoint(
        dirpath=folder,
        filename="last",
        every_n_train_steps=fit.save_every_steps,
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    trainer = L.Trainer(
        accelerator=device,
        devices=1,
        max_steps=fit.steps,
        precision=fit.precision,
        gradient_clip_val=fit.gradient_clip,
        callbacks=[average, saver, *(callbacks or [])],
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=50,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loader = (
        batches
        if isinstance(batches, DataLoader)
        else DataLoader(batches, batch_size=None, num_workers=0)
    )
    trainer.fit(task, loader, ckpt_path=str(checkpoint) if checkpoint.exists() else None)
    trainer.save_checkpoint(checkpoint)
    task.load_state_dict(average.average)
    return average


def averaged_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The averaged weights in a run's folder, also while the run goes on.

    Raises:
        FileNotFoundError: the folder has no checkpoint yet.
    """
    checkpoint = folder / _LAST
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint} does not exist; has this run saved anything yet?")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return state["callbacks"]["MovingAverage"]["average"]
