# SPDX-License-Identifier: Apache-2.0
"""What goes along with every training run: averages, time, what was set aside, progress."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from tqdm import tqdm

from ssldiff_fast.training.task import LOG_EVERY, Task


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
        if trainer.global_step % LOG_EVERY == 0:
            figures = {k: f"{float(v):.3g}" for k, v in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix(figures, refresh=False)
        self.bar.update()

    def teardown(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if hasattr(self, "bar"):
            self.bar.close()
