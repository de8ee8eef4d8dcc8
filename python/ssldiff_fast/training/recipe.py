# SPDX-License-Identifier: Apache-2.0
"""What a training run is: the recipe files under `recipes/`, checked before anything starts."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceRecipe(_Strict):
    """Files of one kind: a glob, their mpp, their share, and what is set aside."""

    files: str
    mpp: float = Field(gt=0)
    weight: float = Field(1.0, gt=0)
    holdout: list[str] = []
    exclude: list[tuple[float, float, float, float]] = []  # x, y, w, h in pixels of the file


class DataRecipe(_Strict):
    """The images of a run and how patches are drawn from them."""

    mpp: float = Field(gt=0)
    scales: list[float] = [1.0]
    stain_jitter: float = Field(0.0, ge=0)
    sources: list[SourceRecipe]


class FitRecipe(_Strict):
    """How long and how fast: one optimiser step is one batch."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(200, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    gradient_clip: float = Field(1.0, gt=0)
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed"
    seed: int = 0
    save_every_steps: int = Field(500, gt=0)


class VAERecipe(_Strict):
    """`ssldiff train vae`: a VQ autoencoder."""

    data: str
    fit: FitRecipe
    ddconfig: dict[str, Any]
    n_embed: int = Field(gt=1)
    embed_dim: int = Field(gt=0)
    crop_px: int = Field(96, gt=0)
    unquantised_steps: int = Field(ge=0)
    latent_noise: float = Field(0.0, ge=0)
    gradient_weight: float = Field(1.0, ge=0)
    commitment: float = Field(0.25, ge=0)


class EncoderRecipe(_Strict):
    """`ssldiff train encoder`: a timm network by contrastive learning (NT-Xent)."""

    data: str
    fit: FitRecipe
    name: str
    network: str
    width: int = Field(gt=0)
    patch_px: int = Field(gt=0)
    projection: int = Field(128, gt=0)
    temperature: float = Field(0.2, gt=0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class LDMRecipe(_Strict):
    """`ssldiff train ldm`: the U-Net and its conditioner on latents prepared beforehand."""

    data: str
    fit: FitRecipe
    name: str
    unet: dict[str, Any]
    schedule: dict[str, Any]
    prediction: Literal["eps", "v", "x0"] = "v"
    window: tuple[int, int]
    patches: int = Field(gt=0)
    drop_condition: float = Field(0.1, ge=0, lt=1)


Recipe = TypeVar("Recipe", bound=_Strict)


def find_recipe(name: str | Path) -> Path:
    """Path of a recipe: a file, or the name of one that comes with the package."""
    path = Path(name)
    if path.is_file():
        return path
    folder = resources.files("ssldiff_fast.training") / "recipes"
    bundled = Path(str(folder)) / f"{name}.yaml"
    if bundled.is_file():
        return bundled
    known = sorted(p.stem for p in Path(str(folder)).glob("*.yaml"))
    raise FileNotFoundError(f"recipe '{name}' is neither a file nor one of {known}")


def read_recipe(name: str | Path, kind: type[Recipe]) -> Recipe:
    """Read and check a recipe.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an entry is missing, unknown or out of range; the message names the first.
    """
    path = find_recipe(name)
    try:
        return kind.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"recipe {path}: {where}: {first['msg']}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not YAML: {error}") from None
