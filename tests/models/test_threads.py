# SPDX-License-Identifier: Apache-2.0
"""Threads: fewer where others are busy, by evaluations of the run; the same bits on any number."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssldiff_fast as sf
from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.models import UNet, threads
from ssldiff_fast.models.threads import ThreadChoice
from tiny_models import tiny_grid, tiny_model


class Machine:
    """Cores of which others take some: where we want more than is left, all wait for one."""

    def __init__(self, cores: int, busy: int = 0) -> None:
        self.cores, self.busy, self.now, self.used = cores, busy, 0.0, list[int]()
        self.choice = ThreadChoice(cores, set_threads=self._set, clock=lambda: self.now)

    def _set(self, count: int) -> None:
        self.threads = count

    def _work(self) -> str:
        waits = 35.0 if self.threads > self.cores - self.busy else 0.0
        self.now += 10 / self.threads + waits
        self.used.append(self.threads)
        return "output"

    def run(self, evaluations: int) -> list[int]:
        """The threads of so many evaluations."""
        self.used.clear()
        for _ in range(evaluations):
            assert self.choice.evaluate(self._work, count=1) == "output"
        return list(self.used)


def test_on_a_quiet_machine_all_threads_are_used_but_for_two_evaluations() -> None:
    machine = Machine(cores=2)
    assert machine.run(100) == [2, 2, 2, 1, 1, *[2] * 95]


def test_where_a_core_is_busy_fewer_threads_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(cores=2, busy=1)
    assert machine.run(6) == [2, 2, 2, 1, 1, 1]
    (said,) = caplog.messages
    assert said == "threads: 1 of 2 (an evaluation takes 40 s with 2, 10 s with 1)"


def test_it_goes_down_as_long_as_that_is_faster() -> None:
    assert Machine(cores=16, busy=10).run(10)[-1] == 4
    assert Machine(cores=16, busy=1).run(10)[-1] == 8


def test_a_run_that_gets_slower_tries_again() -> None:
    machine = Machine(cores=2)
    machine.run(50)
    machine.busy = 1
    assert machine.run(9) == [2, 2, 2, 2, 1, 1, 1, 1, 1]


def test_more_threads_are_tried_again_ever_more_rarely_until_they_pay() -> None:
    machine = Machine(cores=2, busy=1)
    machine.run(5)
    tries = [number for number, used in enumerate(machine.run(400)) if used == 2]
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    assert gaps == sorted(gaps)
    assert len(tries) < 12
    machine.busy = 0
    assert machine.run(60)[-1] == 2


def test_small_batches_between_large_ones_are_no_slowness() -> None:
    machine = Machine(cores=2)
    machine.run(5)
    for number in range(100):
        machine.choice.evaluate(machine._work, count=[16, 1, 1, 1][number % 4])
    assert set(machine.used[5:]) == {2}


@pytest.fixture
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "_usual_numbers", lambda: {2})
    yield
    torch.set_num_threads(before)


def used(model: sf.LatentDiffusion) -> bool:
    """Whether threads are chosen, and given back afterwards."""
    before = torch.get_num_threads()
    with threads.measured_threads(model):
        chosen = threads._choice.get() is not None
        torch.set_num_threads(1)
        assert threads.given_threads() == (before if chosen else 1)
    if chosen:
        assert torch.get_num_threads() == before
    torch.set_num_threads(before)
    return chosen


@pytest.mark.usefixtures("_no_variables", "_two_threads")
def test_what_the_user_says_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert used(model)
    torch.set_num_threads(3)
    assert not used(model)
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not used(model)
    monkeypatch.delenv("OMP_NUM_THREADS")
    model.execution = "compile"
    assert not used(model)


def test_what_pytorch_takes_by_itself_is_known() -> None:
    code = "import torch, ssldiff_fast.models.threads as t; print(t._usual_numbers())"
    code += "; print(torch.get_num_threads())"
    variables = {name: v for name, v in os.environ.items() if "NUM_THREADS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    numbers, taken = done.stdout.splitlines()
    assert taken in numbers


@pytest.mark.usefixtures("_no_variables", "_two_threads")
def test_a_run_takes_fewer_threads_and_its_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    options = {"steps": 4, "batch_size": 2, "progress": False}
    given = sf.synthesize(model, tiny_grid(model), tmp_path / "given.png", **options)
    numbers: list[int] = []
    forward = UNet.forward

    class Slow(ThreadChoice):
        def __init__(self, count: int) -> None:
            super().__init__(
                count, clock=lambda: 100.0 * sum(n == 2 for n in numbers) + len(numbers)
            )

    def noted(self: UNet, *arguments: object) -> torch.Tensor:
        numbers.append(torch.get_num_threads())
        return forward(self, *arguments)

    monkeypatch.setattr(threads, "ThreadChoice", Slow)
    monkeypatch.setattr(UNet, "forward", noted)
    fewer = sf.synthesize(model, tiny_grid(model), tmp_path / "fewer.png", **options)
    assert numbers[:3] == [2, 2, 2]
    assert set(numbers[3:]) == {1}
    assert torch.get_num_threads() == 2
    assert fewer.recipe == given.recipe
    assert fewer.path.read_bytes() == given.path.read_bytes()
    sf.synthesize_patches(model, tiny_grid(model), tmp_path / "folder", steps=2, progress=False)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_models_bits_do_not_depend_on_the_threads(dtype: str) -> None:
    model = sf.load("he-demo", dtype=dtype)
    denoiser, before = LDMDenoiser(model), torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, *model.window, generator=generator)
    cells = torch.randn(5, 1, denoiser.conditioner.width, generator=generator)
    made = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            with torch.no_grad():
                state = denoiser.prepare(cells, torch.zeros_like(cells[:1]))
                output = denoiser(x, 500.0, state, torch.arange(5))
                made.append(
                    (output, model.from_latent(x[:2]), model.to_latent(torch.zeros(1, 3, 128, 128)))
                )
    finally:
        torch.set_num_threads(before)
    for others in made[1:]:
        assert all(map(torch.equal, made[0], others))
