# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slide_files import tissue_image, write_slide
from ssldiff_fast.training.data import PatchBatches, PatchPool, augment, to_float
from ssldiff_fast.training.recipe import DataRecipe
from tiny_training import write_image

SIZE = 16
FORBIDDEN = 7  # a grey level that nothing else has


def make_pool(root: Path, *sources: dict[str, object], split: str = "train") -> PatchPool:
    recipe = DataRecipe.model_validate({"mpp": 0.5, "sources": [*sources]})
    return PatchPool(recipe, root, split=split)


def drawn(pool: PatchPool, count: int = 200, size: int = SIZE) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([pool.patch(rng, size) for _ in range(count)])


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
    levels = to_float(np.array([0, 255], np.uint8).reshape(1, 1, 2, 1).repeat(3, -1))
    assert levels[0, 0, 0].tolist() == [-1, 1]


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


def test_the_stain_jitter_keeps_white_white_and_black_black() -> None:
    patch = np.zeros((4, 4, 3), np.uint8)
    patch[:2] = 255
    for seed in range(20):
        out = augment(patch, np.random.default_rng(seed), 0.3)
        assert set(np.unique(out)) == {0, 255}


def test_the_stain_jitter_is_a_gain_of_the_optical_density_per_channel() -> None:
    levels = np.arange(1, 255, dtype=np.uint8)
    patch = np.broadcast_to(levels[:, None, None], (254, 254, 3)).copy()
    out = augment(patch, np.random.default_rng(1), 0.1)
    gains = []
    for channel in range(3):
        after = np.sort(out[..., channel], axis=None)[::254]  # the order of grey levels stays
        density = np.log(after[60:200] / 255) / np.log(levels[60:200] / 255)
        assert density.std() < 0.02
        gains.append(density.mean())
    assert np.ptp(gains) > 0.02
    assert min(gains) > 0.5
    assert max(gains) < 1.5


def test_augmentation_reaches_all_eight_symmetries_and_no_other_pixels() -> None:
    patch = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    seen = {augment(patch, np.random.default_rng(seed), 0).tobytes() for seed in range(200)}
    turned = [np.rot90(p, k) for p in (patch, patch[:, ::-1]) for k in range(4)]
    assert seen == {np.ascontiguousarray(p).tobytes() for p in turned}


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
