# SPDX-License-Identifier: Apache-2.0
"""`ssldiff bench`: what the operators reach on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(name="bench")
@click.argument("operators", nargs=-1)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("roofline.png"),
    show_default=True,
    help="Roofline plot: PNG, SVG or PDF.",
)
@click.option("--no-plot", is_flag=True, help="Draw none; matplotlib is not needed then.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="How often each function runs, unless it is slow.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def command(
    operators: tuple[str, ...],
    device: str,
    plot: Path,
    no_plot: bool,
    rounds: int,
    as_json: bool,
) -> None:
    """Time OPERATORS (all without any) beside baselines and the machine's own limits.

    Each is found right before it is timed. The limit is what the bandwidth of a copy, or the rate
    of a matrix product, allows: the roofline that the plot shows. Some minutes on a processor.
    """
    from ..bench.roofline import check_plot, draw_roofline
    from ..bench.run import run, table

    if not no_plot:
        check_plot(plot)
    report = run(
        operators,
        device,
        rounds=rounds,
        progress=lambda name: click.echo(f"measuring {name} ...", err=True),
    )
    click.echo(json.dumps(report, indent=1) if as_json else table(report))
    if not no_plot:
        draw_roofline(report, plot)
        click.echo(f"{plot}: the roofline plot", err=as_json)
