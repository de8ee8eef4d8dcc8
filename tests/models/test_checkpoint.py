# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are read without executing code from them, and bad files are named."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from small_models import (
    assert_same_weights,
    full_state,
    lightning_checkpoint,
    small_model,
    stub_class,
)
from ssldiff_fast.models.checkpoint import load_weights, read_weights


class Command:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "system"), (eval, "eval"), (subprocess.run, "run")]
)
def test_code_in_a_checkpoint_is_refused_and_never_runs(
    tmp_path: Path, function: Any, name: str
) -> None:
    proof = tmp_path / "ran"
    command = f"open({str(proof)!r}, 'w')" if function is eval else f"touch {proof}"
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "x": Command(function, command)}, tmp_path / "c"
    )
    with pytest.raises(ValueError, match=rf"holds \S*{name}, which may execute code"):
        read_weights(tmp_path / "c")
    assert not proof.exists()


def test_an_unknown_class_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = stub_class(monkeypatch, "somebody.models.Network")
    torch.save(kind(), tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"holds somebody.models.Network, .* state_dict alone"):
        read_weights(tmp_path / "c.ckpt")


def test_what_training_programs_store_beside_the_weights_is_skipped_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        attributes = stub_class(patch, "pytorch_lightning.utilities.parsing.AttributeDict", dict)
        container = stub_class(patch, "omegaconf.listconfig.ListConfig")()
        container.__dict__.update(_content=[1, 2], _parent=None)
        state = full_state(small_model())
        extra = {
            "hyper_parameters": attributes(lr=1e-4, options=argparse.Namespace(batch=3)),
            "config": container,
            "best": np.float64(0.25),
            "history": np.arange(3.0),
            "root": tmp_path,
            "counts": OrderedDict(a=1),
        }
        torch.save(lightning_checkpoint(patch, state, **extra), tmp_path / "c.ckpt")
    names = ("pytorch_lightning.callbacks.model_checkpoint", "omegaconf.listconfig")
    before = {name: sys.modules.get(name) for name in names}
    weights = read_weights(tmp_path / "c.ckpt")
    assert {name: sys.modules.get(name) for name in names} == before
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)


def test_files_of_the_older_format_load(tmp_path: Path) -> None:
    weights = small_model().unet.state_dict()
    path = tmp_path / "unet.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert read_weights(path).keys() == weights.keys()


@pytest.mark.parametrize("part", ["unet", "vae", "conditioner"])
def test_the_bare_weights_of_one_part_load_into_it_and_into_the_whole(
    tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model()
    source = getattr(model, part)
    torch.save(source.state_dict(), tmp_path / "part.ckpt")
    for target in (small_model(), getattr(small_model(), part)):
        into = getattr(target, part, target)
        with torch.no_grad():
            for parameter in into.parameters():
                parameter.zero_()
        load_weights(target, tmp_path / "part.ckpt")
        assert_same_weights(into, source)
    (record,) = caplog.records  # into the whole, of which the other parts keep their values
    assert "of the model keep their initial values" in record.getMessage()


@pytest.mark.parametrize("part", ["unet", "vae", "conditioner"])
def test_one_part_is_taken_from_a_whole_checkpoint_without_a_word(
    tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(full_state(small_model()), tmp_path / "whole.ckpt")
    target = getattr(small_model(), part)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    match = load_weights(target, tmp_path / "whole.ckpt")
    assert_same_weights(target, getattr(small_model(), part))
    assert (match.missing, match.left_out) == ([], [])
    assert caplog.records == []


def test_averaged_weights_of_an_autoencoder_of_its_own_are_taken(tmp_path: Path) -> None:
    model = small_model()
    state = dict(model.vae.state_dict())
    for name, value in list(state.items()):
        state["model_ema." + name.replace(".", "")] = value / 2
    torch.save({"state_dict": state}, tmp_path / "vae.ckpt")
    load_weights(model.vae, tmp_path / "vae.ckpt")
    for half, whole in zip(model.vae.parameters(), small_model().vae.parameters()):
        assert torch.equal(half, whole / 2)


def test_another_part_matches_nothing(tmp_path: Path) -> None:
    model = small_model()
    torch.save(model.unet.state_dict(), tmp_path / "unet.ckpt")
    with pytest.raises(ValueError, match="matches no parameter"):
        load_weights(model.vae, tmp_path / "unet.ckpt")


@pytest.mark.parametrize("name", ["c.ckpt", "c.safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.98])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, keep: float) -> None:
    from safetensors.torch import save_file

    path = tmp_path / name
    state = full_state(small_model())
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(ValueError, match=rf"{name} is (no|not a) whole .* truncated"):
        read_weights(path)


@pytest.mark.parametrize("name", ["c.ckpt", "c.safetensors"])
def test_a_foreign_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"<!DOCTYPE html><p>Quota exceeded</p>" * 40)
    with pytest.raises(ValueError, match=rf"{name} is (no|not a) whole"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [([1, 2], "holds a list"), ({"a": 1}, "holds no weights"), ({}, "holds no weights")],
)
def test_a_file_without_weights_is_named(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=words):
        read_weights(tmp_path / "c.ckpt")


def test_a_missing_file_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/c.ckpt"):
        read_weights(Path("c.ckpt"))
