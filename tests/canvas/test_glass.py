# SPDX-License-Identifier: Apache-2.0
"""What a mask leaves out is plain glass, whichever decoder makes the tissue."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from golden_inputs import VQ_SMALL, fill
from ssldiff_fast.canvas import (
    DecodeSettings,
    Glass,
    TissueMask,
    canvas_noise,
    decode_image,
    decode_rows,
    open_decoder,
    wide,
)
from ssldiff_fast.models.autoencoder import VQModel
from ssldiff_fast.models.local_autoencoder import measure_statistics

SIZE, WINDOW, FACTOR = (56, 42), (8, 8), 4
REACH = (6, 5)


def tissue(*cells: tuple[int, int], shape: tuple[int, int] = (7, 6)) -> Tensor:
    there = torch.zeros(shape, dtype=torch.bool)
    for y, x in cells:
        there[y, x] = True
    return there


def glass(there: Tensor, **changes: Any) -> Glass:
    settings: dict[str, Any] = {"size": SIZE, "reach": REACH, "factor": FACTOR, **changes}
    return Glass(TissueMask(there), **settings)


def share_by_hand(of: Glass) -> np.ndarray:  # [H * f, W * f]
    """The decoded pixels' share, cell by cell."""
    there, axes = of.mask.tissue, []
    for axis in (0, 1):
        size, cells, factor = of.size[axis], there.shape[axis], of.factor
        at = np.arange(size * factor)[None]
        begin = np.array([math.floor(c * size / cells) * factor for c in range(cells)])[:, None]
        end = np.array([math.ceil((c + 1) * size / cells) * factor for c in range(cells)])[:, None]
        distance = np.maximum(np.maximum(begin - at, at - end + 1), 0)
        share = distance / (of.reach[axis] * factor)
        axes.append(np.where(share < 1, 0.5 + 0.5 * np.cos(np.pi * share), 0))
    made = [np.outer(axes[0][y], axes[1][x]) for y, x in there.nonzero().tolist()]
    return np.max(made, axis=0)


def enlarge(tiles: Tensor) -> Tensor:
    """A decoder without context: four pixels a latent."""
    return torch.nn.functional.interpolate(tiles, scale_factor=4.0)


def small_vae() -> VQModel:
    return fill(VQModel(**VQ_SMALL), "first_stage_model.").eval()


@torch.no_grad()
def ways() -> dict[str, tuple[Any, dict[str, Any]]]:
    """A model and options of every decoder."""
    vae, window = small_vae(), {"window": WINDOW}
    noise = canvas_noise(1, 3, *WINDOW)[None]
    fixed = measure_statistics(vae, vae.decode, noise)
    return {
        "reference": (enlarge, {**window, "batch_size": 3}),
        "fast": (enlarge, {**window, "stride": 6, "weights": "hann"}),
        "local": (vae, {**window, "decoder": "local"}),
        "fixed": (vae, {**window, "decoder": "local", "statistics": fixed, "tile": 7}),
        "global": (vae, {"decoder": "global"}),
    }


