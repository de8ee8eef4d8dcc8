# SPDX-License-Identifier: Apache-2.0
"""`ssldiff synthesize`: a grid to a synthetic slide or image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ..canvas.presets import PRESETS
from ..canvas.sampler import ORDERS
from .patches import check_options
from .patches import synthesize as synthesize_patches

if TYPE_CHECKING:
    from ..slides.cog import Georeference


class BatchSize(click.IntRange):
    """A number of windows from 1, or "auto"."""

    name = "number|auto"

    def __init__(self) -> None:
        super().__init__(1)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The number or the word."""
        return value if value == "auto" else super().convert(value, param, ctx)


@click.command(name="synthesize")
@click.argument("grid", type=click.Path(path_type=Path))
@click.option("--model", default="he-demo", show_default=True, help="Bundled model, or a path.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="The output, .tif, .ome.tif, .dzi, .zarr, .geo.tif or .png, or the folder of patches "
    "[default: GRID's name].",
)
@click.option("--patches", is_flag=True, help="One image per embedding instead of a large one.")
@click.option("--seeds", type=click.IntRange(1), help="Images per embedding [default: 1].")
@click.option(
    "--format",
    help="universal or cog of .tif, zarr-0.5 of .zarr; of patches png, jpeg or shards.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--preset", default="fast", show_default=True, help=f"One of {', '.join(PRESETS)}.")
@click.option("--steps", type=int, help="Steps, in place of the preset's.")
@click.option("--guidance-scale", type=float, help="1 is no guidance.")
@click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="LOW HIGH",
    help="No guidance outside these times, of 0 to 999.",
)
@click.option("--eta", type=float, help="Share of fresh noise in each step of DDIM.")
@click.option(
    "--reuse",
    type=click.IntRange(1),
    help="The network's lower levels are evaluated in every so many steps [default: 1].",
)
@click.option("--stride", type=int, help="Stride of the windows in latents.")
@click.option(
    "--decoder",
    type=click.Choice(["reference", "local", "global"]),
    help="Overlapping tiles as published, fewer or disjoint tiles, or the whole at once.",
)
@click.option("--decode-stride", type=int, help="Stride of the reference decoder's tiles.")
@click.option("--wrap", type=click.Choice(["x", "y", "both"]), help="Tileable along it.")
@click.option("--mask/--no-mask", help="Leave out windows without tissue: glass at no cost.")
@click.option("--order", type=click.Choice(("auto", *ORDERS)), default="auto", show_default=True)
@click.option(
    "--batch-size",
    type=BatchSize(),
    default=16,
    show_default=True,
    help="Windows of one network call, or auto for the fastest that fits into memory.",
)
@click.option("--crs", help="Of a GeoTIFF, for example EPSG:32633; with --transform.")
@click.option("--transform", help="Of a GeoTIFF: a,b,c,d,e,f from columns and rows to x and y.")
@click.option("--codec", help="Of a TIFF: jpeg, or deflate, which is lossless [default: jpeg].")
@click.option("--quality", type=click.IntRange(1, 100), help="Of JPEG [default: 90].")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    help="Of the network: float32, bfloat16, float16, or auto for the faster by measurement.",
)
@click.option(
    "--decoder-dtype",
    default="float32",
    show_default=True,
    help="Of the autoencoder's decoder: float32, bfloat16 or float16.",
)
@click.option(
    "--execution",
    default="auto",
    show_default=True,
    help="How the network is run: eager, graph (CUDA), compile, or auto.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Folder that keeps the run [default: OUT.state].",
)
@click.option("--no-state", is_flag=True, help="Keep nothing of a run that is broken off.")
@click.option(
    "--resume/--no-resume",
    default=None,
    help="Insist on going on, or start over [default: go on where there is a state].",
)
@click.option(
    "--preview",
    type=click.Path(path_type=Path),
    help="A .png that shows the canvas while it is denoised.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def command(
    grid: Path,
    model: str,
    out: Path | None,
    patches: bool,
    seeds: int | None,
    format: str | None,
    seed: int,
    preset: str,
    steps: int | None,
    guidance_scale: float | None,
    guidance_interval: tuple[float, float] | None,
    eta: float | None,
    reuse: int | None,
    stride: int | None,
    decoder: str | None,
    decode_stride: int | None,
    wrap: str | None,
    mask: bool,
    order: str,
    batch_size: int | Literal["auto"],
    crs: str | None,
    transform: str | None,
    codec: str | None,
    quality: int | None,
    device: str,
    dtype: str,
    decoder_dtype: str,
    execution: str,
    state: Path | None,
    no_state: bool,
    resume: bool | None,
    preview: Path | None,
    overwrite: bool,
) -> None:
    """Synthesize the image that GRID (made by `ssldiff encode`) describes.

    A run that is broken off, by Ctrl-C or by a power cut, goes on when the same command is given
    again, and ends in the same bytes.
    """
    given = {
        "stride": stride,
        "decoder": decoder,
        "decode_stride": decode_stride,
        "codec": codec,
        "crs": crs,
        "transform": transform,
        "guidance_interval": guidance_interval,
        "reuse": reuse,
        "wrap": wrap,
        "mask": mask or None,
        "order": None if order == "auto" else order,
        "state": state,
        "no_state": no_state or None,
        "resume": resume,
        "preview": preview,
    }
    check_options(patches, {**given, "seeds": seeds})
    if patches:
        if batch_size == "auto":
            raise click.UsageError("--batch-size auto is for large images; give a number.")
        return synthesize_patches(
            grid,
            model,
            out,
            seed=seed,
            seeds=seeds,
            preset=preset,
            steps=steps,
            guidance_scale=guidance_scale,
            eta=eta,
            batch_size=batch_size,
            format=format,
            quality=quality,
            device=device,
            dtype=dtype,
            decoder_dtype=decoder_dtype,
            execution=execution,
            overwrite=overwrite,
        )
    import ssldiff_fast as sf

    out = out or Path(f"{grid.stem}.tif")
    if no_state and (state or resume):
        raise click.UsageError("--no-state keeps nothing to go on from; leave it out.")
    done = sf.synthesize(
        model,
        grid,
        out,
        seed=seed,
        preset=preset,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        eta=eta,
        reuse=reuse,
        stride=stride,
        decode_stride=decode_stride,
        decoder=decoder,
        wrap=wrap,
        mask=mask,
        order=order,
        batch_size=batch_size,
        format=format,
        georeference=_georeference(crs, transform),
        codec=codec,
        quality=quality,
        device=device,
        dtype=dtype,
        decoder_dtype=decoder_dtype,
        execution=execution,
        state=None if no_state else state or out.with_name(f"{out.name}.state"),
        resume=resume,
        preview=preview,
        overwrite=overwrite,
    )
    width, height = done.size_px
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in done.seconds.items())
    click.echo(f"{done.path}: {width} x {height} px at {done.mpp:g} um ({spent})")
    if done.evaluations_saved:
        whole = done.evaluations + done.evaluations_saved
        click.echo(f"the mask saved {done.evaluations_saved} of {whole} network evaluations")


def _georeference(crs: str | None, transform: str | None) -> Georeference | None:
    if crs is None and transform is None:
        return None
    from ssldiff_fast.slides.cog import Georeference

    try:
        numbers = tuple(float(number) for number in (transform or "").split(","))
    except ValueError:
        numbers = ()
    if crs is None or len(numbers) != 6:
        raise ValueError(
            f"--crs {crs} and --transform {transform} belong together, as in --crs EPSG:32633 "
            "--transform 10,0,500000,0,-10,5000000"
        )
    return Georeference(crs, numbers)
