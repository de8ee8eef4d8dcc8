# SPDX-License-Identifier: Apache-2.0
"""Both orders end in the same bytes, whatever is between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SIZE, WINDOW, denoiser, digest, field, image, noise, regular, rows_of, settings
from runs import shifted as shifted_windows
from torch import Tensor
from toys import ConvDenoiser

from ssldiff_fast.canvas import (
    CanvasDenoiser,
    GridField,
    Rows,
    WindowPlan,
    canvas_noise,
    sample_rows,
    wide,
)
from ssldiff_fast.ops import philox_normal

RUNS: dict[str, dict[str, Any]] = {
    "ddim": {},
    "deterministic": {"eta": 0.0},
    "history": {"solver": "dpmpp_2m", "eta": 0.0},
    "authors": {"solver": "authors", "eta": 1.0},
    "one step": {"steps": 1},
}
WINDOWS: dict[str, Any] = {
    "regular": regular(),
    "disjoint": regular(8),
    "shifted": shifted_windows(),
}


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())
def test_the_orders_end_in_the_same_bytes(windows: Any, changes: dict[str, Any]) -> None:
    whole = image(denoiser(windows), **changes)
    assert digest(image(denoiser(windows), order="wavefront", **changes)) == digest(whole)


def joined(rows: list[Rows]) -> Tensor:
    return torch.cat([part.canvas for part in rows], dim=-2)


@pytest.mark.parametrize("piece_bytes", [1, 2**13])
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())
def test_rows_that_wait_in_a_file_have_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    windows: Any,
    changes: dict[str, Any],
    piece_bytes: int,
) -> None:
    expected = digest(image(denoiser(windows), **changes))
    monkeypatch.setattr(wide, "_PIECE_BYTES", piece_bytes)
    rows = rows_of(denoiser(windows), noise(), scratch=tmp_path, **changes)
    assert digest(joined(rows)) == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_so_have_masked_and_batched_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    tissue = torch.zeros(6, 3, dtype=torch.bool)
    tissue[1, 0] = tissue[3, 2] = True
    glass = torch.tensor([0.7, -0.2, 0.4]).view(3, 1, 1)
    changes = {"solver": solver, "eta": 0.5 if solver == "ddim" else 0.0, "steps": 3}
    for options in (
        {"mask": tissue, "background": glass},
        {"field": [field(11), field(12)]},
        {"field": [field(11), field(12)], "mask": tissue, "background": glass},
    ):
        start = torch.stack((noise(0), noise(1))) if "field" in options else noise()
        expected = digest(image(denoiser(**options), start, **changes))
        with monkeypatch.context() as patch:
            patch.setattr(wide, "_PIECE_BYTES", 1)
            rows = rows_of(denoiser(**options), start, scratch=tmp_path, **changes)
        assert digest(joined(rows)) == expected


def test_the_bytes_do_not_depend_on_how_the_start_is_given(tmp_path: Path) -> None:
    def drawn(begin: int, end: int) -> Tensor:
        return philox_normal(0, 3, (begin, end), SIZE[1])

    expected = digest(image())
    for order in ("plain", "wavefront"):
        assert digest(image(start=drawn, order=order)) == expected
        assert digest(image(order=order, scratch=tmp_path / order)) == expected
    mapped = torch.from_file(str(tmp_path / "plain" / "canvas.f32"), size=3 * SIZE[0] * SIZE[1])
    assert digest(mapped) == expected


def test_the_bytes_do_not_depend_on_the_threads_of_our_operators() -> None:
    class Pixelwise(ConvDenoiser):
        """Without a convolution, whose sums are PyTorch's."""

        def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
            cond, uncond = state
            tokens = [cond[index], uncond.expand_as(cond[index])]
            return torch.stack([x * 0.5 + token[:, 0, :3, None, None] for token in tokens])

    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.add(digest(image(denoiser(network=Pixelwise()))))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_rows_come_from_top_to_bottom_and_the_first_before_the_last_are_begun() -> None:
    seen: list[int] = []

    def drawn(begin: int, end: int) -> Tensor:
        seen.append(end)
        return philox_normal(0, 3, (begin, end), WINDOW[1])

    height, steps = 2000, 5
    plan = WindowPlan.regular(height, WINDOW[1], WINDOW, 4)
    cells = torch.zeros(height // 8, 1, 1, 3)
    canvas = CanvasDenoiser(ConvDenoiser(), plan, GridField(cells, WINDOW))
    end = 0
    for rows in sample_rows(canvas, drawn, **settings(steps=steps)):
        assert rows.begin == end
        end = rows.end
        assert rows.canvas.shape == (3, end - rows.begin, WINDOW[1])
        # Each step is a window height ahead of the next at most.
        assert max(seen) <= rows.begin + (steps + 1) * WINDOW[0]
    assert end == height


def test_a_batch_is_its_canvases_each_with_its_field_and_seed() -> None:
    fields = [field(11), field(12)]
    start = torch.stack((noise(0), noise(1)))
    for order in ("plain", "wavefront"):
        both = image(denoiser(field=fields), start, seed=[3, 4], order=order)
        for b in range(2):
            alone = image(denoiser(field=fields[b]), start[b], seed=3 + b)
            torch.testing.assert_close(both[b], alone)
    deterministic = {"eta": 0.0, "solver": "dpmpp_2m"}
    both = image(denoiser(field=fields), start, **deterministic)
    alone = image(denoiser(field=fields[1]), start[1], **deterministic)
    torch.testing.assert_close(both[1], alone)


def test_windows_of_all_canvases_share_micro_batches() -> None:
    shapes: list[int] = []

    class Noted(ConvDenoiser):
        def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
            shapes.append(len(x))
            return super().__call__(x, t, state, index)

    one = WindowPlan.regular(8, 8, WINDOW, 8)
    cells = GridField(canvas_noise(0, 1, 1, 3)[None], WINDOW)
    canvas = CanvasDenoiser(Noted(), one, [cells] * 6, batch_size=4)
    canvas(canvas_noise(0, 18, 8, 8).view(6, 3, 8, 8), 300)
    assert shapes == [3, 3]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: image(order="zigzag"), ValueError, "order is 'zigzag'.*plain, wavefront"),
        (
            lambda: image(order="wavefront", callback_on_step_end=lambda *_: None),
            ValueError,
            "callback_on_step_end needs the whole canvas.*order='plain'",
        ),
        (
            lambda: image(order="wavefront", step_noise=lambda _: noise()),
            ValueError,
            "step_noise needs",
        ),
        (lambda: rows_of(lambda x, t: x, noise()), TypeError, "pass a CanvasDenoiser"),  # type: ignore[arg-type, return-value]
        (lambda: image(start="noise"), TypeError, "noise is a str, but a tensor or a function"),
        (
            lambda: image(start=lambda begin, end: torch.zeros(3, end - begin, 7)),
            ValueError,
            r"noise\(0, 44\) has shape \[1, 3, 44, 7\]",
        ),
        (lambda: image(start=torch.zeros(2, 3, *SIZE), seed=[1]), ValueError, "holds 1 seeds.* 2"),
        (
            lambda: image(denoiser(field=[field(), field(), field()]), torch.zeros(2, 3, *SIZE)),
            ValueError,
            "2 canvases, but there are 3 fields",
        ),
        (lambda: image(resume=True), ValueError, "there is no state folder"),
    ],
)
def test_what_does_not_go_together_is_named(make: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_guidance_interval_evaluates_the_conditional_alone_outside_it() -> None:
    pairs: dict[float, int] = {}

    class Noted(ConvDenoiser):
        def __call__(self, x: Tensor, t: float, state: Any, index: Tensor) -> Tensor:
            output = super().__call__(x, t, state, index)
            pairs[t] = len(output)
            return output

    canvas = denoiser(network=Noted(), guidance_interval=(300, 700))
    first = image(canvas)  # t = 999, 799, 599, 399, 199
    assert pairs == {999.0: 1, 799.0: 1, 599.0: 2, 399.0: 2, 199.0: 1}
    assert torch.equal(first, image(denoiser(guidance_interval=(300, 700)), order="wavefront"))
    everywhere = image(denoiser(guidance_interval=(0, 999)))
    assert torch.equal(everywhere, image(denoiser()))
    assert not torch.equal(everywhere, first)
    with pytest.raises(ValueError, match=r"guidance_interval is \(7, 3\)"):
        denoiser(guidance_interval=(7, 3))
