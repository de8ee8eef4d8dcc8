# SPDX-License-Identifier: Apache-2.0
"""`ssldiff bench` as a user meets it: the table, the plot, and what bad input is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from ssldiff_fast import bench, cli, ops
from ssldiff_fast.bench import interpolate_grid, philox_normal, roofline, run, timing, vq_nearest
from ssldiff_fast.bench import token_attention as token_bench

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs so small that a run takes no time; the figures mean nothing then."""
    monkeypatch.setitem(timing._MATRIX, "cpu", 64)
    monkeypatch.setitem(philox_normal.SIZES, "cpu", 64)
    monkeypatch.setitem(interpolate_grid.POINTS, "cpu", 80)
    monkeypatch.setitem(token_bench.SHAPES, "cpu", (2, 8, 64))
    monkeypatch.setitem(bench.OPERATORS, "vq_nearest", lambda d: [vq_nearest.case(d, 300, 40)])


SOME = ["interpolate_grid", "philox_normal", "vq_nearest"]


@pytest.mark.usefixtures("small")
def test_it_prints_a_table_and_draws_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra bench is not installed")
    plot = tmp_path / "roofline.png"
    assert cli.main(["bench", *SOME, "--rounds", "2", "--plot", str(plot)]) == 0
    shown = capsys.readouterr()
    head, *rows = shown.out.splitlines()
    assert re.split("  +", head) == ["operator", *run.COLUMNS[1:]]
    for row, name in zip(rows, ["interpolate_grid bilinear", "interpolate_grid slerp", *SOME[1:]]):
        assert re.match(rf"{name} +[\d.]+ ", row)
    assert "limits: a copy reads and writes" in shown.out
    assert "measuring vq_nearest ..." in shown.err
    with Image.open(plot) as image:
        assert min(image.size) > 600


@pytest.mark.usefixtures("small")
def test_its_json_holds_the_machine_and_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *SOME, "--rounds", "1", "--json", "--no-plot"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["torch"] == torch.__version__
    assert [case["operator"] for case in report["cases"]] == [SOME[0], *SOME]
    for case in report["cases"]:
        own = case["operator"]
        assert case["gigabytes_per_second"][own] > 0
        assert case["gigaflops"][own] > 0
        assert case["share_of_limit"][own] > 0
        assert case["ratio"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such"], "bench: the operator is 'no_such', but it must be one of "),
        (["--plot", "roofline.gif"], "must end in .png, .svg or .pdf"),
        (["--plot", "no/such/folder/a.png"], "does not exist; check the path"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_the_device_cuda_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--device", "cuda", "--no-plot"]) == 2
    assert "sees no CUDA device; choose the device cpu" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(roofline, "find_spec", lambda name: None)
    assert cli.main(["bench", "--plot", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'ssldiff_fast[bench]'" in error
    assert "measuring" not in error


@pytest.mark.usefixtures("small")
def test_attention_to_one_and_two_tokens_is_measured_beside_its_parts() -> None:
    cases = token_bench.cases("cpu")
    assert [case.label for case in cases[::2]] == ["1 x 1 x 64 float32", "2 x 1 x 64 float32"]
    for case in cases:
        figures = bench.measure(case, 1.0, rounds=1)
        assert ("sum and LayerNorm" in figures["ratio"]) == case.label.startswith("1 x")
        assert figures["ratio"][token_bench.UNFUSED] > 0
    cases[0].functions["token_attention"] = cases[1].functions["token_attention"]
    with pytest.raises(AssertionError, match="token_attention differs from plain attention"):
        cases[0].check()


def test_what_is_wrong_is_not_timed() -> None:
    case = philox_normal.case("cpu", 64)
    case.functions["philox_normal"] = case.functions["randn"]
    with pytest.raises(AssertionError):
        bench.measure(case, 1.0, rounds=1)


def test_memory_beside_the_inputs_is_measured() -> None:
    found = timing.peak_megabytes({"wide": lambda: torch.ones(25_000_000)}, "cpu")
    if found:  # not told by this system otherwise
        assert 95 < found["wide"] < 130


def test_every_operator_has_a_script_that_times_it() -> None:
    names = {name.removesuffix("_reference") for name in ops.__all__ if "_reference" in name}
    assert set(bench.OPERATORS) <= names
    assert {p.stem for p in (ROOT / "benchmarks").glob("*.py")} >= names - {"philox4x32"}
