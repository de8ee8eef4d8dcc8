# SPDX-License-Identifier: Apache-2.0
"""`ssldiff train`: an autoencoder, an encoder and a diffusion model on images of one's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)
_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


@click.group(name="train")
def command() -> None:
    """Train an autoencoder, an encoder and a diffusion model.

    \b
    In this order, each in a folder of its own:
      ssldiff train vae --data IMAGES -o runs/vae
      ssldiff train encoder --data IMAGES -o runs/encoder --vae runs/vae
      ssldiff train ldm --data IMAGES -o runs/ldm --vae runs/vae --encoder runs/encoder
      ssldiff train export -o my-model --ldm runs/ldm --vae runs/vae --encoder runs/encoder
    Or all of it at once:
      ssldiff train all --data IMAGES -o runs --minutes 30 --device cuda
    Or go on with a model, whose latents and embeddings stay as they are:
      ssldiff train ldm --data IMAGES -o runs/ldm --start he-demo --recipe he-demo-ldm-more
      ssldiff train vae --data IMAGES -o runs/decoder --start he-demo --recipe he-demo-decoder-more
      ssldiff train export -o my-model --start he-demo --ldm runs/ldm --vae runs/decoder

    Needs: pip install 'ssldiff_fast[train]'
    """


def _run_options(recipe: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What every training command takes."""
    options = [
        click.option(
            "--recipe",
            default=recipe,
            show_default=True,
            help="What to train: a recipe file, or the name of a bundled one.",
        ),
        click.option(
            "--data",
            type=_FOLDER,
            required=True,
            help="Folder of the images; the recipe's paths are relative to it.",
        ),
        click.option(
            "-o",
            "--output",
            type=_FOLDER,
            required=True,
            help="The run's folder: checkpoint, metrics and recipe.",
        ),
        click.option("--resume", is_flag=True, help="Go on from the folder's last checkpoint."),
        click.option("--device", default="cpu", show_default=True),
        click.option(
            "--minutes",
            type=click.FloatRange(min=0, min_open=True),
            help="Train for so long at most; the recipe's schedule shrinks to fit.",
        ),
    ]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _part_options(function: Callable[..., None]) -> Callable[..., None]:
    """The autoencoder and encoder that a diffusion model is made for."""
    for part, words in (("encoder", "encoder"), ("vae", "autoencoder")):
        function = click.option(
            f"--{part}-recipe",
            help=f"Recipe of the {words} [default: the one recorded in its folder].",
        )(function)
        function = click.option(
            f"--{part}",
            type=_FOLDER,
            help=f"Folder of `train {part}`; required without --start.",
        )(function)
    return function


@contextmanager
def _training(output: Path) -> Iterator[None]:
    """Keeps Lightning quiet, and says after Ctrl-C how to go on."""
    from ssldiff_fast.training.folder import CHECKPOINT

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    except KeyboardInterrupt:
        if (output / CHECKPOINT).exists():
            said = f"interrupted, and saved in {output}: give the same command with --resume"
        else:
            said = "interrupted before anything was trained: give the same command again"
        click.echo(f"\nssldiff: {said} to go on.", err=True)
        raise click.exceptions.Exit(_INTERRUPTED) from None


def _recipe_of(folder: Path, given: str | None, part: str) -> str | Path:
    from ssldiff_fast.training.folder import recorded_recipe

    return given or recorded_recipe(folder) or f"he-demo-{part}"


def _parts(
    vae: Path | None, vae_recipe: str | None, encoder: Path | None, encoder_recipe: str | None
) -> dict[str, Any]:
    for part, folder in (("vae", vae), ("encoder", encoder)):
        if folder is None:
            raise click.UsageError(
                f"Missing option '--{part}': name the folder of `train {part}`, or a whole model "
                "to start from with --start."
            )
    assert vae is not None
    assert encoder is not None
    return {
        "vae_folder": vae,
        "vae_recipe": _recipe_of(vae, vae_recipe, "vae"),
        "encoder_folder": encoder,
        "encoder_recipe": _recipe_of(encoder, encoder_recipe, "encoder"),
    }


