# SPDX-License-Identifier: Apache-2.0
"""`ssldiff encode`: a slide or image to its grid of embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class Region(click.ParamType):
    """x,y,width,height in level-0 pixels."""

    name = "x,y,w,h"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != 4:
            self.fail(
                f"{value!r} is not x,y,width,height in level-0 pixels, for example 0,0,2048,2048",
                param,
                ctx,
            )
        return numbers


@click.command(name="encode")
@click.argument("slide", type=click.Path(path_type=Path))
@click.option("--model", default="he-demo", show_default=True, help="Model whose encoder is used.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="The grid to write [default: SLIDE's name with .h5, in the current folder].",
)
@click.option(
    "--mpp",
    type=float,
    help="Micrometres per pixel of SLIDE, where the file does not say it (plain images).",
)
@click.option("--region", type=Region(), help="Part of SLIDE, in level-0 pixels.")
@click.option(
    "--mask",
    type=click.Path(path_type=Path),
    help="Tissue mask: GeoJSON in level-0 pixels, or an image of the whole slide.",
)
@click.option("--no-mask", is_flag=True, help="Encode every cell, tissue or not.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--workers", type=click.IntRange(0), help="Processes that read ahead.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def command(
    slide: Path,
    model: str,
    out: Path | None,
    mpp: float | None,
    region: tuple[int, int, int, int] | None,
    mask: Path | None,
    no_mask: bool,
    batch_size: int,
    workers: int | None,
    device: str,
    overwrite: bool,
) -> None:
    """Encode SLIDE (anything OpenSlide reads, PNG, JPEG or TIFF) to a grid of embeddings.

    The grid is an HDF5 file that CLAM, TRIDENT and torchmil read too.
    """
    import ssldiff_fast as sf
    from ssldiff_fast.slides.encode import encode
    from ssldiff_fast.slides.output import check_output
    from ssldiff_fast.slides.reader import open_slide

    if mask is not None and no_mask:
        raise ValueError("--mask and --no-mask exclude each other: give one of them")
    # Before the model is loaded, which takes longer than finding a wrong name.
    source = open_slide(slide, mpp=mpp)
    if region is not None:
        source.check_region(region)
    out = check_output(out or Path(f"{slide.stem}.h5"), overwrite=overwrite)
    loaded = sf.load(model, device=device)
    grid = encode(
        source,
        loaded.encoder,
        region=region,
        mask=False if no_mask else mask or True,
        batch_size=batch_size,
        workers=workers,
        out=out,
        overwrite=overwrite,
    )
    click.echo(f"{out}: {grid}")
    click.echo(f"next: ssldiff synthesize {out} --model {model} -o {out.stem}.tif")
