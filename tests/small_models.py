# SPDX-License-Identifier: Apache-2.0
"""A whole small model, and checkpoints and run folders as training programs write them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from golden_inputs import fill
from ssldiff_fast.models import LatentDiffusion

UNET: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 1,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 16,
}
VAE: dict[str, Any] = {
    "embed_dim": 3,
    "n_embed": 16,
    "ddconfig": {
        "double_z": False,
        "z_channels": 3,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}
CONFIG: dict[str, Any] = {
    "name": "small",
    "unet": UNET,
    "vae": {"type": "vq", **VAE},
    "conditioner": {"type": "patch", "width": 12, "context_dim": 16},
    "schedule": {"betas": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    "window": [8, 8],
}
# As the configurations in the published repository, training settings included.
RUN: dict[str, Any] = {
    "model": {
        "base_learning_rate": 1e-4,
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.0015,
            "linear_end": 0.0195,
            "timesteps": 1000,
            "first_stage_key": "image",
            "cond_stage_key": "hybrid",
            "image_size": 8,
            "channels": 3,
            "conditioning_key": "crossattn",
            "use_ema": False,
            "scheduler_config": {"target": "ldm.lr_scheduler.LambdaLinearScheduler"},
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "use_checkpoint": True,
                    "use_fp16": True,
                    "ckpt_path": "/somewhere/unet.ckpt",
                    **UNET,
                },
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.VQModelInterface",
                "params": {
                    "ckpt_path": "vq/model.ckpt",
                    "lossconfig": {"target": "torch.nn.Identity"},
                    **VAE,
                },
            },
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.PatchEmbedder",
                "params": {"patch_embed_dim": 12, "target_dim": 16, "normalize_ssl": True},
            },
        },
    },
    "data": {"target": "main.DataModuleFromConfig"},
}


def small_model(**changes: Any) -> LatentDiffusion:
    """A model filled with weights that depend on their names."""
    model = LatentDiffusion.from_config({**CONFIG, **changes})
    fill(model.unet, "model.diffusion_model.")
    fill(model.vae, "first_stage_model.")
    if model.conditioner is not None:
        fill(model.conditioner, "cond_stage_model.")
    return model.eval()


def full_state(model: LatentDiffusion, *, ema: bool = False) -> dict[str, Tensor]:
    """A state dict as CompVis training has it; averaged weights are half the others."""
    state = model.published_state_dict()
    abar = model.schedule.alphas_cumprod
    state["betas"] = (1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])).float()
    state["alphas_cumprod"] = abar.float()
    state["posterior_variance"] = torch.zeros(len(abar))
    state["logvar"] = torch.zeros(len(abar))
    if ema:
        prefix = "model.diffusion_model."
        for name, value in list(state.items()):
            if name.startswith(prefix):
                bare = name.removeprefix("model.").replace(".", "")
                state[f"model_ema.{bare}"] = value / 2
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int)
    return state


def stub_class(monkeypatch: pytest.MonkeyPatch, path: str, *bases: type) -> type:
    """A class that pickles under `path`, whether or not that library is installed."""
    module, name = path.rsplit(".", 1)
    parents = [module[:end] for end, letter in enumerate(module) if letter == "."]
    for package in [*parents, module]:
        if not hasattr(sys.modules.get(package), "is_stub"):
            stub = types.ModuleType(package)
            stub.is_stub = True  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, package, stub)
    kind = type(name, bases, {"__module__": module})
    setattr(sys.modules[module], name, kind)
    return kind


def lightning_checkpoint(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor], **more: Any
) -> dict[str, Any]:
    """What Lightning 1.4 stores; it uses the class of a callback as a key."""
    callback = stub_class(
        monkeypatch, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    )
    return {
        "epoch": 3,
        "global_step": 1234,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "dirpath": "logs"}},
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.ones(3)}}}],
        "lr_schedulers": [{"base_lrs": [1e-4], "lr_lambdas": [None]}],
        **more,
    }


def write_run(folder: Path, checkpoint: object, *, run: dict[str, Any] = RUN) -> Path:
    """A run folder with its YAML and checkpoints/last.ckpt."""
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "configs" / "2023-11-01T00-00-00-lightning.yaml").write_text("lightning: {}\n")
    text = yaml.safe_dump(run)
    (folder / "configs" / "2023-11-01T00-00-00-project.yaml").write_text(text)
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """All parameters have equal names and values."""
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
