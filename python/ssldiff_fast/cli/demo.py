# SPDX-License-Identifier: Apache-2.0
"""`ssldiff demo`: the main job on one real slide."""

from __future__ import annotations

from pathlib import Path

import click

from .encode import Region


@click.command(name="demo")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for grid, image and preview.",
)
@click.option(
    "--slide",
    type=click.Path(path_type=Path),
    help="Any slide or image, in place of the demo's own (fetched once with pip).",
)
@click.option("--region", type=Region(), help="Part of the slide, in level-0 pixels.")
@click.option("--mpp", type=float, help="Micrometres per pixel of a slide that does not say it.")
@click.option("--model", default="he-demo", show_default=True, help="Bundled model, or a path.")
@click.option("--preset", default="fast", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--mask/--no-mask", default=True, help="Leave what is no tissue plain; the default.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the outputs of an earlier run.")
def command(
    out: Path,
    slide: Path | None,
    region: tuple[int, int, int, int] | None,
    mpp: float | None,
    model: str,
    preset: str,
    seed: int,
    mask: bool,
    device: str,
    overwrite: bool,
) -> None:
    """Make a synthetic slide after a real one, and a picture of both."""
    from ..demo import run_demo

    made = run_demo(
        out,
        slide=slide,
        region=region,
        mpp=mpp,
        model=model,
        preset=preset,
        seed=seed,
        mask=mask,
        device=device,
        overwrite=overwrite,
    )
    width, height = made.size_px
    click.echo("")
    click.echo(f"{made.image}: synthetic slide of {width} x {height} px; QuPath, OpenSlide open it")
    click.echo(f"{made.preview}: reference, tissue mask and result side by side: look at it")
    click.echo(f"{made.grid}: the grid of embeddings that it was made from")
    click.echo("")
    for stage, seconds in made.seconds.items():
        click.echo(f"{seconds:7.1f} s  {stage}")
    click.echo(f"{sum(made.seconds.values()):7.1f} s  in all")
    click.echo("")
    click.echo(
        f"similarity of the result's embeddings to the grid's: {made.similarity.mean:.3f} "
        f"(mean cosine over {made.similarity.count} cells; {made.floor.mean:.3f} with the cells "
        "shuffled)"
    )
    again = f"ssldiff synthesize {made.grid} --seed 1{' --mask' if mask else ''} -o another.tif"
    click.echo(f"next: {again}")
