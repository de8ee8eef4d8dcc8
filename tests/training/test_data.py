# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slide_files import tissue_image, write_slide
from ssldiff_fast.training.data import (
    PatchBatches,
    PatchPool,
    Places,
    stain_gains,
    stain_levels,
)
from ssldiff_fast.training.images import PoolImage
from ssldiff_fast.training.recipe import DataRecipe
from tiny_training import write_image

SIZE = 16
FORBIDDEN = 7  # a grey level that nothing else has


def make_pool(root: Path, *sources: dict[str, object], split: str = "train") -> PatchPool:
    recipe = DataRecipe.model_validate({"mpp": 0.5, "sources": [*sources]})
    return PatchPool(recipe, root, split=split)


def drawn(pool: PatchPool, count: int = 200, size: int = SIZE) -> np.ndarray:
    return as_bytes(pool.sample(count, size, seed=0))


def as_bytes(patches: torch.Tensor) -> np.ndarray:  # [N, S, S, 3] uint8
    return ((patches + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def test_files_set_aside_are_never_drawn_and_the_other_split_has_nothing_else(
    tmp_path: Path,
) -> None:
    write_image(tmp_path / "a.png", seed=0)
    write_image(tmp_path / "b.png", colour=FORBIDDEN)
    source = {"files": "*.png", "mpp": 0.5, "holdout": ["b.png"]}
    assert not (drawn(make_pool(tmp_path, source)) == FORBIDDEN).any()
    assert (drawn(make_pool(tmp_path, source, split="holdout")) == FORBIDDEN).all()


@pytest.mark.parametrize("views", [1, 3])
def test_excluded_regions_are_never_touched_at_any_scale_or_view(
    tmp_path: Path, views: int
) -> None:
    image = np.random.default_rng(0).integers(100, 255, (96, 120, 3), np.uint8)
    image[30:60, 40:90] = 0
    Image.fromarray(image).save(tmp_path / "a.png")
    recipe = DataRecipe.model_validate(
        {
            "mpp": 0.5,
            "scales": [0.7, 1.0, 1.3],
            # One pixel more on each side, because resampling mixes neighbours.
            "sources": [{"files": "a.png", "mpp": 0.5, "exclude": [[36, 26, 58, 38]]}],
        }
    )
    batches = PatchBatches(
        PatchPool(recipe, tmp_path), size=SIZE, batch_size=50, seed=0, views=views
    )
    stream = iter(batches)
    for _ in range(6):
        batch = next(stream)
        assert float(batch.min()) > -0.9  # black is -1


def test_batches_are_floats_in_the_range_of_the_networks(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    pool = make_pool(tmp_path, {"files": "a.png", "mpp": 0.5})
    one = next(iter(PatchBatches(pool, size=SIZE, batch_size=3, seed=0)))
    two = next(iter(PatchBatches(pool, size=SIZE, batch_size=3, seed=0, views=2)))
    assert one.shape == (3, 3, SIZE, SIZE)
    assert two.shape == (3, 2, 3, SIZE, SIZE)
    assert one.dtype == torch.float32
    assert -1 <= float(one.min()) < 0 < float(one.max()) <= 1


def test_the_seed_decides_the_batches_and_going_on_draws_new_ones(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    pool = make_pool(tmp_path, {"files": "a.png", "mpp": 0.5})

    def first(seed: int, start: int = 0) -> torch.Tensor:
        return next(iter(PatchBatches(pool, size=SIZE, batch_size=2, seed=seed, start=start)))

    assert torch.equal(first(1), first(1))
    assert torch.equal(first(1, 500), first(1, 500))
    assert not torch.equal(first(1), first(2))
    assert not torch.equal(first(1), first(1, 500))


def test_images_are_resampled_to_the_mpp_of_the_recipe(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 80)
    pool = make_pool(tmp_path, {"files": "a.png", "mpp": 0.25})
    assert pool.images[0].pixels.shape == (40, 40, 3)


def test_slides_are_drawn_from_as_well_as_images(tmp_path: Path) -> None:
    write_slide(tmp_path / "slide.tif", tissue_image())
    pool = make_pool(tmp_path, {"files": "slide.tif", "mpp": 0.5})
    assert drawn(pool, 3).shape == (3, SIZE, SIZE, 3)


def test_background_is_drawn_less_often_than_tissue(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(60, 230, (80, 200, 3), np.uint8)
    pixels[:, 100:] = 245
    Image.fromarray(pixels).save(tmp_path / "a.png")
    patches = drawn(make_pool(tmp_path, {"files": "a.png", "mpp": 0.5}), 400)
    share = (patches == 245).all(axis=(1, 2, 3)).mean()
    assert 0.08 < share < 0.25  # a quarter of about half, of what is kept


def jittered(seed: int, count: int, jitter: float) -> np.ndarray:  # [count, 3, 256]
    gains = stain_gains(np.random.default_rng(seed), count, jitter)
    return stain_levels(torch.from_numpy(gains)).numpy()


def test_the_stain_jitter_keeps_white_white_and_black_black() -> None:
    levels = jittered(0, 50, 0.3)
    assert (levels[..., 0] == -1).all()
    assert (levels[..., 255] == 1).all()


def test_without_jitter_grey_levels_stay() -> None:
    levels = jittered(0, 2, 0)
    expected = np.broadcast_to(np.arange(256), (2, 3, 256))
    np.testing.assert_allclose((levels + 1) * 127.5, expected, rtol=0, atol=1e-4)


def test_the_stain_jitter_is_a_gain_of_the_optical_density_per_channel() -> None:
    before = np.arange(60, 200) / 255
    after = (jittered(1, 200, 0.1)[..., 60:200] + 1) / 2
    density = np.log(after) / np.log(before)
    assert (density.std(-1) < 0.02).all()
    gains = density.mean(-1)  # [patches, channels]
    assert 0.5 < gains.min() < 0.8 < 1.2 < gains.max() < 1.5
    # Of one deviation, the channels' own part, and of one more, which they share.
    assert gains.std() == pytest.approx(0.1 * 2**0.5, rel=0.15)
    assert np.mean(gains.std(1, ddof=1) ** 2) ** 0.5 == pytest.approx(0.1, rel=0.15)


def test_augmentation_reaches_all_eight_symmetries_and_no_other_pixels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    pool = make_pool(tmp_path, {"files": "a.png", "mpp": 0.5})
    places = Places(*(np.full(200, n) for n in (0, 3, 5)))
    patches = as_bytes(pool.patches(np.random.default_rng(0), places, 4))
    patch = image[3:7, 5:9]
    turned = [np.rot90(p, k) for p in (patch, patch[:, ::-1]) for k in range(4)]
    assert {p.tobytes() for p in patches} == {np.ascontiguousarray(p).tobytes() for p in turned}


def test_every_pixel_drawn_is_one_of_the_patch_in_its_own_image(tmp_path: Path) -> None:
    """Images of other sizes, one after another in memory: a wrong stride would show."""
    for index, (height, width) in enumerate([(40, 31), (29, 64), (33, 33)]):
        image = np.full((height, width, 3), index, np.uint8)
        image[..., 1] = np.arange(height)[:, None]
        image[..., 2] = np.arange(width)
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    pool = make_pool(tmp_path, {"files": "*.png", "mpp": 0.5})
    rng = np.random.default_rng(0)
    places = pool.places(rng, 11, 300)
    patches = as_bytes(pool.patches(rng, places, 11))
    assert set(places.image) == {0, 1, 2}
    for n, patch in enumerate(patches):
        y, x = int(places.y[n]), int(places.x[n])
        assert (patch[..., 0] == places.image[n]).all()
        rows, columns = np.unique(patch[..., 1]), np.unique(patch[..., 2])
        assert rows.tolist() == list(range(y, y + 11))
        assert columns.tolist() == list(range(x, x + 11))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 31, 40])
def test_tissue_is_what_the_deviation_of_sampled_pixels_says(size: int) -> None:
    rng = np.random.default_rng(0)
    smooth = rng.normal(128, 1, (6, 7)).repeat(8, 0).repeat(8, 1)[:45, :52]
    pixels = smooth[..., None] + rng.normal(0, 1, (45, 52, 3)) * np.linspace(0, 14, 52)[:, None]
    pixels = pixels.round().clip(0, 255).astype(np.uint8)
    kinds = PoolImage("a", pixels, (), 1.0).kinds(size)
    for y in range(45 - size + 1):
        for x in range(52 - size + 1):
            deviation = pixels[y : y + size : 8, x : x + size : 8].std()
            assert kinds[y, x] == (2 if deviation > 6 else 1)


@given(
    st.lists(
        st.tuples(*[st.floats(-5, 45)] * 2, *[st.floats(0.1, 30)] * 2), min_size=1, max_size=3
    ),
    st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_corners_are_allowed_exactly_where_no_excluded_region_is_touched(
    excluded: list[tuple[float, float, float, float]], size: int
) -> None:
    image = PoolImage("a", np.zeros((37, 41, 3), np.uint8), tuple(excluded), 1.0)
    kinds = image.kinds(size)
    for y in range(37 - size + 1):
        for x in range(41 - size + 1):
            assert (kinds[y, x] > 0) == image.allows(y, x, size)


@given(st.integers(0, 2**31), st.integers(5, 24), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_no_pixel_of_an_excluded_region_is_ever_drawn(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: int, views: int
) -> None:
    """Whatever the regions; each view in each of the eight symmetries."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(seed)
    image = rng.integers(100, 255, (60, 75, 3), np.uint8)
    exclude = []
    for _ in range(3):
        y, x, h, w = (int(n) for n in rng.integers(1, (40, 55, 20, 20)))
        image[y : y + h, x : x + w] = 0
        exclude.append([x, y, w, h])
    Image.fromarray(image).save(folder / "a.png")
    pool = make_pool(folder, {"files": "a.png", "mpp": 0.5, "exclude": exclude})
    try:
        batches = PatchBatches(pool, size=size, batch_size=100, seed=seed, views=views)
    except ValueError:
        return  # no room between them
    stream = iter(batches)
    for _ in range(3):
        assert float(next(stream).min()) > -0.9  # black is -1


def test_images_are_drawn_by_their_weights_whatever_their_share_of_background(
    tmp_path: Path,
) -> None:
    write_image(tmp_path / "a.png", 80)
    write_image(tmp_path / "b.png", 80, colour=245)  # three of four draws are rejected
    sources = [{"files": f"{n}.png", "mpp": 0.5, "weight": w} for n, w in (("a", 1), ("b", 3))]
    pool = make_pool(tmp_path, *sources)
    places = pool.places(np.random.default_rng(0), SIZE, 4000)
    assert (places.image == 1).mean() == pytest.approx(0.75, abs=0.03)


def test_corners_are_drawn_evenly(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 20)
    pool = make_pool(tmp_path, {"files": "a.png", "mpp": 0.5})
    places = pool.places(np.random.default_rng(0), SIZE, 5000)
    counts = np.bincount(places.y * 5 + places.x, minlength=25)
    assert len(counts) == 25
    assert 150 < counts.min() <= counts.max() < 250


def test_samples_for_evaluation_are_always_the_same(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    pool = make_pool(tmp_path, {"files": "a.png", "mpp": 0.5})
    first = pool.sample(3, SIZE, seed=1)
    pool.sample(3, SIZE, seed=2)
    assert torch.equal(pool.sample(3, SIZE, seed=1), first)


# What is wrong with data is said before anything is trained.


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; give the folder"):
        make_pool(tmp_path / "nowhere", {"files": "*.png", "mpp": 0.5})


def test_a_source_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'\*\.jpg' matches no file"):
        make_pool(tmp_path, {"files": "*.jpg", "mpp": 0.5})


def test_a_misspelt_name_set_aside_is_an_error_and_not_trained_on(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"sets aside aa\.png, which is not"):
        make_pool(tmp_path, {"files": "*.png", "mpp": 0.5, "holdout": ["aa.png"]})


@pytest.mark.parametrize(("holdout", "split"), [(["a.png"], "train"), ([], "holdout")])
def test_a_split_without_images_is_named(tmp_path: Path, holdout: list[str], split: str) -> None:
    write_image(tmp_path / "a.png")
    source = {"files": "*.png", "mpp": 0.5, "holdout": holdout}
    with pytest.raises(ValueError, match=f"no image for the split '{split}'"):
        make_pool(tmp_path, source, split=split)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = tmp_path / "b.png"
    path.write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with pytest.raises(OSError, match=r"training image .*b\.png cannot be read"):
        make_pool(tmp_path, {"files": "*.png", "mpp": 0.5})


@pytest.mark.parametrize(
    "exclude", [[], [[0, 0, 40, 40]], [[0, 10, 40, 5], [10, 0, 5, 40], [25, 0, 5, 40]]]
)
def test_images_without_room_for_a_patch_are_an_error_instead_of_an_endless_search(
    tmp_path: Path, exclude: list[list[int]]
) -> None:
    write_image(tmp_path / "a.png", 40)
    pool = make_pool(tmp_path, {"files": "a.png", "mpp": 0.5, "exclude": exclude})
    size = 41 if not exclude else 26
    with pytest.raises(ValueError, match=f"no training image has room for patches of {size}"):
        PatchBatches(pool, size=size, batch_size=1, seed=0)


def test_the_last_room_between_excluded_regions_is_found(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 40)
    source = {"files": "a.png", "mpp": 0.5, "exclude": [[0, 0, 40, 24], [0, 24, 24, 16]]}
    pool = make_pool(tmp_path, source)
    pool.check_size(16)
    with pytest.raises(ValueError, match="no training image has room"):
        pool.check_size(17)
