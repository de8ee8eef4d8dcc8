# SPDX-License-Identifier: Apache-2.0
"""The package's front: what it exports, how lightly it imports, and where it keeps things."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssldiff_fast as sf
from ssldiff_fast import _C, ops, settings


@pytest.mark.parametrize("name", sf.__all__)
def test_every_exported_name_exists(name: str) -> None:
    value = getattr(sf, name)
    assert not isinstance(value, type(sys)), f"{name} is a module where a function is promised"
    assert name in dir(sf)


def test_the_rooms_are_there_without_an_import_of_their_own() -> None:
    code = (
        "import ssldiff_fast as sf; print(sf.ops.scatter_mean.__name__, sf.canvas.sample.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["scatter_mean", "sample"]


def test_completion_offers_what_is_public_and_nothing_else() -> None:
    assert set(sf.__all__) <= set(dir(sf))
    assert not {"Any", "annotations", "importlib"} & set(dir(sf))
    for name in dir(sf):
        getattr(sf, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ssldiff_fast' has no attribute 'nothing'"):
        sf.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import ssldiff_fast, ssldiff_fast.cli, sys;"
        "heavy = {'torch', 'timm', 'openslide', 'skimage', 'h5py', 'lightning', 'diffusers'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_triton_kernels_are_a_subpackage() -> None:
    import ssldiff_fast.kernels

    assert ssldiff_fast.kernels.__doc__


def test_missing_operators_say_how_to_build_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(_C, "CPU_PROBLEM", "libssldiff_cpu.so is not in there")
    with pytest.raises(RuntimeError, match=r"vq_nearest: the compiled .* cannot be used .*pip"):
        ops.vq_nearest(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="scatter_mean: the compiled operators cannot be used"):
        ops.scatter_mean(torch.zeros(1, 1, 1, 1), ops.WindowPlan.regular(1, 1, (1, 1), 1))


def test_the_table_of_operators_is_that_of_the_library() -> None:
    source = (Path(__file__).parents[1] / "csrc" / "library.cpp").read_text()
    schemas = re.findall(r'm\.def\(\s*"(\w+)\((.*?)\) ?"?\s*"?->', source, re.DOTALL)
    assert {name: text.count(",") + 1 for name, text in schemas} == _C.OPERATORS


def _with_libraries(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A program that finds the compiled operators in a folder."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SSLDIFF_LIBRARIES": str(folder)},
        capture_output=True,
        text=True,
    )


def test_operators_older_than_the_python_code_are_one_sentence(tmp_path: Path) -> None:
    path = _C.library_path("cpu")
    older = path.read_bytes().replace(b"winograd(Tensor maps", b"winogra_(Tensor maps")
    (tmp_path / path.name).write_bytes(older)
    code = "import ssldiff_fast as sf; sf.ops.philox_normal(0, 1, (0, 1), 1)"
    done = _with_libraries(tmp_path, code)
    said = done.stderr.splitlines()[-1]
    assert "philox_normal: the compiled operators cannot be used" in said
    assert f"{path.name} is older than the Python code: it has no operator winograd" in said
    assert "make build" in said


@pytest.mark.skipif(_C.CUDA_PROBLEM is not None, reason="there are no CUDA operators")
def test_cuda_operators_of_other_sources_are_not_loaded(tmp_path: Path) -> None:
    sources = _C.build_info()["sources"].encode()
    for device in ("cpu", "cuda"):
        path = _C.library_path(device)
        built = path.read_bytes()
        if device == "cuda":
            assert built.count(sources) == 1
            built = built.replace(sources, sources[::-1])
        (tmp_path / path.name).write_bytes(built)
    code = (
        "from ssldiff_fast import _C, ops; print(_C.CUDA_PROBLEM);"
        "ops.philox_normal(0, 1, (0, 1), 1)"
    )
    done = _with_libraries(tmp_path, code)
    assert done.returncode == 0
    cpu, cuda = (_C.library_path(device).name for device in ("cpu", "cuda"))
    assert done.stdout == f"{tmp_path / cuda} was built from other sources than {cpu}\n"


def test_an_operator_with_other_arguments_is_of_another_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_C.OPERATORS, "geglu", 2)
    said = str(_C._load("cpu"))
    assert "is of another version than the Python code: its geglu takes another number" in said


def test_an_unknown_cpu_path_is_an_error() -> None:
    with pytest.raises(ValueError, match="'avx1024' is unknown or cannot run on this processor"):
        _C.set_cpu_path("avx1024")


def test_the_cache_follows_its_variable_at_call_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSLDIFF_CACHE", str(tmp_path))
    assert settings.cache_dir() == tmp_path
    monkeypatch.delenv("SSLDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.cache_dir() == tmp_path / "ssldiff_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert settings.cache_dir() == Path.home() / ".cache" / "ssldiff_fast"


def test_another_build_of_the_operators_is_named_by_a_variable(tmp_path: Path) -> None:
    done = _with_libraries(tmp_path, "from ssldiff_fast import _C; print(_C.CPU_PROBLEM)")
    assert done.returncode == 0
    assert done.stdout.strip() == f"libssldiff_cpu.so is not in {tmp_path}"
