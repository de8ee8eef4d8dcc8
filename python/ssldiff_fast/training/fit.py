# SPDX-License-Identifier: Apache-2.0
"""What every trainer shares: the Lightning trainer, moving averages, saving and going on."""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from ssldiff_fast.models.pretrained import parse_device
from ssldiff_fast.training.folder import CHECKPOINT, averaged_weights, read_checkpoint
from ssldiff_fast.training.recipe import FitRecipe

__all__ = ["MovingAverage", "Task", "averaged_weights", "run"]

_METRICS = "metrics.csv"


class Task(L.LightningModule):
    """A training task: `fit` gives its optimiser; subclasses give `training_step`."""

    def __init__(self, fit: FitRecipe) -> None:
        super().__init__()
        self.fit_recipe = fit

    def configure_optimizers(self) -> OptimizerLRScheduler:
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
            before = self.average.get(name, value).detach()
            self.average[name] = before.to(value.device, copy=True)  # checkpoints load to the CPU

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


class Progress(Callback):
    """Steps done and an estimate of what remains, also for a run that goes on: Lightning's own bar
    counts from where such a run began, but to where it would end without that."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.done = steps, done

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar = tqdm(total=self.steps, initial=self.done, desc="training", unit="step")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.bar.set_postfix(
            {name: f"{float(v):.3g}" for name, v in trainer.progress_bar_metrics.items()},
            refresh=False,
        )
        self.bar.update()

    def teardown(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


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
        device: "cpu", "cuda", "cuda:1" or the like.
        progress: whether to show a progress bar.
        callbacks: more of Lightning's callbacks.

    Returns:
        The moving average; `task` itself is left with the averaged weights.

    Raises:
        FileExistsError: `folder` has a checkpoint and `resume` is false.
        KeyboardInterrupt: after Ctrl-C, once the step under way is done and saved.
    """
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise FileExistsError(
            f"{checkpoint} exists already; add --resume to go on from it, or name another folder"
        )
    fit = task.fit_recipe
    done = int(read_checkpoint(folder)["global_step"]) if checkpoint.exists() else 0
    average = MovingAverage(fit.ema_decay)
    if done >= fit.steps:
        average.load_state_dict({"average": averaged_weights(folder)})
        task.load_state_dict(average.average)
        return average
    # A run that goes on must not draw its first random numbers a second time.
    L.seed_everything(_seed_at(fit.seed, done), verbose=False)
    _keep_metrics(folder, done)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        bar = [Progress(fit.steps, done)] if progress else []
        trainer = _trainer(fit, folder, device, [average, *bar, *(callbacks or [])])
        loader = (
            batches
            if isinstance(batches, DataLoader)
            else DataLoader(batches, batch_size=None, num_workers=0)
        )
        with _stop_after_step(trainer) as stopped:
            trainer.fit(task, loader, ckpt_path=str(checkpoint) if done else None)
        trainer.save_checkpoint(checkpoint)
    if stopped.is_set():
        raise KeyboardInterrupt
    task.load_state_dict(average.average)
    return average


def _trainer(fit: FitRecipe, folder: Path, device: str, callbacks: list[Callback]) -> L.Trainer:
    target = parse_device(device, call="train")
    saver = ModelCheckpoint(
        dirpath=folder,
        filename=Path(CHECKPOINT).stem,
        every_n_train_steps=fit.save_every_steps,
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    return L.Trainer(
        accelerator=target.type,
        devices=1 if target.index is None else [target.index],
        max_steps=fit.steps,
        precision=fit.precision,
        gradient_clip_val=fit.gradient_clip,
        callbacks=[*callbacks, saver],
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=50,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _seed_at(seed: int, step: int) -> int:
    if step == 0:
        return seed
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _keep_metrics(folder: Path, step: int) -> None:
    """Lightning's logger deletes the metrics that it finds; those until `step` are kept aside."""
    path = folder / _METRICS
    if step and path.is_file():
        path.rename(folder / f"metrics-until-{step}.csv")


@contextmanager
def _stop_after_step(trainer: L.Trainer) -> Iterator[threading.Event]:
    """The first Ctrl-C ends the run after the step under way, so that what is saved is whole; the
    second ends it at once, and what was saved before remains."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        trainer.should_stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    except SystemExit:
        # Lightning makes this of a KeyboardInterrupt, which would hide it from the caller.
        if stopped.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
