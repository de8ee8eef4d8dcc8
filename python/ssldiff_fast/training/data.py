# SPDX-License-Identifier: Apache-2.0
"""Random patches from a handful of images, for every trainer.

Few images become many patches: random position, a scale around the target mpp, one of the eight
symmetries of the square (D4), and a mild jitter of the stain in optical density.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from ssldiff_fast.training.recipe import DataRecipe, SourceRecipe

_WHITE_STD = 6.0  # grey levels: below it a patch is background
_WHITE_KEEP = 0.25  # share of background patches that are kept
_TRIES = 64  # rejected positions before an image is given up for this draw


@dataclass(frozen=True)
class PoolImage:
    """One image at the target mpp times a scale, and where patches must not touch."""

    name: str
    pixels: np.ndarray  # [H, W, 3] uint8
    excluded: tuple[tuple[float, float, float, float], ...]  # x, y, w, h in these pixels
    weight: float

    def allows(self, y: int, x: int, size: int) -> bool:
        """Whether a patch with its top-left corner there touches no excluded region."""
        return not any(
            x < ex + ew and ex < x + size and y < ey + eh and ey < y + size
            for ex, ey, ew, eh in self.excluded
        )

    def has_room(self, size: int) -> bool:
        """Whether any patch of that side is allowed."""
        height, width = self.pixels.shape[:2]
        # An allowed patch stays allowed while it slides up and left until it meets a border of the
        # image or of an excluded region, so that these corners are all that need trying.
        rows = {0, *(math.ceil(ey + eh) for _, ey, _, eh in self.excluded)}
        columns = {0, *(math.ceil(ex + ew) for ex, _, ew, _ in self.excluded)}
        return any(
            0 <= y <= height - size and 0 <= x <= width - size and self.allows(y, x, size)
            for y in rows
            for x in columns
        )


def _read(path: Path) -> Image.Image:
    if path.suffix.lower() in {".jpg", ".jpeg", ".png"}:
        try:
            return Image.open(path).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise OSError(
                f"the training image {path} cannot be read ({error}); remove or replace it"
            ) from None
    from ssldiff_fast.slides.reader import open_slide

    slide = open_slide(path)
    width, height = slide.size_px
    return Image.fromarray(slide.read_region_at(0, 0, width, height, out_size=(width, height)))


def _scaled(
    image: Image.Image, source: SourceRecipe, mpp: float, scale: float
) -> tuple[np.ndarray, float]:
    factor = source.mpp / mpp * scale
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS)), factor


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
            for path in paths:
                if (path.name in source.holdout) != (split == "holdout"):
                    continue
                self._add(path, source, scales)
        if not self.images:
            raise ValueError(f"the recipe leaves no image for the split '{split}'")
        weights = np.array([im.weight for im in self.images])
        self._cumulative = np.cumsum(weights / weights.sum())

    def _add(self, path: Path, source: SourceRecipe, scales: list[float]) -> None:
        image = _read(path)
        for scale in scales:
            pixels, factor = _scaled(image, source, self.recipe.mpp, scale)
            excluded = tuple(
                (x * factor, y * factor, w * factor, h * factor) for x, y, w, h in source.exclude
            )
            area = pixels.shape[0] * pixels.shape[1] / scale**2
            self.images.append(PoolImage(path.name, pixels, excluded, source.weight * area))

    def check_size(self, size: int) -> None:
        """Raise ValueError where no image has room for patches of that side."""
        if not any(image.has_room(size) for image in self.images):
            raise ValueError(
                f"no training image has room for patches of {size} pixels at "
                f"{self.recipe.mpp:g} um per pixel outside the excluded regions; add larger images "
                "or choose smaller patches"
            )

    def position(self, rng: np.random.Generator, size: int) -> tuple[PoolImage, int, int]:
        """An image, and the top-left corner `(y, x)` of a patch in it, mostly on tissue.

        Call `check_size` first: where no patch is allowed, this does not return.
        """
        while True:
            image = self.images[int(np.searchsorted(self._cumulative, rng.random()))]
            height, width = image.pixels.shape[:2]
            if min(height, width) < size:
                continue
            for _ in range(_TRIES):
                y = int(rng.integers(height - size + 1))
                x = int(rng.integers(width - size + 1))
                if not image.allows(y, x, size):
                    continue
                sample = image.pixels[y : y + size : 8, x : x + size : 8]
                if sample.std() > _WHITE_STD or rng.random() < _WHITE_KEEP:
                    return image, y, x

    def patch(self, rng: np.random.Generator, size: int) -> np.ndarray:  # [size, size, 3] uint8
        """One augmented patch."""
        image, y, x = self.position(rng, size)
        return augment(image.pixels[y : y + size, x : x + size], rng, self.recipe.stain_jitter)


def augment(
    patch: np.ndarray,  # [S, S, 3] uint8
    rng: np.random.Generator,
    stain_jitter: float,
) -> np.ndarray:  # [S, S, 3] uint8
    """One of the eight symmetries, then a gain per channel of the optical density."""
    turned = np.rot90(patch, int(rng.integers(4)))
    if rng.random() < 0.5:
        turned = turned[:, ::-1]
    if stain_jitter <= 0:
        return np.ascontiguousarray(turned)
    # I = 255 * 10^-OD: a gain g of the density is the power g of the transmitted light, so the
    # white background stays white. One table per channel does it for all 256 grey levels.
    gain = 1 + stain_jitter * rng.standard_normal(3) + stain_jitter * rng.standard_normal()
    levels = np.arange(256)[:, None] / 255.0
    table = np.rint(255 * levels ** gain.clip(0.5, 1.5)).astype(np.uint8)
    return np.stack([table[turned[..., c], c] for c in range(3)], axis=-1)


def to_float(
    patches: np.ndarray,  # [B, H, W, 3] uint8
) -> Tensor:  # [B, 3, H, W] fp32 in [-1, 1]
    """Pixels as the networks take them."""
    return torch.from_numpy(patches).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class PatchBatches(IterableDataset[Tensor]):
    """Endless batches `[B, 3, size, size]` in [-1, 1]; `views` > 1 gives that many overlapping
    views of each place, as `[B, views, 3, size, size]`.

    Args:
        pool: where patches come from.
        size: side of a patch in pixels.
        batch_size: B.
        seed: decides what is drawn, together with `start`.
        views: patches of each place.
        start: steps done before: a run that goes on draws new patches instead of the first again.

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
    ) -> None:
        super().__init__()
        pool.check_size(size)
        self.start = start
        self.pool, self.size, self.batch_size = pool, size, batch_size
        self.seed, self.views = seed, views

    def __iter__(self) -> Iterator[Tensor]:
        worker = torch.utils.data.get_worker_info()
        stream = [self.seed, worker.id if worker else 0, *([self.start] if self.start else [])]
        rng = np.random.default_rng(stream)
        while True:
            yield self._one_view(rng) if self.views == 1 else self._several_views(rng)

    def _one_view(self, rng: np.random.Generator) -> Tensor:
        return to_float(np.stack([self.pool.patch(rng, self.size) for _ in range(self.batch_size)]))

    def _several_views(self, rng: np.random.Generator) -> Tensor:
        """Views of one place are shifted by up to a quarter of their side."""
        margin, jitter = self.size // 4, self.pool.recipe.stain_jitter
        patches = []
        for _ in range(self.batch_size):
            image, y, x = self.pool.position(rng, self.size)
            height, width = image.pixels.shape[:2]
            for _ in range(self.views):
                vy = int(np.clip(y + rng.integers(-margin, margin + 1), 0, height - self.size))
                vx = int(np.clip(x + rng.integers(-margin, margin + 1), 0, width - self.size))
                if not image.allows(vy, vx, self.size):
                    vy, vx = y, x
                view = image.pixels[vy : vy + self.size, vx : vx + self.size]
                patches.append(augment(view, rng, jitter))
        return to_float(np.stack(patches)).unflatten(0, (self.batch_size, self.views))
