# SPDX-License-Identifier: Apache-2.0
"""`ssldiff view`: a slide in the browser, alone or beside its reference."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import settings
from ..viewer import library
from .encode import Region

if TYPE_CHECKING:
    from ..viewer.scene import Scene

_FILE = click.Path(path_type=Path)


@click.command(name="view")
@click.argument("out", type=_FILE)
@click.argument("reference", type=_FILE, required=False)
@click.option("--grid", type=_FILE, help="Grid that OUT was made from: shows its valid cells.")
@click.option(
    "--model",
    help="Bundled model, or a path: compares OUT with the grid or REFERENCE by its encoder.",
)
@click.option(
    "--similarity",
    type=_FILE,
    help="JSON of the similarities: read where it is there, otherwise measured and kept in it.",
)
@click.option("--region", type=Region(), help="Part of REFERENCE that OUT was made after.")
@click.option("--mask", type=_FILE, help="GeoJSON or image in place of the tissue found.")
@click.option("--mpp", type=float, help="Micrometres per pixel of an OUT that does not say it.")
@click.option("--reference-mpp", type=float, help="The same of REFERENCE.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--port", type=int, help="Port to listen on [default: 8400, or a free one].")
@click.option("--no-browser", is_flag=True, help="Print the address and open no browser.")
def command(
    out: Path,
    reference: Path | None,
    grid: Path | None,
    model: str | None,
    similarity: Path | None,
    region: tuple[int, int, int, int] | None,
    mask: Path | None,
    mpp: float | None,
    reference_mpp: float | None,
    device: str,
    port: int | None,
    no_browser: bool,
) -> None:
    """Look at OUT in the browser, alone or side by side with REFERENCE.

    Both are slides or images. The page is served on this machine only, until Ctrl-C.

    \b
      ssldiff view out.tif
      ssldiff view out.tif slide.svs --model he-demo     # and how similar, cell by cell

    Needs: pip install 'ssldiff_fast[view]'
    """
    _check_installed()
    from ..viewer.open import open_scene
    from ..viewer.server import listen

    with listen(port) as listener:  # a port in use is said before anything is measured
        scene = open_scene(
            out,
            reference,
            grid=grid,
            model=model,
            similarity=similarity,
            region=region,
            mask=mask,
            mpp=mpp,
            reference_mpp=reference_mpp,
            device=device,
        )
        for cells in scene.cells:
            if cells.name == "similarity":
                summary = cells.facts["summary"]
                said = f"mean cosine {summary['mean']:.3f} over {summary['cells']} cells"
                click.echo(f"similarity: {said}")
        _serve(scene, listener, no_browser)


def _check_installed() -> None:
    """What a viewer needs beyond the rest, before anything is opened."""
    for package in ("starlette", "uvicorn"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise RuntimeError(
                f"the viewer needs the Python package {package}, which is not installed: "
                "pip install 'ssldiff_fast[view]'"
            ) from None
    library.check()


def _serve(scene: Scene, listener: socket.socket, no_browser: bool) -> None:
    from ..viewer.app import make_app
    from ..viewer.server import Server

    token = secrets.token_urlsafe(9)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/"

    def announce() -> None:
        names = " beside ".join(image.name for image in scene.images)
        click.echo(f"{names}: {address}")
        if no_browser or not settings.has_display():
            port = listener.getsockname()[1]
            click.echo(f"from another machine, first: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE")
        else:
            webbrowser.open(address)
        click.echo("Ctrl-C ends the viewer.")

    app = make_app(scene, token=token)
    try:
        Server(app, listener, started=announce).run()
    finally:
        app.state.answers.close()
        scene.close()  # when no thread reads any more
    click.echo("\nthe viewer has ended.")
