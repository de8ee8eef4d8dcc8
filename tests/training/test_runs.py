# SPDX-License-Identifier: Apache-2.0
"""What all trainers share: saving, averaging, going on, and stopping."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ssldiff_fast.training.callbacks import MovingAverage
from ssldiff_fast.training.encoder import train_encoder
from ssldiff_fast.training.fit import run
from ssldiff_fast.training.folder import averaged_weights, read_checkpoint
from ssldiff_fast.training.ldm import train_ldm
from ssldiff_fast.training.recipe import FitRecipe
from ssldiff_fast.training.task import Task
from ssldiff_fast.training.vae import train_vae
from tiny_training import FIT, Workshop


class Numbers(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        while True:
            yield torch.ones(2, 3)


class LineTask(Task):
    """One linear layer that remembers its weights after each step."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(FitRecipe.model_validate({**FIT, "steps": 6, **changes}))
        self.layer = nn.Linear(3, 1)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.seen: list[dict[str, Tensor]] = []
        self.draws: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count += 1
        self.draws.append(float(torch.rand(())))
        return (self.layer(batch) - 3).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append({k: v.detach().clone() for k, v in self.state_dict().items()})


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def train(folder: Path, task: Task | None = None, *, resume: bool = False, **more: Any) -> LineTask:
    task = task or LineTask()
    run(task, Numbers(), folder, resume=resume, progress=False, **more)
    assert isinstance(task, LineTask)
    return task


def test_a_run_leaves_the_averaged_weights_in_its_folder_and_in_the_task(tmp_path: Path) -> None:
    task = train(tmp_path, LineTask(ema_decay=0.5))
    saved = averaged_weights(tmp_path)
    assert read_checkpoint(tmp_path)["global_step"] == 6
    for name, value in task.state_dict().items():
        assert torch.equal(value, saved[name])
    assert int(task.count) == 6


def test_the_moving_average_is_the_recurrence(tmp_path: Path) -> None:
    torch.manual_seed(3)
    task = LineTask(ema_decay=0.4)
    expected = task.layer.weight.detach().clone()
    train(tmp_path, task)
    for step, weights in enumerate(task.seen, start=1):
        decay = min(0.4, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights["layer.weight"]
    torch.testing.assert_close(averaged_weights(tmp_path)["layer.weight"], expected)


def test_the_average_follows_a_jump_where_it_is_told_to() -> None:
    task, average = LineTask(), MovingAverage(0.9)
    average.average = {k: v.clone() for k, v in task.state_dict().items()}
    with torch.no_grad():
        task.layer.weight.fill_(5)
        task.layer.bias.fill_(5)
    average.restart(task, "layer.bias")
    assert float(average.average["layer.bias"]) == 5
    assert not (average.average["layer.weight"] == 5).any()


def test_a_stopped_run_goes_on_to_what_an_uninterrupted_one_ends_with(tmp_path: Path) -> None:
    """The task's batches are alike, so that nothing depends on what is drawn."""
    torch.manual_seed(1)
    start = {k: v.clone() for k, v in LineTask().state_dict().items()}

    def fresh() -> LineTask:
        task = LineTask()
        task.load_state_dict(start)
        return task

    whole = train(tmp_path / "whole", fresh())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", fresh(), callbacks=[At(3, interrupt)])
    assert read_checkpoint(tmp_path / "parts")["global_step"] == 3
    rest = train(tmp_path / "parts", resume=True)
    assert len(rest.seen) == 3
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(rest.state_dict()[name], value, rtol=0, atol=0)


def test_going_on_draws_other_random_numbers_than_the_beginning(tmp_path: Path) -> None:
    first = LineTask()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, first, callbacks=[At(3, interrupt)])
    assert not set(first.draws) & set(train(tmp_path, resume=True).draws)


