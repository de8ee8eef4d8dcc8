# SPDX-License-Identifier: Apache-2.0
"""What every trainer shares: the Lightning trainer, moving averages, time, saving and going on.

No step waits for the device: losses are read and written now and then only.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from ssldiff_fast.models.pretrained import parse_device
from ssldiff_fast.training.folder import CHECKPOINT, averaged_weights, read_checkpoint
from ssldiff_fast.training.recipe import FitRecipe

__all__ = ["MovingAverage", "Task", "averaged_weights", "run"]

_METRICS = "metrics.csv"
_LOG_EVERY = 50  # steps
_LEAST_MINUTES = 1 / 60  # of training, where preparing has taken all of the time


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
        return (self.global_step + 1) % _LOG_EVERY == 0

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


class MovingAverage(Callback):
    """Exponential moving average of a task's weights, kept in its checkpoints.

    The decay grows as (1 + step) / (10 + step) up to the recipe's, so that short runs work too.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        # The averages with the least loss on what was set aside, where that is evaluated.
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, value in pl_module.state_dict().items():
            before = self.average.get(name, value).detach()
            self.average[name] = before.to(value.device, copy=True)  # checkpoints load to the CPU
        self.best = {k: v.to(self.average[k].device) for k, v in self.best.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = pl_module.state_dict()
        floats = [name for name, value in state.items() if value.is_floating_point()]
        others = [name for name in state if name not in set(floats)]
        self._pairs = [
            ([self.average[name] for name in names], [state[name] for name in names])
            for names in (floats, others)
        ]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        decay = min(self.decay, (1 + trainer.global_step) / (10 + trainer.global_step))
        (averages, values), (counts, counted) = self._pairs
        torch._foreach_lerp_(averages, values, 1 - decay)
        if counts:
            torch._foreach_copy_(counts, counted)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The task has the averaged weights meanwhile."""
        with torch.no_grad():
            kept = [[value.clone() for value in values] for _, values in self._pairs]
            for averages, values in self._pairs:
                if values:
                    torch._foreach_copy_(values, averages)
            try:
                yield
            finally:
                for before, (_, values) in zip(kept, self._pairs):
                    if values:
                        torch._foreach_copy_(values, before)

    def keep_if_best(self, loss: float) -> None:
        """Keep the present averages if no others had a loss so low."""
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: value.clone() for name, value in self.average.items()}

    @property
    def chosen(self) -> dict[str, Tensor]:
        """The best averages, or the last where nothing was set aside."""
        return self.best or self.average

    def restart(self, pl_module: nn.Module, prefix: str) -> None:
        """Take the present values of some parameters as their average (after a jump)."""
        for name, value in pl_module.state_dict().items():
            if name.startswith(prefix):
                self.average[name].copy_(value.detach())

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "best": self.best, "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]
        self.best = state_dict.get("best", {})
        self.best_loss = float(state_dict.get("best_loss", math.inf))


class Clock(Callback):
    """Ends a run after a time, all its parts together; `Task.done` follows it."""

    def __init__(self, minutes: float | None) -> None:
        self.limit = math.inf if minutes is None else 60 * minutes
        self.before = 0.0  # seconds of earlier parts

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.perf_counter()
        self._tell(pl_module)

    @property
    def seconds(self) -> float:
        """Seconds of training until now."""
        return self.before + time.perf_counter() - getattr(self, "start", time.perf_counter())

    def _tell(self, task: L.LightningModule) -> None:
        assert isinstance(task, Task)
        task.elapsed = min(1.0, self.seconds / self.limit)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._tell(pl_module)
        if self.seconds >= self.limit:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = float(state_dict["seconds"])


class HeldOut(Callback):
    """Evaluates the averaged weights on what was set aside, before the first step and evenly over
    the run, and has the best kept: a run that starts from a model never ends with a worse one."""

    def __init__(self, average: MovingAverage, evaluations: int) -> None:
        self.average, self.evaluations = average, evaluations

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        self.last = math.floor(pl_module.done * self.evaluations)
        if self.evaluations and trainer.global_step == 0:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Task)
        due = math.floor(pl_module.done * self.evaluations)
        if due <= self.last:
            return
        self.last = due
        self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: L.Trainer, pl_module: Task) -> None:
        with self.average.applied(), trainer.precision_plugin.val_step_context():
            figures = {name: float(v) for name, v in pl_module.held_out().items()}
        if not figures:
            return
        self.average.keep_if_best(figures["held_out_loss"])
        assert trainer.logger is not None
        trainer.logger.log_metrics(figures, trainer.global_step)
        said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        tqdm.write(f"step {trainer.global_step}: {said}", file=sys.stderr)


class Progress(Callback):
    """Steps done and an estimate of what remains, also for a run that goes on: Lightning's own bar
    counts from where such a run began, but to where it would end without that."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.done = steps, done

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A log file gets a line every few seconds instead of a bar that moves.
        often = 0.1 if sys.stderr.isatty() else 5.0
        self.bar = tqdm(
            total=self.steps,
            initial=self.done,
            desc="training",
            unit="step",
            mininterval=often,
            maxinterval=max(10.0, often),
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % _LOG_EVERY == 0:
            figures = {k: f"{float(v):.3g}" for k, v in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix(figures, refresh=False)
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
    minutes: float | None = None,
    since: float | None = None,
    callbacks: list[Callback] | None = None,
) -> MovingAverage:
    """Train until the recipe's last step, saving into `folder` as often as the recipe says.

    A time limit ends the run as if its schedule had been so long: the learning rate falls with the
    time that is left.

    Args:
        task: what is trained.
        batches: a dataset that yields whole batches.
        folder: gets `last.ckpt` and `metrics.csv`.
        resume: go on from `last.ckpt` where there is one.
        device: "cpu", "cuda", "cuda:1" or the like.
        progress: whether to show a progress bar.
        minutes: end after so much training, in all parts of the run together.
        since: when the time began, by `time.perf_counter`; now, if training is all there is to it.
        callbacks: more of Lightning's callbacks.

    Returns:
        The moving average; `task` itself is left with the averaged weights, the best where
        something was set aside.

    Raises:
        FileExistsError: `folder` has a checkpoint and `resume` is false.
        ValueError: `minutes` is not above 0.
        KeyboardInterrupt: after Ctrl-C, once the step under way is done and saved.
    """
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise FileExistsError(
            f"{checkpoint} exists already; add --resume to go on from it, or name another folder"
        )
    if minutes is not None and not minutes > 0:
        raise ValueError(f"train: minutes is {minutes}, but a time above 0 was expected")
    fit = task.fit_recipe
    done = int(read_checkpoint(folder)["global_step"]) if checkpoint.exists() else 0
    average = MovingAverage(fit.ema_decay)
    if done >= fit.steps:
        average.load_state_dict({"average": averaged_weights(folder)})
        task.load_state_dict(average.chosen)
        return average
    # A run that goes on must not draw its first random numbers a second time.
    L.seed_everything(_seed_at(fit.seed, done), verbose=False)
    _keep_metrics(folder, done)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        bar = [Progress(fit.steps, done)] if progress else []
        if minutes is not None and since is not None:
            minutes = max(minutes - (time.perf_counter() - since) / 60, _LEAST_MINUTES)
        watch = [Clock(minutes), HeldOut(average, fit.evaluations)]
        used = [average, *watch, *bar, *(callbacks or [])]
        trainer = _trainer(fit, folder, device, used, limited=minutes is not None)
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
    task.load_state_dict(average.chosen)
    return average


def _trainer(
    fit: FitRecipe, folder: Path, device: str, callbacks: list[Callback], *, limited: bool
) -> L.Trainer:
    target = parse_device(device, call="train")
    if target.type == "cuda":
        torch.set_float32_matmul_precision("high")
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
        log_every_n_steps=_LOG_EVERY,
        # All batches have one shape; where time is short, trying out every convolution costs more
        # of it than the best one saves.
        benchmark=target.type == "cuda" and not limited,
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
