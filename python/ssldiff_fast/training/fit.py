# SPDX-License-Identifier: Apache-2.0
"""What every trainer shares: the Lightning trainer, saving and going on.

No step waits for the device: losses are read and written now and then only.
"""

from __future__ import annotations

import signal
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
from torch.utils.data import DataLoader, IterableDataset

from ssldiff_fast.models.pretrained import parse_device
from ssldiff_fast.training.callbacks import Clock, HeldOut, MovingAverage, Progress
from ssldiff_fast.training.folder import CHECKPOINT, averaged_weights, read_checkpoint
from ssldiff_fast.training.recipe import FitRecipe
from ssldiff_fast.training.task import LOG_EVERY, Task

_METRICS = "metrics.csv"
_LEAST_MINUTES = 1 / 60  # of training, where preparing has taken all of the time


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
        log_every_n_steps=LOG_EVERY,
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
