# SPDX-License-Identifier: Apache-2.0
"""`ssldiff doctor` tells what is there, and never fails itself."""

from __future__ import annotations

import json

import pytest

from ssldiff_fast import _C, __version__, cli
from ssldiff_fast.cli import doctor


def test_it_shows_versions_and_the_path_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for fact in (__version__, _C.build_info()["cpu_path"], "OpenSlide", "Triton", "bundled models"):
        assert fact in shown
    assert "FAILED" not in shown


def test_its_json_has_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(doctor.SECTIONS)


def test_missing_operators_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_C, "CPU_PROBLEM", "libssldiff_cpu.so is not there")
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "NOT USABLE: libssldiff_cpu.so is not there; build them anew with" in shown


def test_what_is_broken_becomes_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise OSError("libcuda.so.1 is too old")

    assert doctor._facts(broken) == {"FAILED": "OSError: libcuda.so.1 is too old"}


def test_an_old_openslide_is_called_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    import openslide

    monkeypatch.setattr(openslide, "__library_version__", "3.4.1")
    assert "3.4.1 TOO OLD: it gives no mpp" in doctor.slide_facts()["OpenSlide"]


def test_optional_parts_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"train": ("no-such-package",)})
    assert doctor.optional_facts() == {
        "train": "without no-such-package; pip install 'ssldiff_fast[train]'"
    }
