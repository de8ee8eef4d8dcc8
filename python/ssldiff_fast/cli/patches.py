# SPDX-License-Identifier: Apache-2.0
"""`ssldiff synthesize GRID --patches`: one image per embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

# Options of large images that patches have no use for, and the other way round.
_IMAGES_ONLY = (
    "stride",
    "decode_stride",
    "decoder",
    "codec",
    "crs",
    "transform",
    "guidance_interval",
    "reuse",
    "wrap",
    "mask",
    "order",
    "state",
    "no_state",
    "resume",
    "preview",
)
_PATCHES_ONLY = ("seeds",)


def check_options(patches: bool, given: dict[str, Any]) -> None:
    """Raises where an option was given that would not be used."""
    for name in _IMAGES_ONLY if patches else _PATCHES_ONLY:
        if given.get(name) is not None:
            option = f"--{name.replace('_', '-')}"
            where = "large images" if patches else "--patches"
            raise click.UsageError(f"{option} is for {where}; leave it out.")


def synthesize(grid: Path, model: str, out: Path | None, **settings: Any) -> None:
    """Makes the patches and says what was made."""
    import ssldiff_fast as sf

    given = {name: value for name, value in settings.items() if value is not None}
    done = sf.synthesize_patches(model, grid, out or f"{grid.stem}-patches", **given)
    width, height = done.size_px
    rate = f", {done.made / done.seconds:.2f} a second" if done.made and done.seconds else ""
    kept = f"; {done.kept} were there" if done.kept else ""
    size = f"{width} x {height} px at {done.mpp:g} um"
    click.echo(f"{done.folder}: {done.made} patches of {size}{rate}{kept}")
