# SPDX-License-Identifier: Apache-2.0
"""The folder of a training run: its checkpoint, and the recipe that the run was started with.

`recipe.yaml` and `data.yaml` are recipes themselves, so that a folder says on its own what it is,
also after a bundled recipe has changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ssldiff_fast.slides.output import atomic_bytes, check_output
from ssldiff_fast.training.recipe import DataRecipe, RunRecipe

CHECKPOINT = "last.ckpt"
_RECIPE = "recipe.yaml"
_DATA = "data.yaml"
_MAY_CHANGE = ("fit.steps", "fit.save_every_steps")  # what going on may change: for how long


def prepare_folder(folder: Path, recipe: RunRecipe, data: DataRecipe, *, resume: bool) -> int:
    """Make a run's folder, or check that a run can go on there, before anything is computed.

    Args:
        folder: the run's folder.
        recipe: what is trained.
        data: the images that it is trained on.
        resume: go on from the folder's checkpoint, where there is one.

    Returns:
        The number of steps that are done already.

    Raises:
        FileExistsError: the folder has a checkpoint and `resume` is false.
        ValueError: the run there has another recipe, or its checkpoint is damaged.
        OSError: the folder cannot be made or written to.
    """
    checkpoint = folder / CHECKPOINT
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the run's folder {folder} is a file; name a folder")
    if checkpoint.exists() and not resume:
        raise FileExistsError(
            f"{checkpoint} exists already; add --resume to go on from it, or name another folder"
        )
    done = int(read_checkpoint(folder)["global_step"]) if checkpoint.exists() else 0
    if done:
        _check_same(folder, recipe, data)
    folder.mkdir(parents=True, exist_ok=True)
    check_output(folder / _RECIPE, overwrite=True)
    mine = {**recipe.model_dump(mode="json"), "data": _DATA}
    for name, content in ((_DATA, data.model_dump(mode="json")), (_RECIPE, mine)):
        atomic_bytes(folder / name, yaml.safe_dump(content, sort_keys=False).encode())
    return done


def recorded_recipe(folder: Path) -> Path | None:
    """The recipe that a run was started with, where its folder has it."""
    path = folder / _RECIPE
    return path if path.is_file() else None


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """What `fit.run` saved last, also while the run goes on; read without executing code.

    Raises:
        FileNotFoundError: the folder has no checkpoint yet.
        ValueError: the file is damaged, or written by something else.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; name the folder of a run that has saved something"
        )
    with path.open("rb") as file:  # missing rights show here, as the OSError that they are
        file.read(1)
    try:
        # Damaged files fail in many ways: UnpicklingError, EOFError, RuntimeError, KeyError, ...
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
        average, step = content["callbacks"]["MovingAverage"]["average"], content["global_step"]
        if not (isinstance(average, dict) and isinstance(step, int)):
            raise TypeError("entries of another kind")
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is no whole checkpoint of a training run ({type(error).__name__}); copy it "
            "again, or train again in another folder"
        ) from None
    return content


def averaged_weights(folder: Path) -> dict[str, Tensor]:
    """The averaged weights in a run's folder, also while the run goes on: the best on what was set
    aside, where that is evaluated, or else the last.

    Raises:
        FileNotFoundError: the folder has no checkpoint yet.
        ValueError: its checkpoint is damaged.
    """
    kept = read_checkpoint(folder)["callbacks"]["MovingAverage"]
    average: dict[str, Tensor] = kept.get("best") or kept["average"]
    return average


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def load_part(module: nn.Module, weights: dict[str, Tensor], prefix: str, folder: Path) -> None:
    """Load the weights under `prefix` into a module.

    Raises:
        ValueError: they belong to a module of another shape.
    """
    try:
        module.load_state_dict(part_of(weights, prefix))
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {folder} are not those of the recipe given with it "
            f"({_first_problem(error)}); give the recipe that this run was started with"
        ) from None


def _first_problem(error: RuntimeError) -> str:
    """The first of the differences that `load_state_dict` lists, one a line, under a title."""
    lines = [line.strip() for line in str(error).splitlines()]
    return (lines[1] if len(lines) > 1 else lines[0])[:200].rstrip(". ")


def _check_same(folder: Path, recipe: RunRecipe, data: DataRecipe) -> None:
    """A run that was started before recipes were recorded is believed."""
    for name, mine in ((_RECIPE, recipe), (_DATA, data)):
        path = folder / name
        if not path.is_file():
            continue
        recorded = _flat(type(mine).model_validate(yaml.safe_load(path.read_text())))
        for entry, value in _flat(mine).items():
            if entry in _MAY_CHANGE or (name == _RECIPE and entry == "data"):
                continue
            if recorded.get(entry) != value:
                raise ValueError(
                    f"the run in {folder} has {entry} {recorded.get(entry)!r}, but the recipe now "
                    f"says {value!r}; go on with its own recipe, --recipe {folder / _RECIPE}, or "
                    "start a run in another folder"
                )


def _flat(recipe: RunRecipe | DataRecipe) -> dict[str, Any]:
    """Entries by dotted names; lists and free-form dictionaries stay whole."""
    result: dict[str, Any] = {}
    for name, value in recipe.model_dump(mode="json").items():
        if name == "fit":
            result.update({f"fit.{key}": item for key, item in value.items()})
        else:
            result[name] = value
    return result
