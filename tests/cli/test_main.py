# SPDX-License-Identifier: Apache-2.0
"""The command line's manners: help, exit statuses and messages."""

from __future__ import annotations

import errno
import subprocess
import sys
from typing import Any

import click
import pytest

from ssldiff_fast import __version__, cli


def _fails_with(error: BaseException) -> click.Command:
    @click.command()
    @click.option("--some-number", type=int)
    def command(some_number: int | None) -> None:
        raise error

    return command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `ssldiff doctor` with another command in doctor's place."""

    def call(command: click.Command, *arguments: str) -> int:
        from ssldiff_fast.cli import doctor

        monkeypatch.setattr(doctor, "command", command)
        return cli.main(["doctor", *arguments])

    return call


def test_help_lists_every_command_without_importing_torch() -> None:
    code = (
        "import sys; from ssldiff_fast.cli import main; main(['-h']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in cli.COMMANDS)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_answers_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert f"ssldiff {name}" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nonsense"], ["doctor", "--nonsense"], ["encode"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "Error: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--some-number", "--some_number"])
def test_options_accept_hyphens_and_underscores(run: Any, option: str) -> None:
    @click.command()
    @click.option("--some-number", type=int)
    @click.pass_context
    def command(context: click.Context, some_number: int) -> None:
        context.exit(some_number)

    assert run(command, option, "7") == 7


MESSAGES = {
    "ours": (ValueError("grid holds NaN; encode it again."), "grid holds NaN; encode it again."),
    "type": (TypeError("x must be a tensor."), "x must be a tensor."),
    "runtime": (RuntimeError("operators are missing."), "operators are missing."),
    "silent": (RuntimeError(), "RuntimeError, without a message; see --traceback."),
    "our file": (FileNotFoundError("there is no slide a.svs."), "there is no slide a.svs."),
    "no file": (FileNotFoundError(errno.ENOENT, "No such", "a.svs"), "a.svs does not exist"),
    "permission": (PermissionError(errno.EACCES, "denied", "a"), "a may not be read or written"),
    "read-only": (OSError(errno.EROFS, "Read-only", "a"), "a lies on a read-only file system"),
    "full": (OSError(errno.ENOSPC, "No space", "a"), "no space is left for a; free some"),
    "full, unnamed": (OSError(errno.ENOSPC, "No space"), "no space is left for a file"),
    "folder": (IsADirectoryError(errno.EISDIR, "Is", "a"), "a is a folder, but a file"),
    "file": (NotADirectoryError(errno.ENOTDIR, "Not", "a"), "a has a file where a folder was"),
    "memory": (MemoryError("unable to allocate 8 TiB"), "unable to allocate 8 TiB"),
    "other": (OSError(errno.EIO, "Input/output error", "a"), "a: Input/output error."),
    "package": (
        ModuleNotFoundError("No module", name="lightning"),
        "the Python package 'lightning' is missing",
    ),
}


@pytest.mark.parametrize(("error", "message"), MESSAGES.values(), ids=MESSAGES.keys())
def test_an_error_is_one_sentence_and_exit_status_2(
    run: Any, error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(_fails_with(error)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"ssldiff: {message}")


def test_the_traceback_is_there_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssldiff_fast.cli import doctor

    monkeypatch.setattr(doctor, "command", _fails_with(ValueError("wrong")))
    with pytest.raises(ValueError, match="wrong"):
        cli.main(["--traceback", "doctor"])


def test_an_interruption_exits_with_130(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(_fails_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.strip() == "ssldiff: interrupted."


def test_a_closed_pipe_is_no_error_message() -> None:
    done = subprocess.run(
        f"{sys.executable} -m ssldiff_fast doctor | true",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
