# SPDX-License-Identifier: Apache-2.0
"""The shared checks: each raises one sentence that names the argument."""

from __future__ import annotations

import pytest
import torch

from ssldiff_fast import _checks


def test_letters_of_a_pattern_are_bound_and_must_agree() -> None:
    sizes = _checks.check_shape("x", torch.zeros(2, 3, 4), "N 3 _", call="f")
    assert sizes == {"N": 2}
    assert _checks.check_shape("y", torch.zeros(2, 2), "N N", sizes, call="f") == {"N": 2}
    with pytest.raises(
        ValueError, match=r"^f: y has shape \[5\], but \[N\] with N = 2 was expected\.$"
    ):
        _checks.check_shape("y", torch.zeros(5), "N", sizes, call="f")


@pytest.mark.parametrize("shape", [(2,), (2, 4), (2, 3, 4)])
def test_a_wrong_rank_or_size_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"but \[N, 3\] was expected"):
        _checks.check_shape("x", torch.zeros(shape), "N 3", call="f")


def test_no_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"^f: x must be a torch.Tensor, but a list was given\.$"):
        _checks.check_shape("x", [1], "N", call="f")  # type: ignore[arg-type]


def test_a_wrong_dtype_says_how_to_convert() -> None:
    with pytest.raises(TypeError, match=r"x is int64, but float32 or float64 .*to\(torch.float32"):
        _checks.check_dtype("x", torch.zeros(1).long(), [torch.float32, torch.float64], call="f")


def test_two_devices_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^f: b is on meta, but a is on cpu; move both"):
        _checks.check_same_device("f", a=torch.zeros(1), b=torch.zeros(1, device="meta"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_counted(bad: float) -> None:
    with pytest.raises(ValueError, match="x holds 1 values that are NaN or infinite"):
        _checks.check_finite("x", torch.tensor([0.0, bad]), call="f")
    _checks.check_finite("x", torch.zeros(2), call="f")


@pytest.mark.parametrize("bad", [0, -1, float("nan")])
def test_a_size_must_be_above_zero(bad: float) -> None:
    with pytest.raises(ValueError, match=r"x is .*, but it must be above zero"):
        _checks.check_positive("x", bad, call="f")


def test_a_number_is_finite() -> None:
    assert _checks.check_number("x", 2, call="f") == 2.0
    with pytest.raises(TypeError, match="x is '3', but it must be a number"):
        _checks.check_number("x", "3", call="f")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x is inf, but it must be a finite number"):
        _checks.check_number("x", float("inf"), call="f")


def test_an_unknown_choice_lists_the_known() -> None:
    with pytest.raises(ValueError, match="x is 'c', but it must be one of a, b"):
        _checks.check_choice("x", "c", ["b", "a"], call="f")


@pytest.mark.parametrize("bad", [2.0, "3", True, None])
def test_a_count_is_a_whole_number(bad: object) -> None:
    with pytest.raises(TypeError, match=r"x is .*, but it must be a whole number"):
        _checks.check_count("x", bad, call="f")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x is 0, but it must be above zero"):
        _checks.check_count("x", 0, call="f")


def test_all_finite_finds_what_is_not_and_forgives_a_sum_that_overflows() -> None:
    assert _checks.all_finite(torch.zeros(0))
    assert _checks.all_finite(torch.full((4,), 3e38))
    assert _checks.all_finite(torch.full((4,), 60_000.0, dtype=torch.float16))
    for bad in ([0.0, float("nan")], [float("inf"), float("-inf"), 1.0], [float("-inf")]):
        assert not _checks.all_finite(torch.tensor(bad))
