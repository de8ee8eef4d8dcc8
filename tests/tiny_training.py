# SPDX-License-Identifier: Apache-2.0
"""Images, recipes and runs small enough for tests: four steps of the smallest networks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

PATCH_PX = 32
FIT: dict[str, Any] = {
    "steps": 4,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "precision": "32-true",
    "save_every_steps": 2,
}
DATA: dict[str, Any] = {
    "mpp": 0.5,
    "scales": [1.0, 1.25],
    "stain_jitter": 0.05,
    "sources": [{"files": "images/*.png", "mpp": 0.5}],
}
VAE: dict[str, Any] = {
    "data": "data.yaml",
    "crop_px": 16,
    "ddconfig": {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 3},
    "n_embed": 16,
    "embed_dim": 3,
    "unquantised_steps": 2,
    "latent_noise": 0.05,
    "fit": FIT,
}
ENCODER: dict[str, Any] = {
    "data": "data.yaml",
    "name": "tiny-encoder",
    "network": "test_resnet",
    "width": 12,
    "patch_px": PATCH_PX,
    "projection": 8,
    "mean": [0.7, 0.5, 0.7],
    "std": [0.2, 0.25, 0.2],
    "fit": FIT,
}
LDM: dict[str, Any] = {
    "data": "data.yaml",
    "name": "tiny",
    "window": [8, 8],
    "patches": 6,
    "prediction": "v",
    "schedule": {"betas": "scaled_linear", "zero_terminal_snr": True},
    "unet": {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [1],
        "channel_mult": [1],
        "num_heads": 1,
        "use_spatial_transformer": True,
        "context_dim": 16,
    },
    "fit": FIT,
}
RECIPES = {"data": DATA, "vae": VAE, "encoder": ENCODER, "ldm": LDM}


def changed(recipe: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """A recipe with other entries; `fit__steps=9` changes one within `fit`."""
    result = copy.deepcopy(recipe)
    for name, value in entries.items():
        *outer, last = name.split("__")
        section = result
        for part in outer:
            section = section[part]
        section[last] = value
    return result


def write_image(path: Path, size: int = 80, *, seed: int = 0, colour: int | None = None) -> None:
    """Coloured noise, or one even colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(60, 230, (size, size, 3), np.uint8)
    if colour is not None:
        pixels[:] = colour
    Image.fromarray(pixels).save(path)


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


@dataclass(frozen=True)
class Workshop:
    """A folder with images and the four recipes, and where runs go."""

    root: Path

    def recipe(self, kind: str, **changes: Any) -> Path:
        """The recipe of a kind, or a changed one beside it."""
        path = self.root / f"{kind}.yaml"
        if changes:
            path = self.root / f"{kind}-changed.yaml"
            write_recipe(path, changed(RECIPES[kind], **changes))
        return path

    def run(self, kind: str) -> Path:
        return self.root / "runs" / kind

    @property
    def parts(self) -> dict[str, Path]:
        """What `train_ldm` and `load_ldm` want to know of the other two runs."""
        return {
            "vae_recipe": self.recipe("vae"),
            "vae_folder": self.run("vae"),
            "encoder_recipe": self.recipe("encoder"),
            "encoder_folder": self.run("encoder"),
        }


def make_workshop(root: Path) -> Workshop:
    for index in range(2):
        write_image(root / "images" / f"{index}.png", seed=index)
    for kind, recipe in RECIPES.items():
        write_recipe(root / f"{kind}.yaml", recipe)
    return Workshop(root)


def trained_workshop(root: Path) -> Workshop:
    """A workshop where all three runs are done."""
    from ssldiff_fast.training.encoder import train_encoder
    from ssldiff_fast.training.ldm import train_ldm
    from ssldiff_fast.training.vae import train_vae

    shop = make_workshop(root)
    train_vae(shop.recipe("vae"), root, shop.run("vae"), progress=False)
    train_encoder(shop.recipe("encoder"), root, shop.run("encoder"), progress=False)
    train_ldm(shop.recipe("ldm"), root, shop.run("ldm"), **shop.parts, progress=False)
    return shop
