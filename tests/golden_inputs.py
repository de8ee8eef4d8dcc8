# SPDX-License-Identifier: Apache-2.0
"""Weights, inputs and outputs of the published implementation, for the golden tests.

Weights and inputs are made from their names (`fill`, `golden_input`); what the published code
computed from them is stored in `tests/golden/reference_outputs.safetensors`.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"

UNET_A = {
    "image_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [4, 2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2, 2],
    "num_heads": 1,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 64,
}
UNET_B = {**UNET_A, "num_heads": 4}
VQ_SMALL = {
    "embed_dim": 3,
    "n_embed": 256,
    "ddconfig": {
        "double_z": False,
        "z_channels": 3,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}


def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def golden_input(name: str, *shape: int) -> Tensor:
    """The input called `name`."""
    return _draw(name, shape)


def golden_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The parameter called `name`."""
    draw = _draw(name, shape)
    if len(shape) > 1:
        return draw / np.float32(np.sqrt(np.prod(shape[1:])))
    return 0.02 * draw if name.endswith("bias") else 1 + 0.1 * draw


def fill(module: nn.Module, prefix: str = "") -> nn.Module:
    """Set every parameter of `module` by its name, with `prefix` before it; eval mode."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(golden_weight(prefix + name, tuple(parameter.shape)))
    return module.eval()


def fill_whole_model(unet: nn.Module, vae: nn.Module, conditioner: nn.Module) -> None:
    """The weights of the `panorama.*` and `decode.*` entries."""
    fill(unet, "model.diffusion_model.")
    fill(vae, "first_stage_model.")
    fill(conditioner, "cond_stage_model.")
    with torch.no_grad():
        dict(unet.named_parameters())["out.2.weight"].mul_(0.05)


def golden_output(name: str) -> Tensor:
    """What the published implementation computed."""
    return load_file(GOLDEN / "reference_outputs.safetensors")[name]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def published_shapes(file: str, section: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the part of a key list whose heading starts with `section`."""
    shapes: dict[str, tuple[int, ...]] = {}
    inside = False
    for line in (GOLDEN / file).read_text().splitlines():
        if line.startswith("###"):
            inside = line.removeprefix("###").strip().startswith(section)
        elif inside and line and not line.startswith("#"):
            name, shape, *_ = line.split("\t")
            shapes[name] = tuple(int(number) for number in re.findall(r"\d+", shape))
    return shapes
