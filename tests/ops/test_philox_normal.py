# SPDX-License-Identifier: Apache-2.0
"""philox_normal and philox4x32: published words, the normals' law, and what bad input is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from operator_cases import KNOWN_WORDS, assert_close
from ssldiff_fast import _C
from ssldiff_fast.ops import (
    philox4x32,
    philox4x32_reference,
    philox_normal,
    philox_normal_reference,
)

SEEDS = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
SHAPES = {  # channels, rows, width
    "one": (1, (0, 1), 1),
    "odd": (3, (7, 20), 23),
    "a-block": (2, (0, 2), 256),
    "past-a-block": (1, (2**32 - 3, 2**32), 257),
    "wide": (1, (0, 1), 70_001),
    "no-rows": (3, (5, 5), 4),
}
ALL = [pytest.param(shape, id=name) for name, shape in SHAPES.items()]


@pytest.mark.parametrize("function", [philox4x32, philox4x32_reference])
@pytest.mark.parametrize(("counter", "seed", "words"), KNOWN_WORDS)
def test_the_words_are_the_published_ones(
    function: Any, counter: list[int], seed: int, words: list[int]
) -> None:
    assert function(torch.tensor([counter]), seed).tolist() == [words]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_words_are_those_of_the_reference_to_the_bit(seed: int) -> None:
    counters = torch.randint(-(2**63), 2**63 - 1, (5000, 4))
    assert torch.equal(philox4x32(counters, seed), philox4x32_reference(counters, seed))
    strided = counters.t().contiguous().t()
    assert torch.equal(philox4x32(strided, seed), philox4x32_reference(counters, seed))
    assert philox4x32(counters[:0], seed).shape == (0, 4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", ALL)
def test_the_normals_agree_with_the_reference(
    shape: tuple[int, tuple[int, int], int], seed: int
) -> None:
    out = philox_normal(seed, *shape, step=3)
    assert out.dtype == torch.float32
    assert_close(out, philox_normal_reference(seed, *shape, step=3))


def test_the_normals_are_within_a_few_units_in_the_last_place() -> None:
    expected = philox_normal_reference(5, 1, (0, 512), 512)
    units = (philox_normal(5, 1, (0, 512), 512) - expected).abs() / expected.abs()
    assert float(units.max()) < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(path: str) -> None:
    _C.set_cpu_path("portable")
    try:
        expected = [philox_normal(2, *shape) for shape in SHAPES.values()]
        try:
            _C.set_cpu_path(path)
        except ValueError:
            pytest.skip(f"this processor cannot run {path}")
        for shape, wanted in zip(SHAPES.values(), expected):
            assert torch.equal(philox_normal(2, *shape), wanted)
    finally:
        _C.set_cpu_path("best")


def test_every_thread_count_gives_the_same_bits() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(philox_normal(9, 3, (0, 65), 300))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_pixel_has_the_same_noise_in_every_canvas() -> None:
    whole = philox_normal(7, 3, (0, 40), 533, step=4)
    assert torch.equal(philox_normal(7, 2, (11, 29), 421, step=4), whole[:2, 11:29, :421])


def test_rows_far_down_a_huge_canvas_are_drawn_by_themselves() -> None:
    y = 2**31 + 5
    alone = philox_normal(7, 1, (y, y + 3), 4)
    assert torch.equal(alone, philox_normal(7, 1, (y - 9, y + 3), 4)[:, 9:])


def test_seed_step_channel_and_row_each_change_the_noise() -> None:
    draws = [
        philox_normal(0, 2, (0, 8), 8)[0],
        philox_normal(0, 2, (0, 8), 8)[1],
        philox_normal(1, 1, (0, 8), 8)[0],
        philox_normal(2**32, 1, (0, 8), 8)[0],
        philox_normal(0, 1, (0, 8), 8, step=1)[0],
        philox_normal(0, 1, (8, 16), 8)[0],
    ]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert not bool((a == b).any())


def test_the_noise_is_standard_normal_and_uncorrelated() -> None:
    noise = philox_normal(3, 3, (0, 256), 256)
    flat = noise.flatten().double()
    assert stats.kstest(flat.numpy(), "norm").pvalue > 0.01
    # 196,608 values: standard deviations of 0.0023, 0.0032 and 0.022.
    assert abs(float(flat.mean())) < 0.01
    assert abs(float(flat.var()) - 1.0) < 0.015
    assert abs(float((flat**4).mean()) - 3.0) < 0.08
    for a, b in [
        (noise[:, 1:], noise[:, :-1]),
        (noise[:, :, 1:], noise[:, :, :-1]),
        (noise[1:], noise[:-1]),
        (philox_normal(3, 3, (0, 256), 256, step=1), noise),
        (philox_normal(4, 3, (0, 256), 256), noise),
    ]:
        assert abs(float((a * b).mean())) < 0.01
        assert abs(float((a**2 * b**2).mean()) - 1.0) < 0.03


def test_the_tails_are_as_heavy_as_they_should_be() -> None:
    noise = philox_normal(11, 1, (0, 1000), 1000).abs()
    for bound in (2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(bound) * 1e6
        assert abs(int((noise > bound).sum()) - expected) < 4 * expected**0.5
    # The smallest radius draws from 2^-24: nothing lies beyond sqrt(48 log 2).
    assert float(noise.max()) < 5.77


def test_opcheck_passes() -> None:
    torch.library.opcheck(torch.ops.ssldiff.philox_normal.default, (torch.zeros(2, 3, 5), 7, 1, 2))
    torch.library.opcheck(torch.ops.ssldiff.philox4x32.default, (torch.arange(20).view(5, 4), 7))


def test_it_stays_one_node_under_compile() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: x + philox_normal(2**64 - 1, 2, (3, 9), 5), fullgraph=True, backend=backend
    )
    x = torch.randn(2, 6, 5)
    assert torch.equal(compiled(x), x + philox_normal(2**64 - 1, 2, (3, 9), 5))
    nodes = [n for g in graphs for n in g.graph.nodes if "philox_normal" in str(n.target)]
    assert len(nodes) == 1


GOOD = {"seed": 0, "channels": 2, "rows": (0, 3), "width": 4, "step": 0}
BAD = {
    "seed below": ({"seed": -1}, ValueError, r"seed is -1; expected an integer from 0 to 2\^64"),
    "seed above": ({"seed": 2**64}, ValueError, r"seed is 18446744073709551616; expected"),
    "seed a float": ({"seed": 1.0}, TypeError, r"seed is 1.0; expected an integer"),
    "seed a bool": ({"seed": True}, TypeError, r"seed is True; expected an integer"),
    "no channels": ({"channels": 0}, ValueError, r"channels is 0, but it must be above zero"),
    "no width": ({"width": 0}, ValueError, r"width is 0, but it must be above zero"),
    "width a float": ({"width": 4.0}, TypeError, r"width is 4.0, but it must be a whole number"),
    "rows above": ({"rows": (0, 2**32 + 1)}, ValueError, r"coordinates and steps count from 0"),
    "rows below": ({"rows": (-1, 3)}, ValueError, r"rows -1 to 3"),
    "rows turned": ({"rows": (3, 2)}, ValueError, r"rows 3 to 2"),
    "rows of floats": ({"rows": (0, 2.5)}, TypeError, r"rows holds 2.5, but whole numbers"),
    "width above": ({"width": 2**32 + 1}, ValueError, r"width 4294967297"),
    "step below": ({"step": -1}, ValueError, r"step -1 were asked for"),
    "step above": ({"step": 2**32}, ValueError, r"step 4294967296 were asked for"),
    "step a float": ({"step": 0.5}, TypeError, r"step holds 0.5, but whole numbers"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("function", [philox_normal, philox_normal_reference])
def test_bad_input_is_one_clear_sentence(
    function: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        function(**{**GOOD, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [philox4x32, philox4x32_reference])
def test_bad_counters_are_named(function: Any) -> None:
    with pytest.raises(ValueError, match=r"philox4x32: counters has shape \[4\], but \[N, 4\]"):
        function(torch.arange(4), 0)
    with pytest.raises(TypeError, match=r"philox4x32: counters is float32, but int64"):
        function(torch.zeros(2, 4), 0)
    with pytest.raises(ValueError, match=r"seed is -1; expected"):
        function(torch.arange(4)[None], -1)


@pytest.mark.parametrize(
    ("out", "first_row", "step", "message"),
    [
        (torch.zeros(2, 3, 4).double(), 0, 0, "must be a contiguous float32 tensor"),
        (torch.zeros(3, 4), 0, 0, "must be a contiguous float32 tensor"),
        (torch.zeros(2, 4, 3).transpose(1, 2), 0, 0, "must be a contiguous float32 tensor"),
        (torch.zeros(2, 3, 4), 2**32 - 2, 0, "first_row is 4294967294"),
        (torch.zeros(2, 3, 4), -1, 0, "first_row is -1"),
        (torch.zeros(2, 3, 4), 0, 2**32, "step is 4294967296"),
    ],
)
def test_the_raw_operator_checks_for_itself(
    out: torch.Tensor, first_row: int, step: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssldiff.philox_normal(out, 0, first_row, step)
    with pytest.raises(RuntimeError, match="must be an int64 tensor"):
        torch.ops.ssldiff.philox4x32(out, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS)
def test_on_a_gpu_words_and_normals_have_the_same_bits(seed: int) -> None:
    counters = torch.randint(-(2**63), 2**63 - 1, (5000, 4))
    assert torch.equal(philox4x32(counters.cuda(), seed).cpu(), philox4x32(counters, seed))
    for shape in SHAPES.values():
        there = philox_normal(seed, *shape, step=3, device="cuda")
        assert torch.equal(there.cpu(), philox_normal(seed, *shape, step=3))
