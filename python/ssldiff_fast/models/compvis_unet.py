# SPDX-License-Identifier: Apache-2.0
"""A U-Net of the CompVis code that is there already, turned into one of ours with its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssldiff_fast.models.unet import UNet

_PARTS = ("time_embed", "input_blocks", "middle_block", "output_blocks", "out")
# Attributes of CompVis' UNetModel that are keywords of it; the rest is read off its layers.
_KEYWORDS = (
    "image_size",
    "num_res_blocks",
    "attention_resolutions",
    "channel_mult",
    "conv_resample",
    "dropout",
    "num_heads",
    "num_head_channels",
    "num_heads_upsample",
    "use_checkpoint",
)
# Of the output, by which the two may differ: Winograd and another order of sums.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


class CompVisUNet(UNet):
    """`UNet` with the call of CompVis' `UNetModel`."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, C, h, w]
        timesteps: Tensor,  # [B]
        context: Tensor | None = None,  # [B or 2 B, T, D]
        y: None = None,
    ) -> Tensor:  # [B or 2 B, out_channels, h, w]
        """As `UNet`.

        Raises:
            ValueError: `y` is given: the network takes no classes.
        """
        if y is not None:
            raise ValueError("UNet: y is given, but the network takes no classes; leave it out.")
        return super().forward(x, timesteps, context)


def is_compvis_shaped(network: nn.Module) -> bool:
    """Whether a network has the parts of CompVis' `UNetModel`."""
    return all(isinstance(getattr(network, part, None), nn.Module) for part in _PARTS)


def turn_into_ours(network: nn.Module) -> str | None:
    """Make a CompVis-shaped network a `CompVisUNet` of its own parameters, in place.

    Only where both compute the same, which is tried with a few small windows.

    Returns:
        None, or a clause that says why it stays as it was.
    """
    if any(m._forward_hooks or m._forward_pre_hooks for m in network.modules()):
        return "it has hooks"
    try:
        with torch.device("meta"):
            ours = CompVisUNet(**_keywords(network))
    except Exception as error:  # whatever a network of a similar shape lacks
        return f"its settings are not CompVis' ({error})"
    given = dict(network.named_parameters())
    shapes = {name: p.shape for name, p in given.items()}
    if shapes != {name: p.shape for name, p in ours.named_parameters()}:
        return "its parameters are not CompVis'"
    for name, parameter in given.items():
        module, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(module), leaf, parameter)
    is_training = network.training
    try:
        same = _agree(network.eval(), ours.eval())
    except Exception as error:  # the network's own, or a call of another signature
        return f"it could not be compared ({error})"
    finally:
        network.train(is_training)
    if not same:
        return "it computes something else"
    ours.train(is_training)
    kept = {name: value for name, value in vars(network).items() if name not in vars(ours)}
    network.__class__ = CompVisUNet
    network.__dict__ = {**kept, **vars(ours)}
    return None


def _keywords(network: Any) -> dict[str, Any]:
    found = {name: getattr(network, name) for name in _KEYWORDS if hasattr(network, name)}
    found["in_channels"] = network.input_blocks[0][0].in_channels
    found["model_channels"] = network.input_blocks[0][0].out_channels
    found["out_channels"] = network.out[-1].out_channels
    for module in network.modules():
        if getattr(module, "use_scale_shift_norm", False):
            found["use_scale_shift_norm"] = True
        if hasattr(module, "transformer_blocks"):
            found["use_spatial_transformer"] = True
            found["transformer_depth"] = len(module.transformer_blocks)
            found["context_dim"] = module.transformer_blocks[0].attn2.to_k.in_features
    return found


@torch.no_grad()
def _agree(network: nn.Module, ours: UNet) -> bool:
    """Whether both give the same output, but for rounding, for two windows of noise."""
    parameter = next(ours.parameters())
    side = 4 * 2 ** (len(ours.config.channel_mult) - 1)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(parameter)

    x, t = noise(2, ours.in_channels, side, side), torch.tensor([17, 803], device=parameter.device)
    width = ours.context_dim
    context = () if width is None else (noise(2, 2, width),)
    expected, out = network(x, t, *context).float(), ours(x, t, *context).float()
    tolerance = _TOLERANCE.get(parameter.dtype, _HALF_TOLERANCE)
    return bool((out - expected).norm() <= tolerance * expected.norm())