WAYS = ["reference", "fast", "local", "fixed", "global"]
SHAPES = {
    "corner": tissue((0, 0)),
    "middle": tissue((3, 2)),
    "last row": tissue(*((6, x) for x in range(6))),
    "ring": tissue(*((y, x) for y in (1, 5) for x in (1, 4)), (3, 1), (3, 4)),
    "coarse": tissue((0, 1), shape=(2, 3)),
    "fine": tissue((20, 3), (4, 17), shape=(23, 19)),
    "all": torch.ones(7, 6, dtype=torch.bool),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_tissue_stays_and_what_is_far_from_it_is_plain(way: str, shape: str) -> None:
    model, options = ways()[way]
    canvas, of = canvas_noise(0, 3, *SIZE) / 3, glass(SHAPES[shape])
    image = decode_image(model, canvas, glass=of, **options).astype(int)
    whole, share = decode_image(model, canvas, **options).astype(int), share_by_hand(of)
    assert np.all(image[share == 0] == of.level)
    difference = np.abs(image - whole)[share == 1]
    # Fewer tiles a batch may be rounded otherwise by the network's convolutions.
    assert difference.max() <= (0 if model is enlarge else 1)
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_the_hand_over_falls_with_the_distance(shape: str) -> None:
    """With one tile of all there is nothing but the share, and pixels of black tell it."""
    of = glass(SHAPES[shape], level=200)
    settings = {"stride": SIZE, "window": SIZE, "glass": of}
    image = decode_image(enlarge, torch.full((3, *SIZE), -1.0), **settings)
    expected = np.rint(200 * (1 - share_by_hand(of)))
    assert np.abs(image - expected[..., None]).max() <= 1
    reach = min(REACH) * FACTOR
    for axis in (0, 1):
        steps = np.abs(np.diff(image[..., 0].astype(int), axis=axis))
        assert steps.max() <= 200 * math.pi / 2 / reach + 1


@pytest.mark.parametrize("way", WAYS)
def test_bands_files_and_a_later_begin_do_not_change_the_bytes(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "_PIECE_BYTES", 2**12)
    model, options = ways()[way]
    # The first tiles are all glass: what pixels are like must be known before any is decoded.
    canvas, of = canvas_noise(0, 3, *SIZE) / 3, glass(tissue((4, 2), (4, 3), (5, 4)))
    whole = decode_image(model, canvas, glass=of, **options)
    options["glass"] = of
    bands = decode_rows(model, canvas.split(5, dim=1), SIZE, scratch=tmp_path, **options)
    assert np.array_equal(np.concatenate([np.asarray(band) for band in bands]), whole)
    names = ("decoder", "stride", "weights", "tile", "batch_size")
    settings = DecodeSettings(**{name: options.pop(name) for name in names if name in options})
    for begin in (1, 17, 33, 55):
        decoder = open_decoder(model, SIZE, settings, **options)
        rows = decoder.decode([canvas[:, decoder.first_latent(begin) :]], begin=begin)
        assert np.array_equal(np.concatenate(list(rows)), whole[begin * FACTOR :])


def test_tiles_without_tissue_are_not_decoded() -> None:
    seen: list[Tensor] = []

    def noted(tiles: Tensor) -> Tensor:
        seen.extend(tiles)
        return enlarge(tiles)

    where = torch.arange(SIZE[0] * SIZE[1]).view(1, *SIZE).expand(3, -1, -1) / 1e4
    decode_image(noted, where, stride=4, window=WINDOW, batch_size=1, glass=glass(tissue((3, 2))))
    # The cell is latents 24 to 32 and 14 to 21: origins (20, 24, 28) and (8, 12, 16, 20).
    assert len(seen) == 3 * 4
    origins = {divmod(round(float(tile[0, 0, 0]) * 1e4), SIZE[1]) for tile in seen}
    assert origins == {(y, x) for y in (20, 24, 28) for x in (8, 12, 16, 20)}


def test_regions_without_tissue_in_reach_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = ways()["fixed"]
    canvas, counts = canvas_noise(0, 3, *SIZE), []
    for there in (tissue((3, 2)), torch.ones(7, 6, dtype=torch.bool)):
        calls: list[int] = []
        decoder = open_decoder(
            model,
            SIZE,
            DecodeSettings("local", tile=7, batch_size=1),
            window=WINDOW,
            statistics=options["statistics"],
            glass=glass(there),
        )
        inner: Any = decoder.decoder  # type: ignore[attr-defined]
        decode = inner._decode
        monkeypatch.setattr(
            inner,
            "_decode",
            lambda b, r, part, d=decode, c=calls: (c.extend(part), d(b, r, part))[1],
        )
        list(decoder.decode([canvas]))
        counts.append(len(calls))
    assert counts[1] == 8 * 6
    assert counts[0] < counts[1] / 2


def test_tiles_get_one_white_by_the_glass_that_they_hold() -> None:
    colours = [(238.0, 231.0, 236.0), (246.0, 247.0, 244.0), (0.0, 0.0, 0.0)]
    stain = torch.tensor([180.0, 90.0, 150.0])
    tiles = stain.view(1, 3, 1, 1).repeat(3, 1, 8, 8)
    for tile, white in zip(tiles[:2], colours):
        tile[:, :4] = torch.tensor(white).view(3, 1, 1)
    tiles = tiles / 127.5 - 1
    balanced = glass(tissue((0, 0))).balanced(tiles)
    for made, white in zip((balanced + 1) * 127.5, colours[:2]):
        expected = torch.full((3, 4, 8), 243.5)
        torch.testing.assert_close(made[:, :4], expected, atol=0.1, rtol=0)
        scaled = (stain * 243.5 / torch.tensor(white)).view(3, 1, 1).expand(3, 4, 8)
        torch.testing.assert_close(made[:, 4:], scaled, atol=0.1, rtol=0)
    assert torch.equal(balanced[2], tiles[2])


def test_a_little_glass_in_a_tile_changes_it_a_little() -> None:
    tile = torch.full((1, 3, 20, 20), 0.2)
    changes = []
    for count in range(0, 60, 4):
        tile.flatten(2)[..., :count] = 230 / 127.5 - 1
        made = glass(tissue((0, 0))).balanced(tile)
        changes.append(float((made - tile).abs().max()))
    assert changes[0] == 0
    assert changes == sorted(changes)
    assert max(np.diff(changes)) < 2 / 127.5
    assert changes[10:] == pytest.approx([13.5 / 127.5] * 5, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": tissue((0, 0))}, TypeError, "mask is a Tensor, but a TissueMask"),
        ({"level": 256}, ValueError, "level is 256, but a grey level was expected, 0 to 255"),
        ({"level": 0.5}, ValueError, "level is 0.5"),
        ({"reach": (0, 4)}, ValueError, "reach is 0"),
        ({"size": (8, -1)}, ValueError, "size is -1"),
        ({"factor": 0}, ValueError, "factor is 0"),
    ],
)
def test_glass_that_cannot_be_is_said(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    settings: dict[str, Any] = {
        "mask": TissueMask(tissue((0, 0))),
        "size": SIZE,
        "reach": REACH,
        "factor": FACTOR,
    }
    with pytest.raises(error, match=message):
        Glass(**{**settings, **changes})


def test_glass_of_another_canvas_is_refused() -> None:
    with pytest.raises(ValueError, match="glass is of a canvas of 56 x 42 latents, but this one"):
        decode_image(
            enlarge, canvas_noise(0, 3, 40, 42), window=WINDOW, glass=glass(tissue((0, 0)))
        )