@command.command(name="vae")
@_run_options("he-demo-vae")
@click.option(
    "--start",
    help="What this run starts from: folder of another run, or a model, bundled or a folder or "
    "file (decoder_only needs one).",
)
def train_vae(
    recipe: str,
    data: Path,
    output: Path,
    resume: bool,
    device: str,
    minutes: float | None,
    start: str | None,
) -> None:
    """Train a VQ autoencoder, the first stage."""
    from ssldiff_fast.training.vae import train_vae

    with _training(output):
        train_vae(recipe, data, output, start=start, resume=resume, device=device, minutes=minutes)
    click.echo(f"{output}: trained.")
    click.echo(f"next: ssldiff train encoder --data {data} -o RUN_FOLDER --vae {output}")


@command.command(name="encoder")
@_run_options("he-demo-encoder")
@click.option("--vae", type=_FOLDER, help="Folder of `train vae`, for recipes that need it.")
@click.option(
    "--vae-recipe", help="Recipe of the autoencoder [default: the one recorded in its folder]."
)
def train_encoder(
    recipe: str,
    data: Path,
    output: Path,
    resume: bool,
    device: str,
    minutes: float | None,
    vae: Path | None,
    vae_recipe: str | None,
) -> None:
    """Train an encoder by contrast; its embeddings condition the diffusion model."""
    from ssldiff_fast.training.encoder import train_encoder

    parts: dict[str, Any] = {}
    if vae is not None:
        parts = {"vae_folder": vae, "vae_recipe": _recipe_of(vae, vae_recipe, "vae")}
    with _training(output):
        train_encoder(recipe, data, output, **parts, resume=resume, device=device, minutes=minutes)
    click.echo(f"{output}: trained.")
    click.echo(f"next: ssldiff train ldm --data {data} -o RUN_FOLDER --vae ... --encoder {output}")


@command.command(name="ldm")
@_run_options("he-demo-ldm")
@click.option(
    "--start",
    help="A model to go on with, bundled or a folder or file: all parts are its own.",
)
@_part_options
def train_ldm(
    recipe: str,
    data: Path,
    output: Path,
    resume: bool,
    device: str,
    minutes: float | None,
    start: str | None,
    vae: Path | None,
    vae_recipe: str | None,
    encoder: Path | None,
    encoder_recipe: str | None,
) -> None:
    """Train a diffusion model on a trained autoencoder and encoder, or go on with a model."""
    from ssldiff_fast.training.ldm import train_ldm

    parts: dict[str, Any]
    if start is None:
        parts = _parts(vae, vae_recipe, encoder, encoder_recipe)
        told = f"--ldm {output} --vae {vae} --encoder {encoder}"
    else:
        parts = {"start": start, "vae_folder": vae, "encoder_folder": encoder}
        told = f"--start {start} --ldm {output}"
    with _training(output):
        train_ldm(recipe, data, output, **parts, resume=resume, device=device, minutes=minutes)
    click.echo(f"{output}: trained.")
    click.echo(f"next: ssldiff train export -o MODEL_FOLDER {told}")


