# SPDX-License-Identifier: Apache-2.0
"""`ssldiff synthesize`: a grid to a synthetic slide or image."""

from __future__ import annotations

from pathlib import Path

import click

from ..canvas.presets import PRESETS
from .patches import check_options
from .patches import synthesize as synthesize_patches


@click.command(name="synthesize")
@click.argument("grid", type=click.Path(path_type=Path))
@click.option("--model", default="he-demo", show_default=True, help="Bundled model, or a path.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="The image to write, .tif or .png, or the folder of patches [default: GRID's name].",
)
@click.option("--patches", is_flag=True, help="One image per embedding instead of a large one.")
@click.option("--seeds", type=click.IntRange(1), help="Images per embedding [default: 1].")
@click.option("--format", help="Of patches: png, jpeg or shards [default: png].")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--preset", default="fast", show_default=True, help=f"One of {', '.join(PRESETS)}.")
@click.option("--steps", type=int, help="Steps, in place of the preset's.")
@click.option("--guidance-scale", type=float, help="1 is no guidance.")
@click.option("--eta", type=float, help="Share of fresh noise in each step of DDIM.")
@click.option("--stride", type=int, help="Stride of the windows in latents.")
@click.option("--decode-stride", type=int, help="Stride of the decoder's tiles in latents.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--codec", help="Of a TIFF: jpeg or deflate, which is lossless [default: jpeg].")
@click.option("--quality", type=click.IntRange(1, 100), help="Of JPEG [default: 90].")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
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
    eta: float | None,
    stride: int | None,
    decode_stride: int | None,
    batch_size: int,
    codec: str | None,
    quality: int | None,
    device: str,
    dtype: str,
    overwrite: bool,
) -> None:
    """Synthesize the image that GRID (made by `ssldiff encode`) describes."""
    given = {"stride": stride, "decode_stride": decode_stride, "codec": codec}
    check_options(patches, {**given, "seeds": seeds, "format": format})
    if patches:
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
            overwrite=overwrite,
        )
    import ssldiff_fast as sf

    done = sf.synthesize(
        model,
        grid,
        out or f"{grid.stem}.tif",
        seed=seed,
        preset=preset,
        steps=steps,
        guidance_scale=guidance_scale,
        eta=eta,
        stride=stride,
        decode_stride=decode_stride,
        batch_size=batch_size,
        codec=codec,
        quality=quality,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
    )
    width, height = done.size_px
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in done.seconds.items())
    click.echo(f"{done.path}: {width} x {height} px at {done.mpp:g} um ({spent})")