def test_ctrl_c_gives_the_interrupt_back_to_the_caller_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[At(3, interrupt)])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once_and_keeps_what_was_saved_before(tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[At(3, twice)])
    assert read_checkpoint(tmp_path)["global_step"] == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_fails_keeps_what_was_saved_before(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path, callbacks=[At(5, fail)])
    assert read_checkpoint(tmp_path)["global_step"] == 4
    assert len(train(tmp_path, resume=True).seen) == 2


def test_a_finished_run_has_nothing_left_to_do_and_can_be_made_longer(tmp_path: Path) -> None:
    done = train(tmp_path)
    again = train(tmp_path, resume=True)
    assert not again.seen
    assert torch.equal(again.layer.weight, done.layer.weight)
    assert len(train(tmp_path, LineTask(steps=8), resume=True).seen) == 2


def test_progress_counts_to_the_last_step_also_where_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(LineTask(), Numbers(), tmp_path, resume=False, callbacks=[At(3, interrupt)])
    assert "| 3/6 " in capsys.readouterr().err
    run(LineTask(), Numbers(), tmp_path, resume=True)
    shown = capsys.readouterr().err
    assert "| 3/6 " in shown
    assert "| 6/6 " in shown


def test_the_metrics_of_a_run_that_goes_on_are_all_kept(shop: Workshop) -> None:
    train_vae(shop.recipe("vae"), shop.root, shop.run("vae"), progress=False)
    (shop.run("vae") / "metrics.csv").write_text("step\n1\n")
    longer = shop.recipe("vae", fit__steps=6)
    train_vae(longer, shop.root, shop.run("vae"), resume=True, progress=False)
    assert (shop.run("vae") / "metrics-until-4.csv").read_text() == "step\n1\n"


def test_a_folder_with_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(FileExistsError, match=r"exists already; add --resume"):
        train(tmp_path)


def test_an_unknown_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device is 'abacus'"):
        train(tmp_path, device="abacus")


class Slow(Callback):
    """Each step takes a while."""

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(0.05)


class Rates(Callback):
    """Notes the share done and the learning rate after each step."""

    def __init__(self) -> None:
        self.noted: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Task)
        self.noted.append((pl_module.done, trainer.optimizers[0].param_groups[0]["lr"]))


def test_a_time_limit_ends_a_run_with_its_learning_rate_at_the_end_too(tmp_path: Path) -> None:
    rates = Rates()
    train(tmp_path, LineTask(steps=10_000), minutes=1.0 / 60, callbacks=[Slow(), rates])
    steps = read_checkpoint(tmp_path)["global_step"]
    assert 5 < steps <= 21
    shares, rate = zip(*rates.noted)
    assert shares[-1] == 1
    assert list(shares) == sorted(shares)
    # The last step's rate is that of the time before it: near a twentieth of 1e-3.
    assert rate[1] > 9e-4
    assert rate[-1] < 1.5e-4
    assert rate[len(rate) // 2] == pytest.approx(5e-4, abs=2e-4)


def test_the_time_of_all_parts_of_a_run_counts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, LineTask(steps=900), minutes=1, callbacks=[Slow(), At(8, interrupt)])
    clock = read_checkpoint(tmp_path)["callbacks"]["Clock"]
    assert 0.4 <= clock["seconds"] < 3
    task, rates = LineTask(steps=900), Rates()
    limit = (clock["seconds"] + 0.2) / 60
    train(tmp_path, task, resume=True, minutes=limit, callbacks=[Slow(), rates])
    assert 1 <= len(task.seen) <= 5
    assert rates.noted[0][0] > 0.5


