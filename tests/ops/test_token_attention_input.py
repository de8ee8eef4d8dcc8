# SPDX-License-Identifier: Apache-2.0
"""What token_attention says to bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from operator_cases import token_case
from ssldiff_fast.ops import token_attention, token_attention_reference

ONE = token_case((2, 3, 4, 1, 1))
TWO = token_case((2, 3, 4, 2, 2))
BAD = {
    "no tensor": (ONE, {"x": [1.0]}, TypeError, "x must be a torch.Tensor, but a list"),
    "rank": (ONE, {"x": torch.zeros(3, 4)}, ValueError, r"x has shape \[3, 4\], but \[N, L, C\]"),
    "dtype": (ONE, {"x": ONE["x"].long()}, TypeError, "x is int64, but float32 or bfloat16 or"),
    "no width": (ONE, {"x": torch.zeros(2, 3, 0)}, ValueError, "but a width above 0 was expected"),
    "width": (
        ONE,
        {"values": torch.zeros(2, 5)},
        ValueError,
        r"values has shape \[2, 5\], but \[N, C\] with N = 2, C = 4 was expected",
    ),
    "windows": (ONE, {"values": torch.zeros(3, 4)}, ValueError, r"values has shape \[3, 4\], but"),
    "norm": (ONE, {"norm_bias": torch.zeros(5)}, ValueError, r"norm_bias has shape \[5\], but"),
    "half beside float": (
        ONE,
        {"values": ONE["values"].half()},
        TypeError,
        "values is float16, but float32 was expected",
    ),
    "two norms": (
        {**ONE, "x": ONE["x"].half()},
        {"norm_bias": ONE["norm_bias"].half()},
        TypeError,
        "norm_bias is float16, but float32 was expected",
    ),
    "device": (ONE, {"values": ONE["values"].to("meta")}, ValueError, "values is on meta, but x"),
    "eps": (ONE, {"eps": 0.0}, ValueError, "eps is 0.0, but it must be above zero"),
    "eps is no number": (ONE, {"eps": "tiny"}, TypeError, "eps is 'tiny', but it must be a number"),
    "heads": (TWO, {"heads": 0}, ValueError, "heads is 0, but it must be above zero"),
    "heads without keys": (ONE, {"heads": 2}, ValueError, "heads or offsets are given without"),
    "offsets without keys": (
        ONE,
        {"offsets": torch.zeros(2, 1)},
        ValueError,
        "heads or offsets are given without keys",
    ),
    "other heads": (TWO, {"heads": 3}, ValueError, "keys has 4 vectors for 3 heads, but 2 to 8"),
    "one token": (TWO, {"heads": 4}, ValueError, "keys has 4 vectors for 4 heads, but 2 to 8"),
    "too many tokens": (
        token_case((2, 3, 4, 1, 9)),
        {},
        ValueError,
        "keys has 9 vectors for 1 heads, but 2 to 8 tokens for each head were expected; .* for "
        "more use scaled_dot_product_attention",
    ),
    "values of another number": (
        TWO,
        {"values": torch.zeros(2, 3, 4)},
        ValueError,
        r"values has shape \[2, 3, 4\], but \[N, S, C\] with N = 2, C = 4, S = 4 was expected",
    ),
    "offsets": (TWO, {"offsets": torch.zeros(2, 3)}, ValueError, r"offsets has shape \[2, 3\]"),
    "keys of one token": (TWO, {"keys": torch.zeros(2, 4)}, ValueError, r"keys has shape \[2, 4\]"),
}


@pytest.mark.parametrize(("good", "change", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("function", [token_attention, token_attention_reference])
def test_bad_input_is_one_clear_sentence(
    function: Any,
    good: dict[str, Any],
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        function(**{**good, **change})
    assert str(caught.value).startswith("token_attention: ")
    assert "\n" not in str(caught.value)


RAW_BAD = {
    "dtype": (TWO, {"x": TWO["x"].long()}, "x must be float32, bfloat16, float16 or float64"),
    "rank": (TWO, {"x": TWO["x"][0]}, r"x must be \[N, L, C\]"),
    "eps": (TWO, {"eps": -1.0}, "eps above zero"),
    "values": (TWO, {"values": TWO["values"][:, :3]}, "keys and values must both be"),
    "keys": (TWO, {"keys": TWO["keys"].half()}, "keys and values must both be"),
    "heads": (TWO, {"heads": 3}, "4 vectors, which do not divide into 3 heads"),
    "offsets": (TWO, {"offsets": None}, r"offsets must be \[N, S\]"),
    "one token": (ONE, {"values": TWO["values"]}, r"without keys, values must be \[N, C\]"),
    "one token, two heads": (ONE, {"heads": 2}, "with one head and no offsets"),
    "norm": (ONE, {"norm_bias": torch.zeros(5)}, "norm_weight and norm_bias must both be"),
    "norms": (ONE, {"norm_bias": torch.zeros(4).half()}, "norm_weight and norm_bias must both"),
}


@pytest.mark.parametrize(("good", "change", "message"), RAW_BAD.values(), ids=RAW_BAD.keys())
def test_the_raw_operator_checks_for_itself(
    good: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    a = {"keys": None, "offsets": None, "eps": 1e-5, **good, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssldiff.token_attention(
            a["x"],
            a["values"],
            a["norm_weight"],
            a["norm_bias"],
            a["keys"],
            a["offsets"],
            a["heads"],
            a["eps"],
        )
