# SPDX-License-Identifier: Apache-2.0
"""`ssldiff view` as a user starts and ends it."""

from __future__ import annotations

import builtins
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from slide_files import tissue_image, write_slide
from ssldiff_fast import cli, settings
from ssldiff_fast.viewer import library
from ssldiff_fast.viewer.server import listen


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_slide(tmp_path / "slide.tif", tissue_image())


@pytest.fixture
def with_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if OpenSeadragon were there: nothing before the page needs it."""
    monkeypatch.setattr(library, "check", lambda: None)


_RUN = (
    "import sys; from ssldiff_fast import cli; from ssldiff_fast.viewer import library;"
    "library.check = lambda: None; sys.exit(cli.main(sys.argv[1:]))"
)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_serves_and_ends_cleanly(slide: Path, stop: signal.Signals) -> None:
    viewer = subprocess.Popen(
        [sys.executable, "-c", _RUN, "view", str(slide), "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert viewer.stdout is not None
        first = viewer.stdout.readline()
        assert first.startswith("slide.tif: http://127.0.0.1:")
        address = first.split()[1]
        assert b"<!DOCTYPE html>" in urllib.request.urlopen(address, timeout=20).read()
        assert urllib.request.urlopen(f"{address}scene.json", timeout=20).status == 200
        viewer.stdout.readline()
        assert viewer.stdout.readline() == "Ctrl-C ends the viewer.\n"
        viewer.send_signal(stop)
        out, err = viewer.communicate(timeout=20)
    finally:
        viewer.kill()
    assert err == ""
    if stop is signal.SIGINT:
        assert viewer.returncode == 0
        assert out.strip() == "the viewer has ended."


def test_two_viewers_run_side_by_side(slide: Path) -> None:
    with listen() as first, listen() as second:
        assert first.getsockname()[1] != second.getsockname()[1]


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["view", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.usefixtures("with_library")
def test_what_cannot_be_shown_is_one_sentence(
    slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no file" in _error(capsys, tmp_path / "absent.tif")
    assert "is a folder" in _error(capsys, tmp_path)
    assert "there is no file" in _error(capsys, slide, tmp_path / "absent.svs")
    assert "--region is of REFERENCE" in _error(capsys, slide, "--region", "0,0,10,10")
    assert "absent.h5" in _error(capsys, slide, "--grid", tmp_path / "absent.h5")
    assert "neither is given" in _error(capsys, slide, "--model", "he-demo")
    assert "there is no mask file" in _error(capsys, slide, "--mask", tmp_path / "absent.png")
    assert "expected 1 to 65535" in _error(capsys, slide, "--port", 70000)


@pytest.mark.usefixtures("with_library")
def test_a_port_in_use_is_one_sentence(slide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} is in use" in _error(capsys, slide, "--port", port)


@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_names_the_extra(
    slide: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    line = _error(capsys, slide)
    assert f"needs the Python package {package}" in line
    assert "pip install 'ssldiff_fast[view]'" in line


def test_a_build_without_npm_says_what_to_do(
    slide: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    present = library.present
    monkeypatch.setattr(library, "present", lambda folder: present(tmp_path))
    line = _error(capsys, slide)
    assert "OpenSeadragon" in line
    assert "install Node.js with npm and run `python -m ssldiff_fast.viewer.library`" in line


@pytest.mark.parametrize("name", ["DISPLAY", "WAYLAND_DISPLAY"])
def test_a_browser_is_opened_only_where_it_is_seen(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not settings.has_display()
    monkeypatch.setenv(name, ":0")
    assert settings.has_display()
    monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert settings.has_display()