def test_a_run_within_its_time_is_not_changed_by_the_limit(tmp_path: Path) -> None:
    torch.manual_seed(1)
    start = {k: v.clone() for k, v in LineTask().state_dict().items()}
    ends = []
    for minutes in (None, 1e6):
        task = LineTask()
        task.load_state_dict(start)
        ends.append(train(tmp_path / str(minutes), task, minutes=minutes).layer.weight.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_a_time_limit_that_is_none_is_an_error(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(ValueError, match="but a time above 0 was expected"):
        train(tmp_path, minutes=minutes)


class AsideTask(LineTask):
    """Is best in the middle of its run, and remembers what it was evaluated with."""

    def held_out(self) -> dict[str, Tensor]:
        self.evaluated = getattr(self, "evaluated", [])
        self.evaluated.append({k: v.detach().clone() for k, v in self.state_dict().items()})
        assert not torch.is_grad_enabled()
        return {"held_out_loss": (torch.tensor(self.done) - 0.5).abs()}


def test_the_averages_that_are_best_on_what_was_set_aside_are_kept(tmp_path: Path) -> None:
    task = AsideTask(steps=8, evaluations=4, ema_decay=0.5)
    train(tmp_path, task)
    assert len(task.evaluated) == 5  # before the first step, and four times
    best = task.evaluated[2]
    saved = averaged_weights(tmp_path)
    for name, value in best.items():
        assert torch.equal(saved[name], value)
        assert torch.equal(task.state_dict()[name], value)
    last = read_checkpoint(tmp_path)["callbacks"]["MovingAverage"]["average"]
    assert not torch.equal(last["layer.weight"], best["layer.weight"])
    # Evaluation had the averages, and training went on with its own weights.
    assert not torch.equal(best["layer.weight"], task.seen[3]["layer.weight"])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "held_out_loss" in lines[0]
    assert len(lines) == 6


class WorseningTask(LineTask):
    """Is best before its first step."""

    def held_out(self) -> dict[str, Tensor]:
        return {"held_out_loss": torch.tensor(self.done)}


def test_a_run_that_makes_its_start_worse_keeps_the_start(tmp_path: Path) -> None:
    task = WorseningTask(evaluations=3)
    start = {name: value.clone() for name, value in task.state_dict().items()}
    train(tmp_path, task)
    for name, value in averaged_weights(tmp_path).items():
        assert torch.equal(value, start[name])


def test_training_goes_on_from_its_own_weights_after_an_evaluation(tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain, aside = LineTask(steps=6), AsideTask(steps=6, evaluations=6)
    aside.load_state_dict(plain.state_dict())
    train(tmp_path / "plain", plain)
    train(tmp_path / "aside", aside)
    for mine, theirs in zip(plain.seen, aside.seen):
        assert torch.equal(mine["layer.weight"], theirs["layer.weight"])


def test_the_best_averages_are_kept_through_a_run_that_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, AsideTask(steps=8, evaluations=8), callbacks=[At(5, interrupt)])
    before = averaged_weights(tmp_path)
    train(tmp_path, AsideTask(steps=8, evaluations=8), resume=True)
    for name, value in averaged_weights(tmp_path).items():
        assert torch.equal(value, before[name])


def test_trainers_evaluate_what_was_set_aside(shop: Workshop) -> None:
    data = yaml.safe_load((shop.root / "data.yaml").read_text())
    data["sources"][0]["holdout"] = ["1.png"]
    (shop.root / "data.yaml").write_text(yaml.safe_dump(data))
    changes = {"fit__evaluations": 2}
    recipe = shop.recipe("vae", **changes, fixed_share=0.5)
    train_vae(recipe, shop.root, shop.run("vae"), progress=False)
    lines = (shop.run("vae") / "metrics.csv").read_text()
    for name in ("held_out_psnr", "held_out_psnr_fixed", "held_out_grey_levels_apart"):
        assert name in lines
    train_encoder(shop.recipe("encoder"), shop.root, shop.run("encoder"), progress=False)
    parts = {**shop.parts, "vae_recipe": recipe}
    train_ldm(shop.recipe("ldm", **changes), shop.root, shop.run("ldm"), **parts, progress=False)
    assert "held_out_loss" in (shop.run("ldm") / "metrics.csv").read_text()


# The run's folder, through the trainers.
