# SPDX-License-Identifier: Apache-2.0
"""Random patches from a handful of images, for every trainer.

Few images become many patches: random position, a scale around the target mpp, one of the eight
symmetries of the square (D4), and a mild jitter of the stain in optical density. What is drawn is
decided on the CPU, the same for every device; the pixels are gathered on the device that trains, a
whole batch at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ssldiff_fast.training.images import BACKGROUND, NOWHERE, PoolImage, scaled_images
from ssldiff_fast.training.recipe import DataRecipe, SourceRecipe

_WHITE_KEEP = 0.25  # share of background patches that are kept
_TRIES = 64  # rejected positions before an image is given up for this draw


@dataclass(frozen=True)
class _Corners:
    """What patches of one size may be drawn from: all images' corners, one image after another."""

    kinds: np.ndarray  # [all] uint8
    first: np.ndarray  # [images] int64, where an image's corners begin
    rows: np.ndarray  # [images] int64
    columns: np.ndarray  # [images] int64


@dataclass(frozen=True)
class Places:
    """Where patches are: image and top-left corner."""

    image: np.ndarray  # [N] int64
    y: np.ndarray  # [N] int64
    x: np.ndarray  # [N] int64


class PatchPool:
    """The images of a recipe, read once, at every scale of the recipe.

    Args:
        recipe: which images, at which resolution, and what is set aside.
        root: folder that the recipe's paths are relative to.
        split: "train" leaves out what is set aside; "holdout" has only the files set aside.

    Raises:
        FileNotFoundError: `root` is no folder, or a source or a name set aside matches no file.
        ValueError: no image is left for the split.
        OSError: an image cannot be read.
    """

    def __init__(self, recipe: DataRecipe, root: Path, *, split: str = "train") -> None:
        self.recipe = recipe
        self.images: list[PoolImage] = []
        wanted: list[tuple[Path, SourceRecipe]] = []
        if not root.is_dir():
            raise FileNotFoundError(
                f"there is no folder {root}; give the folder that holds the training images with "
                "--data"
            )
        scales = recipe.scales if split == "train" else [1.0]
        for source in recipe.sources:
            paths = sorted(root.glob(source.files))
            if not paths:
                raise FileNotFoundError(
                    f"the recipe's source '{source.files}' matches no file under {root}; "
                    "give the folder that holds the training images with --data"
                )
            missing = sorted(set(source.holdout) - {path.name for path in paths})
            if missing:  # a misspelt name would be trained on
                raise FileNotFoundError(
                    f"the recipe's source '{source.files}' sets aside {missing[0]}, which is not "
                    f"among its files under {root}; correct the name"
                )
            wanted += [
                (path, source)
                for path in paths
                if (path.name in source.holdout) == (split == "holdout")
            ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for images in threads.map(partial(scaled_images, recipe.mpp, scales), wanted):
                self.images += images
        if not self.images:
            raise ValueError(f"the recipe leaves no image for the split '{split}'")
        weights = np.array([im.weight for im in self.images])
        self._cumulative = np.cumsum(weights / weights.sum())
        self._cumulative[-1] = 1.0
        self._corners: dict[int, _Corners] = {}
        self._pixels: dict[torch.device, Tensor] = {}
        areas = [im.pixels.shape[0] * im.pixels.shape[1] for im in self.images]
        self._first_pixel = np.cumsum([0, *areas[:-1]])
        self._width = np.array([im.pixels.shape[1] for im in self.images])

    def _corners_of(self, size: int) -> _Corners:
        if size not in self._corners:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                kinds = list(threads.map(lambda image: image.kinds(size), self.images))
            # Images without any room are never drawn: the draw would not end.
            kinds = [k if (k > NOWHERE).any() else k[:0, :0] for k in kinds]
            self._corners[size] = _Corners(
                np.concatenate([k.ravel() for k in kinds]),
                np.cumsum([0, *(k.size for k in kinds[:-1])]),
                np.array([k.shape[0] for k in kinds]),
                np.array([k.shape[1] for k in kinds]),
            )
        return self._corners[size]

    def check_size(self, size: int) -> None:
        """Raise ValueError where no image has room for patches of that side."""
        if not self._corners_of(size).kinds.any():
            raise ValueError(
                f"no training image has room for patches of {size} pixels at "
                f"{self.recipe.mpp:g} um per pixel outside the excluded regions; add larger images "
                "or choose smaller patches"
            )

    def places(self, rng: np.random.Generator, size: int, count: int) -> Places:
        """Corners of `count` patches, mostly on tissue.

        An image is drawn by its weight, then a corner in it, again and again until one is allowed
        and is tissue, or background that is kept; after 64 tries another image is drawn.

        Raises:
            ValueError: no image has room for such patches.
        """
        self.check_size(size)
        corners = self._corners_of(size)
        image, y, x = (np.zeros(count, np.int64) for _ in range(3))
        pending, tries = np.arange(count), np.full(count, _TRIES)
        while len(pending):
            fresh = pending[tries[pending] >= _TRIES]
            image[fresh] = np.searchsorted(self._cumulative, rng.random(len(fresh)), side="right")
            tries[fresh] = 0
            rows, columns = corners.rows[image[pending]], corners.columns[image[pending]]
            y[pending] = (rng.random(len(pending)) * rows).astype(np.int64)
            x[pending] = (rng.random(len(pending)) * columns).astype(np.int64)
            there = np.minimum(
                corners.first[image[pending]] + y[pending] * columns + x[pending],
                len(corners.kinds) - 1,
            )
            kind = np.where(rows > 0, corners.kinds[there], NOWHERE)
            kept = rng.random(len(pending)) < _WHITE_KEEP
            tries[pending] = np.where(rows > 0, tries[pending] + 1, _TRIES)
            pending = pending[(kind == NOWHERE) | ((kind == BACKGROUND) & ~kept)]
        return Places(image, y, x)

    def beside(self, rng: np.random.Generator, places: Places, size: int) -> Places:
        """A place for each, shifted by up to a quarter of the side where that is allowed."""
        corners, margin = self._corners_of(size), size // 4
        rows, columns = corners.rows[places.image], corners.columns[places.image]
        shift = rng.integers(-margin, margin + 1, (2, len(places.image)))
        y = np.clip(places.y + shift[0], 0, rows - 1)
        x = np.clip(places.x + shift[1], 0, columns - 1)
        allowed = corners.kinds[corners.first[places.image] + y * columns + x] != NOWHERE
        return Places(places.image, np.where(allowed, y, places.y), np.where(allowed, x, places.x))

    def patches(
        self,
        rng: np.random.Generator,
        places: Places,
        size: int,
        *,
        device: str | torch.device = "cpu",
    ) -> Tensor:  # [N, 3, size, size] fp32 in [-1, 1]
        """The patches there, each in one of the eight symmetries, with a jitter of its stain."""
        count = len(places.image)
        to = partial(send, device=torch.device(device))
        width = self._width[places.image]
        start, down, right = _turned(rng.integers(8, size=count), width, size)
        start = start + self._first_pixel[places.image] + places.y * width + places.x
        steps = torch.arange(size, device=device)
        index = to(start)[:, None, None] + to(down)[:, None, None] * steps[:, None]
        index = index + to(right)[:, None, None] * steps
        pixels = self._on(torch.device(device))[index]  # [N, size, size, 3]
        levels = stain_levels(to(stain_gains(rng, count, self.recipe.stain_jitter)))
        planes = pixels.permute(0, 3, 1, 2).flatten(2).long()
        return levels.gather(2, planes).unflatten(2, (size, size))

    def sample(
        self, count: int, size: int, *, seed: int, device: str | torch.device = "cpu"
    ) -> Tensor:  # [count, 3, size, size] fp32 in [-1, 1]
        """Patches that are always the same, for evaluation."""
        rng = np.random.default_rng(seed)
        return self.patches(rng, self.places(rng, size, count), size, device=device)

    def _on(self, device: torch.device) -> Tensor:  # [all, 3] uint8
        if device not in self._pixels:
            flat = np.concatenate([image.pixels.reshape(-1, 3) for image in self.images])
            self._pixels[device] = torch.from_numpy(flat).to(device)
        return self._pixels[device]


def send(values: np.ndarray, *, device: torch.device) -> Tensor:
    """An array on a device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _turned(
    symmetry: np.ndarray,  # [N] 0 to 7
    width: np.ndarray,  # [N] int64, of the images
    size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # each [N] int64
    """Patches in the eight symmetries of the square, as a first pixel, relative to the corner, and
    the distances in the image of pixels that are neighbours downwards and rightwards."""
    up, left, swapped = symmetry % 2, symmetry // 2 % 2, symmetry // 4 == 1
    first = up * (size - 1) * width + left * (size - 1)
    rows, columns = (1 - 2 * up) * width, 1 - 2 * left
    return first, np.where(swapped, columns, rows), np.where(swapped, rows, columns)


def stain_gains(
    rng: np.random.Generator, count: int, stain_jitter: float
) -> np.ndarray:  # [count, 3]
    """Gains of the optical density of each channel, of which a part is the same for all three."""
    gain = np.ones((count, 3))
    if stain_jitter > 0:
        gain += stain_jitter * rng.standard_normal((count, 3))
        gain += stain_jitter * rng.standard_normal((count, 1))
    return gain.clip(0.5, 1.5)


def stain_levels(
    gains: Tensor,  # [N, 3] fp64
) -> Tensor:  # [N, 3, 256] fp32 in [-1, 1]
    """What each grey level of each channel becomes.

    I = 255 * 10^-OD: a gain g of the density is the power g of the transmitted light, so the white
    background stays white.
    """
    levels = torch.arange(256, dtype=gains.dtype, device=gains.device) / 255
    changed = (255 * levels.pow(gains[..., None])).round()
    return (changed / 127.5 - 1).float()


class PatchBatches(IterableDataset[Tensor]):
    """Endless batches `[B, 3, size, size]` in [-1, 1]; `views` > 1 gives that many overlapping
    views of each place, as `[B, views, 3, size, size]`.

    Args:
        pool: where patches come from.
        size: side of a patch in pixels.
        batch_size: B.
        seed: decides what is drawn, together with `start`.
        views: patches of each place, shifted by up to a quarter of their side.
        start: steps done before: a run that goes on draws new patches instead of the first again.
        device: where batches are made.

    Raises:
        ValueError: the pool has no room for such patches.
    """

    def __init__(
        self,
        pool: PatchPool,
        *,
        size: int,
        batch_size: int,
        seed: int,
        views: int = 1,
        start: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        pool.check_size(size)
        self.start, self.device = start, device
        self.pool, self.size, self.batch_size = pool, size, batch_size
        self.seed, self.views = seed, views

    def __iter__(self) -> Iterator[Tensor]:
        worker = torch.utils.data.get_worker_info()
        stream = [self.seed, worker.id if worker else 0, *([self.start] if self.start else [])]
        rng = np.random.default_rng(stream)
        while True:
            yield self._batch(rng)

    def _batch(self, rng: np.random.Generator) -> Tensor:
        places = self.pool.places(rng, self.size, self.batch_size)
        cut = partial(self.pool.patches, size=self.size, device=self.device)
        if self.views == 1:
            return cut(rng, places)
        views = [self.pool.beside(rng, places, self.size) for _ in range(self.views)]
        return torch.stack([cut(rng, view) for view in views], dim=1)