@command.command(name="export")
@click.option("--ldm", type=_FOLDER, help="Folder of `train ldm`; required without --start.")
@click.option(
    "--start",
    help="The model that the runs were started from: it gives all that they do not.",
)
@click.option(
    "--recipe",
    help="Recipe of the diffusion model [default: the one recorded in its folder].",
)
@_part_options
@click.option("--card", type=_FILE, help="The model card: becomes README.md.")
@click.option(
    "--dtype",
    default="float16",
    show_default=True,
    help="Precision of the weights in the file.",
)
@click.option("-o", "--output", type=_FOLDER, required=True, help="The model's folder.")
@click.option("--overwrite", is_flag=True, help="Replace a model that is there.")
def export(
    ldm: Path | None,
    start: str | None,
    recipe: str | None,
    vae: Path | None,
    vae_recipe: str | None,
    encoder: Path | None,
    encoder_recipe: str | None,
    card: Path | None,
    dtype: str,
    output: Path,
    overwrite: bool,
) -> None:
    """Make one model folder of the three runs, or of a model and runs that started from it, also
    while they go on.

    It holds config.json and model.safetensors with the averaged weights, and loads with
    ssldiff_fast.load(FOLDER) and --model FOLDER.
    """
    from ssldiff_fast.training.ldm import load_ldm, load_tuned

    text = None if card is None else card.read_text(encoding="utf-8")
    if start is not None:
        if encoder is not None or recipe or vae_recipe or encoder_recipe:
            raise click.UsageError(
                "with --start the encoder is the model's and recipes are those recorded in the "
                "runs' folders: leave out --encoder and the recipes"
            )
        model = load_tuned(start, ldm_folder=ldm, vae_folder=vae)
    else:
        if ldm is None:
            raise click.UsageError("Missing option '--ldm': name the folder of `train ldm`.")
        parts = _parts(vae, vae_recipe, encoder, encoder_recipe)
        model = load_ldm(_recipe_of(ldm, recipe, "ldm"), ldm, **parts)
    model.save_pretrained(output, dtype=dtype, card=text, overwrite=overwrite)
    size = (output / "model.safetensors").stat().st_size
    click.echo(f"{output}: model '{model.name}', {size / 2**20:.1f} MB of weights.")
    click.echo(f"next: ssldiff demo --model {output}")


@command.command(name="look")
@click.option("--model", required=True, help="A bundled model, or a folder or file.")
@click.option("--data", type=_FOLDER, required=True, help="Folder of the images.")
@click.option(
    "--images",
    default="he-demo",
    show_default=True,
    help="Recipe of the images, which says what is set aside.",
)
@click.option("-o", "--output", type=_FOLDER, required=True, help="Gets look.png and look.json.")
@click.option("--device", default="cpu", show_default=True)
def look(model: str, data: Path, images: str, output: Path, device: str) -> None:
    """Measure a model on images that were set aside, and show some of them.

    look.png has them beside what the model makes of their embeddings; look.json has figures.
    """
    from ssldiff_fast.training.recipe import DataRecipe, read_recipe
    from ssldiff_fast.training.whole import look_at

    found = look_at(model, read_recipe(images, DataRecipe), data, output, device=device)
    click.echo(f"{output / 'look.png'}: {found}")


@command.command(name="all")
@click.option("--data", type=_FOLDER, required=True, help="Folder of the images.")
@click.option(
    "-o",
    "--output",
    type=_FOLDER,
    required=True,
    help="Gets vae, encoder and ldm, and the model in model.",
)
@click.option("--vae-recipe", default="he-demo-vae", show_default=True)
@click.option("--encoder-recipe", default="he-demo-encoder", show_default=True)
@click.option("--ldm-recipe", default="he-demo-ldm", show_default=True)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="For everything; the recipes' schedules shrink to fit.",
)
@click.option("--card", type=_FILE, help="The model card: becomes README.md.")
@click.option("--resume", is_flag=True, help="Go on where the same command was stopped.")
@click.option("--device", default="cpu", show_default=True)
def train_all(
    data: Path,
    output: Path,
    vae_recipe: str,
    encoder_recipe: str,
    ldm_recipe: str,
    minutes: float | None,
    card: Path | None,
    resume: bool,
    device: str,
) -> None:
    """Train all three, write the model, and look at it.

    With files set aside by the recipe of the images, look.png shows some of them beside what the
    model makes of their embeddings, and look.json has figures.
    """
    from ssldiff_fast.training import whole
    from ssldiff_fast.training.recipe import VAERecipe, read_run

    text = None if card is None else card.read_text(encoding="utf-8")
    with _training(output):
        folder = whole.train_all(
            data,
            output,
            recipes=whole.Recipes(vae_recipe, encoder_recipe, ldm_recipe),
            minutes=minutes,
            card=text,
            resume=resume,
            device=device,
        )
    click.echo(f"{folder}: trained.")
    images = read_run(vae_recipe, VAERecipe)[1]
    if any(source.holdout for source in images.sources):
        look = whole.look_at(folder, images, data, output, device=device)
        click.echo(f"{output / 'look.png'}: {look}")
    click.echo(f"next: ssldiff demo --model {folder}")
