# SPDX-License-Identifier: Apache-2.0
"""OpenSeadragon comes from npm when the package is built, and its absence stops nothing else."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from setuptools import Distribution

from slide_files import unwritable_folder
from ssldiff_fast.viewer import library

ROOT = Path(__file__).parents[2]
FILES = {
    "package/build/openseadragon/openseadragon.min.js": b"window.OpenSeadragon = 1;",
    "package/LICENSE.txt": b"Copyright",
    "package/../../outside.js": b"never written",
}


def _archive(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def _npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for npm, alone on PATH."""
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive that npm brings; its checksum is the one expected."""
    archive = _archive(tmp_path / "archive.tgz")
    digest = hashlib.sha512(archive.read_bytes()).digest()
    monkeypatch.setattr(library, "INTEGRITY", "sha512-" + base64.b64encode(digest).decode())
    script = f'[ "$2" = openseadragon@{library.VERSION} ] && cp {archive} openseadragon.tgz'
    _npm(tmp_path / "bin", script, monkeypatch)
    return archive


def test_npm_brings_the_library_and_its_licence(offered: Path, tmp_path: Path) -> None:
    folder = tmp_path / "static"
    assert not library.present(folder)
    assert library.fetch(folder)
    assert (folder / library.SCRIPT).read_bytes() == b"window.OpenSeadragon = 1;"
    assert (folder / library.LICENCE).read_bytes() == b"Copyright"
    assert library.present(folder)
    assert len(list(folder.iterdir())) == 3
    assert not (tmp_path / "outside.js").exists()
    library.check(folder)


def test_what_is_there_is_not_fetched_again(
    offered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "static"
    library.fetch(folder)
    monkeypatch.setenv("PATH", "")
    assert not library.fetch(folder)
    monkeypatch.setattr(library, "VERSION", "99.0.0")
    assert not library.present(folder)


def test_another_archive_is_refused(
    offered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "INTEGRITY", "sha512-AAAA")
    with pytest.raises(library.LibraryError, match="npm fetched another archive"):
        library.fetch(tmp_path / "static")
    assert not (tmp_path / "static").exists()


def test_without_npm_it_is_said_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(library.LibraryError, match=r"npm is not on PATH.*install Node.js with npm"):
        library.fetch(tmp_path / "static")


@pytest.mark.parametrize("script", ["echo 'npm error network' >&2; exit 1", "true"])
def test_an_npm_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    _npm(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(library.LibraryError, match=r"npm could not fetch .*is there a network\?"):
        library.fetch(tmp_path / "static")


def test_an_npm_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _npm(tmp_path / "bin", "exec sleep 60", monkeypatch)
    monkeypatch.setattr(library, "TIMEOUT_S", 0.2)
    with pytest.raises(library.LibraryError, match="no answer within"):
        library.fetch(tmp_path / "static")


def test_a_folder_that_cannot_be_written_is_one_sentence(offered: Path, tmp_path: Path) -> None:
    folder = unwritable_folder(tmp_path / "locked") / "static"
    with pytest.raises(library.LibraryError, match=r"could not be written to .*/static"):
        library.fetch(folder)


def test_the_module_is_a_command_of_its_own(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ssldiff_fast.viewer import library as l;"
        f"f = l.fetch; l.fetch = lambda: f(Path({str(tmp_path / 'static')!r})); sys.exit(l.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ssldiff: npm is not on PATH")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_build_viewer", ROOT / "csrc/build_viewer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The build's command over a package of one file, in a folder without npm."""
    package = tmp_path / "demo_package"
    (package / "static").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SSLDIFF_VIEWER", raising=False)
    real = build.load_library

    def load() -> ModuleType:
        module = real()
        fetch = module.fetch
        module.fetch = lambda: fetch(package / "static")
        return module

    monkeypatch.setattr(build, "load_library", load)
    options = {"script_name": "setup.py", "packages": ["demo_package"]}
    made = build.BuildViewer(
        Distribution({**options, "package_data": {"demo_package": ["static/*"]}})
    )
    made.build_lib = str(tmp_path / "lib")
    made.ensure_finalized()
    return made


def test_the_build_goes_on_without_npm(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run()
    assert (tmp_path / "lib/demo_package/__init__.py").exists()
    assert "without the viewer: npm is not on PATH" in capsys.readouterr().out


def test_the_build_fails_without_npm_where_the_viewer_is_demanded(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLDIFF_VIEWER", "1")
    with pytest.raises(SystemExit, match="ssldiff_fast: npm is not on PATH"):
        command.run()


def test_the_build_can_be_told_not_to_fetch(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSLDIFF_VIEWER", "0")
    command.run()
    assert "without the viewer" not in capsys.readouterr().out


def test_what_is_fetched_during_the_build_travels_with_the_package(
    command: Any,
    offered: Path,
    tmp_path: Path,
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = build.load_library

    def load() -> ModuleType:
        module = real()
        module.INTEGRITY = library.INTEGRITY
        return module

    monkeypatch.setattr(build, "load_library", load)
    assert command.data_files  # asked for before the library is there, as `sdist` does
    command.run()
    names = {file.name for file in (tmp_path / "lib/demo_package/static").iterdir()}
    assert {library.SCRIPT, library.LICENCE} <= names


def test_the_repository_holds_no_copy() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/python/ssldiff_fast/viewer/static/openseadragon.*" in ignored
