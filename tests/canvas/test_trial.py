# SPDX-License-Identifier: Apache-2.0
"""A micro-batch that does not fit into memory is halved before the run starts, and the recipe says
what was taken. A GPU's lack of memory is played on a CPU here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ssldiff_fast as sf
from ssldiff_fast.canvas import trial
from ssldiff_fast.canvas.decode import DecodeSettings
from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser
from ssldiff_fast.models import UNet
from ssldiff_fast.models.autoencoder import VQModel
from tiny_models import tiny_grid, tiny_model


class Machine:
    """Has memory for so many windows; counts the calls of the network."""

    def __init__(self, fits: int) -> None:
        self.fits, self.calls = fits, list[int]()

    def __call__(self, batch: int) -> None:
        self.calls.append(batch)
        if batch > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("size", "most", "fits", "taken", "tried"),
    [
        (16, 100, 16, 16, [16]),
        (16, 100, 5, 4, [16, 8, 4]),
        (16, 9, 9, 16, [9]),  # so many never come together
        (64, 9, 8, 8, [9, 8]),  # 32 and 16 would be the same 9
        (12, 12, 4, 3, [12, 6, 3]),
        (1, 1, 1, 1, [1]),
    ],
)
def test_it_is_halved_until_it_fits(
    size: int, most: int, fits: int, taken: int, tried: list[int]
) -> None:
    machine = Machine(fits)
    assert trial.fitting("windows", size, machine, most=most) == taken
    assert machine.calls == tried


def test_what_was_taken_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    trial.fitting("windows", 16, Machine(4), most=20)
    assert caplog.messages == [
        "16 windows at once do not fit into memory: 4 are taken, as the recipe says"
    ]
    caplog.clear()
    trial.fitting("windows", 16, Machine(16), most=20)
    assert not caplog.messages


def test_not_even_one_is_one_sentence() -> None:
    with pytest.raises(MemoryError, match="not even one of the windows fits into the memory"):
        trial.fitting("windows", 4, Machine(0), most=4)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(batch: int) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trial.fitting("windows", 4, broken, most=4)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError('torch_call_dispatcher( "aten::new_empty", "", stack.data()) API call failed'),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_lack_of_memory_is_known_by_its_names(error: Exception) -> None:
    assert trial.is_out_of_memory(error)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, *, windows: int, tiles: int) -> Machine:
    """A device on which more windows or tiles at once run out of memory; the calls for windows."""
    monkeypatch.setattr(trial, "TRIED", ("cpu",))
    network, decode = UNet.forward, VQModel.decode
    for_windows, for_tiles = Machine(windows), Machine(tiles)

    def evaluated(self: UNet, x: Tensor, *others: Any, **options: Any) -> Tensor:
        for_windows(len(x))
        return network(self, x, *others, **options)

    def decoded(self: VQModel, z: Tensor, *others: Any, **options: Any) -> Tensor:
        for_tiles(len(z))
        return decode(self, z, *others, **options)

    monkeypatch.setattr(UNet, "forward", evaluated)
    monkeypatch.setattr(VQModel, "decode", decoded)
    return for_windows


def synthesized(folder: Path, name: str, **options: Any) -> sf.Synthesis:
    model = tiny_model()
    return sf.synthesize(
        model, tiny_grid(model, 2, 5), folder / name, steps=2, progress=False, **options
    )


@pytest.mark.parametrize("decoder", ["reference", "local", "global"])
def test_a_run_takes_what_fits_and_its_recipe_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    given = synthesized(tmp_path, "given.png", batch_size=2, decoder=decoder)
    with monkeypatch.context() as patch:
        machine = short_of_memory(patch, windows=3, tiles=2)
        halved = synthesized(tmp_path, "halved.png", batch_size=4, decoder=decoder)
        tried = machine.calls
    assert max(tried[2:]) <= 2  # never in the middle
    assert halved.recipe["batch_size"] == 2
    assert halved.recipe == given.recipe
    assert halved.path.read_bytes() == given.path.read_bytes()


def test_tiles_of_the_decode_are_tried_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, windows=9, tiles=1)
    made = synthesized(tmp_path, "image.png", batch_size=4)
    assert made.recipe["batch_size"] == 4
    assert made.recipe["decode"]["batch_size"] == 1


def test_nothing_is_written_where_not_even_one_window_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, windows=0, tiles=9)
    with pytest.raises(MemoryError, match="not even one of the windows fits"):
        synthesized(tmp_path, "image.tif", state=tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_patches_take_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, windows=2, tiles=1)
    model = tiny_model()
    made = sf.synthesize_patches(
        model, tiny_grid(model, 2, 5), tmp_path / "folder", steps=2, batch_size=4, progress=False
    )
    assert made.recipe["batch_size"] == 2
    assert made.recipe["decode_batch_size"] == 1


def test_on_a_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = LDMDenoiser(tiny_model())
    assert trial.fitting_windows(denoiser, 10**6, most=10**6, guided=True) == 10**6
    settings = DecodeSettings(batch_size=10**6)
    assert trial.fitting_tiles(denoiser.model, (64, 64), settings) == settings


@pytest.mark.gpu
def test_on_a_gpu_windows_that_do_not_fit_are_halved_and_then_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    denoiser = LDMDenoiser(tiny_model().to("cuda"))
    trial.evaluate(denoiser, 16, guided=True)  # loads libraries, whose memory is not the windows'
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_reserved() + 2**28
    torch.cuda.set_per_process_memory_fraction(limit / whole)
    try:
        taken = trial.fitting_windows(denoiser, 2**16, most=2**16, guided=True)
        assert 16 <= taken < 2**16
        assert f"{2**16} windows at once do not fit into memory: {taken} are taken" in caplog.text
        trial.evaluate(denoiser, taken, guided=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
