# SPDX-License-Identifier: Apache-2.0
"""The command `ssldiff`. Each sub-command is a file here, imported when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

import click

from .. import __version__

# Each module holds its click command under the name `command`. The help line stands here so that
# `ssldiff --help` imports none of them.
COMMANDS = {
    "demo": "Make a synthetic slide after a real one, and a picture of both.",
    "encode": "Encode a slide or image to a grid of embeddings.",
    "synthesize": "Synthesize a slide or image from a grid.",
    "view": "Look at a slide in the browser, alone or beside its reference.",
    "train": "Train an autoencoder, an encoder or a diffusion model.",
    "bench": "Time the operators on this machine, with a roofline plot.",
    "doctor": "Show what was built and found; put it into bug reports.",
}
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class _LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = cmd_name.replace("_", "-")
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="ssldiff")
@click.option("--traceback", is_flag=True, help="Show the full Python traceback of an error.")
def _group(traceback: bool) -> None:
    """Large images from diffusion models conditioned on self-supervised embeddings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    What goes wrong is one sentence on stderr and exit status 2, without a traceback unless
    `--traceback` comes first; an interruption exits with 130.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = _group.main(arguments, prog_name="ssldiff", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt) as stop:
        # click raises its own after Ctrl-C; a long run says in the first how to go on.
        click.echo(f"ssldiff: {str(stop.__cause__ or stop) or 'interrupted'}.", err=True)
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code if error.exit_code != 1 else EXIT_ERROR
    except BrokenPipeError:
        # The reader of a pipe has gone (`ssldiff doctor | head`): nobody is left to tell, and the
        # flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if "--traceback" in arguments:
            raise
        click.echo(f"ssldiff: {sentence(error)}", err=True)
        return EXIT_ERROR


def sentence(error: Exception) -> str:
    """What a user is told of an exception."""
    if isinstance(error, OSError) and error.errno is not None:
        return _os_sentence(error)
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the Python package {error.name!r} is missing; install it, or the extra of "
            f"ssldiff_fast that needs it (`ssldiff doctor` lists them)."
        )
    return str(error) or f"{type(error).__name__}, without a message; see --traceback."


def _os_sentence(error: OSError) -> str:
    place = error.filename2 or error.filename
    what = f"{os.fsdecode(place)}" if isinstance(place, str | bytes) else "a file"
    if error.errno == errno.ENOENT:
        return f"{what} does not exist; check the path."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{what} may not be read or written; check its permissions."
    if error.errno == errno.EROFS:
        return f"{what} lies on a read-only file system; choose another folder."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left for {what}; free some and run the same command again."
    if error.errno == errno.EISDIR:
        return f"{what} is a folder, but a file was expected."
    if error.errno == errno.ENOTDIR:
        return f"{what} has a file where a folder was expected; check the path."
    return f"{what}: {error.strerror}."


def run() -> None:
    """Entry point of the `ssldiff` script."""
    sys.exit(main())
