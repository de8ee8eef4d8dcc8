# SPDX-License-Identifier: Apache-2.0
"""How the operators are built: what is chosen, what is said, and a wheel that works elsewhere."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_build", ROOT / "csrc" / "build_extension.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_without_a_compiler_the_message_names_what_to_install(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"No C\+\+ compiler was found .*apt install g\+\+"):
        build.find_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="looked for CXX=no-such-compiler -m64"):
        build.find_compiler()


def test_the_compiler_of_the_environment_comes_first(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = _program(tmp_path / "mine", "true")
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    assert build.find_compiler() == [str(compiler), "-m64"]


def test_without_torch_the_message_says_so(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs torch >= 2.10 for its headers: install torch"):
        build.find_torch()


NVCC = "echo Cuda compilation tools, release 13.0, V13.0.88"


@pytest.mark.parametrize(
    ("torch_cuda", "note"),
    [
        ("13.2", "CUDA 13.0"),
        ("12.8", "not built: nvcc is of CUDA 13.0, but torch of CUDA 12.8"),
        (None, "not built: this torch is built without CUDA"),
    ],
)
def test_an_unsuitable_toolkit_leaves_a_cpu_build(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    torch_cuda: str | None,
    note: str,
) -> None:
    nvcc = _program(tmp_path / "bin" / "nvcc", NVCC)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("SSLDIFF_CUDA", raising=False)
    path, said = build.find_nvcc(torch_cuda)
    assert said == note
    assert path == (None if note.startswith("not") else str(nvcc))


def test_the_variable_forbids_or_demands_cuda(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("SSLDIFF_CUDA", "0")
    assert build.find_nvcc("13.0") == (None, "not built: SSLDIFF_CUDA=0")
    monkeypatch.setenv("SSLDIFF_CUDA", "1")
    with pytest.raises(SystemExit, match="SSLDIFF_CUDA=1 asks for the CUDA operators, but no nvcc"):
        build.find_nvcc("13.0")


def test_the_architectures_follow_their_variable(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLDIFF_CUDA_ARCHS", "8.6 90")
    flags = build._arch_flags()
    assert "-gencode=arch=compute_86,code=sm_86" in flags
    assert flags[-1] == "-gencode=arch=compute_90,code=compute_90"
    monkeypatch.setenv("SSLDIFF_CUDA_ARCHS", "all")
    with pytest.raises(SystemExit, match="SSLDIFF_CUDA_ARCHS names no compute capability"):
        build._arch_flags()


def _copy_sources(source: Path) -> Path:
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "csrc", "kernels", "python"):
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "data")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    return source


MAKES_EMPTY_FILES = """[ "$1" = --version ] && echo compiler 1.0
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done"""


def test_an_editable_install_needs_no_cuda(tmp_path: Path) -> None:
    source = _copy_sources(tmp_path / "source")
    compiler = _program(tmp_path / "compiler", MAKES_EMPTY_FILES)
    code = "from setuptools import build_meta; print(build_meta.build_editable('.'))"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, "SSLDIFF_CUDA": "0", "SSLDIFF_VIEWER": "0", "CXX": str(compiler)},
        check=True,
        capture_output=True,
    )
    assert [made.name for made in source.rglob("*.so")] == ["libssldiff_cpu.so"]


def test_a_wheel_works_in_another_place(tmp_path: Path) -> None:
    source = _copy_sources(tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    made = tmp_path / "wheels"
    subprocess.run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(made), str(source)],
        env={**os.environ, "SSLDIFF_CUDA": "0", "SSLDIFF_VIEWER": "0", "CXXFLAGS": "-O0"},
        check=True,
    )
    (wheel,) = made.glob("*.whl")
    assert "-py3-none-" in wheel.name
    shutil.rmtree(source)
    place = tmp_path / "place"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(place)
    assert "ssldiff_fast/kernels/scatter_mean.py" in names
    assert "ssldiff_fast/py.typed" in names
    assert "ssldiff_fast/viewer/static/index.html" in names
    assert "ssldiff_fast/viewer/static/main.js" in names
    # Copied with the sources where this checkout has it: then the wheel does, with its licence.
    library = "ssldiff_fast/viewer/static/openseadragon"
    assert (f"{library}.min.js" in names) == (f"{library}.LICENSE.txt" in names)
    assert (f"{library}.min.js" in names) == (ROOT / f"python/{library}.min.js").exists()
    assert not [name for name in names if "csrc" in name or "libssldiff_cuda" in name]
    code = (
        f"import sys; sys.path.insert(0, {str(place)!r}); import torch, ssldiff_fast;"
        "from ssldiff_fast import _C, ops; import ssldiff_fast.kernels;"
        "print(ssldiff_fast.__file__, _C.build_info()['cuda']);"
        "print(ops.vq_nearest(torch.ones(1, 3), torch.eye(3))[1].item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == f"{place}/ssldiff_fast/__init__.py not built: SSLDIFF_CUDA=0"
    assert second == "0"
