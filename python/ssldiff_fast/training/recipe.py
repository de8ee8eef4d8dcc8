# SPDX-License-Identifier: Apache-2.0
"""What a training run is: the recipe files under `recipes/`, checked before anything starts."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Positive = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceRecipe(_Strict):
    """Files of one kind: a glob, their mpp, their share, and what is set aside."""

    files: str = Field(min_length=1)
    mpp: float = Field(gt=0)
    weight: float = Field(1.0, gt=0)
    holdout: list[str] = []  # names of files
    exclude: list[tuple[float, float, Positive, Positive]] = []  # x, y, w, h in pixels of the file

    @field_validator("files")
    @classmethod
    def _below_data(cls, value: str) -> str:
        if Path(value).is_absolute() or ".." in Path(value).parts:
            raise ValueError(f"'{value}' must lie below the folder of the images (--data)")
        return value


class DataRecipe(_Strict):
    """The images of a run and how patches are drawn from them."""

    mpp: float = Field(gt=0)
    scales: list[Positive] = Field([1.0], min_length=1)
    stain_jitter: float = Field(0.0, ge=0)
    sources: list[SourceRecipe] = Field(min_length=1)


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
    seed: int = Field(0, ge=0, lt=2**32)
    save_every_steps: int = Field(500, gt=0)
    evaluations: int = Field(0, ge=0)  # on the files set aside; the best averages are kept


class RunRecipe(_Strict):
    """What every run has: its images, and how long it takes."""

    data: str  # a bundled recipe, or a file: as given, or beside this recipe
    fit: FitRecipe


class VAERecipe(RunRecipe):
    """`ssldiff train vae`: a VQ autoencoder. What describes it may be left out of a run that starts
    from another one."""

    ddconfig: dict[str, Any] | None = None
    n_embed: int | None = Field(None, gt=1)
    embed_dim: int | None = Field(None, gt=0)
    crop_px: int = Field(96, gt=0)
    unquantised_steps: int = Field(ge=0)
    latent_noise: float = Field(0.0, ge=0)
    gradient_weight: float = Field(1.0, ge=0)
    colour_weight: float = Field(0.0, ge=0)  # of the mean colour of squares of 8 pixels
    commitment: float = Field(0.25, ge=0)
    # Also decode this share of a batch with the norms' statistics over all batches (population.py),
    # and pull both results together with this weight.
    fixed_share: float = Field(0.0, ge=0, le=1)
    agreement_weight: float = Field(1.0, ge=0)
    decoder_only: bool = False  # latents and codes stay as they are in the run that it starts from
    # A model: what it makes of the latents is learnt, in place of the images. What was trained on
    # its pictures, such as an encoder, stays good. With decoder_only.
    teacher: str | None = None


class EncoderRecipe(RunRecipe):
    """`ssldiff train encoder`: a timm network by contrastive learning (NT-Xent)."""

    name: str
    network: str
    width: int = Field(gt=0)
    patch_px: int = Field(gt=0)
    projection: int = Field(128, gt=0)
    temperature: float = Field(0.2, gt=0)
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    blur: float = Field(0.0, ge=0, le=1)  # largest share of a blurred copy in a view
    noise: float = Field(0.0, ge=0)  # largest standard deviation of noise in a view, of 2
    autoencoder_share: float = Field(0.0, ge=0, le=1)  # of second views; needs an autoencoder


class LDMRecipe(RunRecipe):
    """`ssldiff train ldm`: the U-Net and its conditioner on latents prepared beforehand. What
    describes them may be left out of a run that starts from a model."""

    name: str
    unet: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None
    prediction: Literal["eps", "v", "x0"] | None = None  # "v" without a model to start from
    window: tuple[int, int] | None = None
    patches: int = Field(gt=0)
    drop_condition: float = Field(0.1, ge=0, lt=1)

    @field_validator("unet")
    @classmethod
    def _conditioned(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("context_dim"), int):
            raise ValueError("context_dim is missing: the width of the conditioner's tokens")
        return value


def check_whole(recipe: RunRecipe, *names: str) -> None:
    """Raise ValueError where an entry is left out and there is no model that would give it."""
    for name in names:
        if getattr(recipe, name) is None:
            raise ValueError(
                f"the recipe has no {name}, which only a run that starts from a model may leave "
                f"out; add {name}, or name the model with --start"
            )


Recipe = TypeVar("Recipe", bound=_Strict)


def find_recipe(name: str | Path, *, beside: Path | None = None) -> Path:
    """Path of a recipe: a file, or the name of one that comes with the package.

    Args:
        name: the file or the name.
        beside: a recipe that refers to this one; a file is looked for in its folder first.

    Raises:
        FileNotFoundError: neither.
    """
    if beside is not None and (beside.parent / name).is_file():
        return beside.parent / name
    path = Path(name)
    if path.is_file():
        return path
    folder = Path(str(resources.files("ssldiff_fast.training"))) / "recipes"
    bundled = {path.stem: path for path in folder.glob("*.yaml")}
    if str(name) in bundled:
        return bundled[str(name)]
    raise FileNotFoundError(
        f"recipe '{name}' is neither a file nor one of {', '.join(sorted(bundled))}; check the name"
    )


def read_recipe(name: str | Path, kind: type[Recipe], *, beside: Path | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        name: a file, or the name of a bundled recipe.
        kind: what it must describe.
        beside: a recipe that refers to this one; a file is looked for in its folder first.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: an entry is missing, unknown or out of range; the message names the first.
    """
    path = find_recipe(name, beside=beside)
    try:
        return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(
            f"recipe {path}: {where}: {first['msg']}; a {kind.__name__} has the entries "
            f"{', '.join(kind.model_fields)}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"recipe {path} is not YAML: {reason}") from None


def read_run(name: str | Path, kind: type[RunKind]) -> tuple[RunKind, DataRecipe]:
    """A run's recipe, and the recipe of its images.

    Raises:
        FileNotFoundError, ValueError: as `read_recipe`, for either.
    """
    recipe = read_recipe(name, kind)
    return recipe, read_recipe(recipe.data, DataRecipe, beside=find_recipe(name))


RunKind = TypeVar("RunKind", bound=RunRecipe)
