# SPDX-License-Identifier: Apache-2.0
"""Models that a run starts from: a whole model that `load` takes, or another run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssldiff_fast.encoders.encoder import weights_hash
from ssldiff_fast.models.autoencoder import VQModel
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.load import load
from ssldiff_fast.models.unet import UNet
from ssldiff_fast.training.folder import CHECKPOINT
from ssldiff_fast.training.recipe import LDMRecipe, VAERecipe

_SETTLED = ("encoder.", "quant_conv.", "quantize.")  # what makes latents and codes


def is_run(start: str | Path) -> bool:
    """Whether a start is the folder of a run, not a model."""
    return (Path(start) / CHECKPOINT).is_file()


def load_start(name: str | Path) -> LatentDiffusion:
    """A whole model in float32 on the CPU, with its encoder.

    Args:
        name: of a bundled model, or a folder or file that `load` takes.

    Raises:
        FileNotFoundError, ValueError: as `load`; or the model is not conditioned on embeddings.
    """
    model = load(name, execution="eager")
    if model.conditioner is None:
        raise ValueError(
            f"the model {name} to start from is not conditioned on embeddings; choose one that is"
        )
    return model


def load_start_vae(name: str | Path) -> LatentDiffusion:
    """A whole model whose autoencoder a run can start from.

    Raises:
        FileNotFoundError, ValueError: as `load`; or its autoencoder has no codes.
    """
    model = load(name, execution="eager")
    if not isinstance(model.vae, VQModel):
        raise ValueError(
            f"the autoencoder of {name} is a {type(model.vae).__name__}, but `train vae` trains "
            "autoencoders with a codebook; start from a model with a VQModel"
        )
    return model


def vae_recipe_like(recipe: VAERecipe, vae: VQModel, start: str | Path) -> VAERecipe:
    """The recipe, with what it leaves out as the autoencoder has it.

    Raises:
        ValueError: it describes another autoencoder.
    """
    mine = vae.config()
    given = {name: getattr(recipe, name) for name in mine}
    if given["ddconfig"] is not None:
        given["ddconfig"] = {**mine["ddconfig"], **given["ddconfig"]}
    return _like(recipe, given, mine, start)


def ldm_recipe_like(recipe: LDMRecipe, model: LatentDiffusion, start: str | Path) -> LDMRecipe:
    """The recipe, with what it leaves out as the model has it.

    Raises:
        ValueError: it describes another model.
    """
    config = model.to_config()
    mine = {name: config[name] for name in ("unet", "schedule", "prediction")}
    mine["window"] = model.window
    given = {name: getattr(recipe, name) for name in mine}
    if given["schedule"] is not None:
        given["schedule"] = {**mine["schedule"], **given["schedule"]}
    if given["unet"] is not None:
        try:
            with torch.device("meta"):
                given["unet"] = UNet(**given["unet"]).config.to_config()
        except TypeError as error:
            raise ValueError(f"recipe '{recipe.name}': {error}") from None
    return _like(recipe, given, mine, start)


Recipe = TypeVar("Recipe", VAERecipe, LDMRecipe)


def _like(recipe: Recipe, given: dict[str, Any], mine: dict[str, Any], start: str | Path) -> Recipe:
    for name, value in given.items():
        if value is not None and value != mine[name]:
            raise ValueError(
                f"the recipe's {name} is not that of {start}, which the run is to start from "
                f"({_first_difference(value, mine[name])}); leave {name} out of the recipe, or "
                "start from a model of that kind"
            )
    return recipe.model_copy(update=mine)


def _first_difference(given: Any, mine: Any) -> str:
    if isinstance(given, dict) and isinstance(mine, dict):
        for name in sorted({*given, *mine}):
            if given.get(name) != mine.get(name):
                return f"{name} is {given.get(name)!r}, not {mine.get(name)!r}"
    return f"{given!r}, not {mine!r}"


def check_same_latents(vae: VQModel, model: LatentDiffusion, source: str | Path) -> None:
    """Raise ValueError where an autoencoder, of `source`, makes other latents than the model's."""
    given, mine = vae.state_dict(), model.vae.state_dict()
    for name, value in _settled(mine).items():
        if name not in given or not torch.equal(given[name], value):
            raise ValueError(
                f"the autoencoder of {source} makes other latents than that of model "
                f"{model.name!r} ({name} differs); train it with decoder_only, starting from "
                "that model"
            )


def check_trained_on(folder: Path, model: LatentDiffusion) -> None:
    """Raise ValueError where a run of `train ldm` had latents or embeddings of another model."""
    try:
        settings = json.loads((folder / "latents.json").read_text())
    except (FileNotFoundError, ValueError):
        raise ValueError(
            f"{folder / 'latents.json'} is missing or damaged; name the folder of a run of "
            "`train ldm`"
        ) from None
    made_by = {
        "autoencoder": (settings.get("vae"), weights_hash(model.vae.state_dict())),
        "encoder": (settings.get("encoder"), model.encoder.spec.weights_hash),
    }
    for words, (theirs, mine) in made_by.items():
        if theirs != mine:
            raise ValueError(
                f"the run in {folder} was trained on what another {words} made than that of model "
                f"{model.name!r}; name the model that it was started from"
            )


def _settled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(_SETTLED)}
