# SPDX-License-Identifier: Apache-2.0
"""`optimize`: faster layers put into a network that is there already, with the same results."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ssldiff_fast import _C
from ssldiff_fast.models.attention import BasicTransformerBlock
from ssldiff_fast.models.compvis_unet import is_compvis_shaped, turn_into_ours
from ssldiff_fast.models.feed_forward import GEGLU
from ssldiff_fast.models.fused_unet import why_not
from ssldiff_fast.models.group_norm import GroupNormSiLU
from ssldiff_fast.models.products import has_onednn, linear
from ssldiff_fast.models.unet import UNet
from ssldiff_fast.models.winograd import Conv3x3, serves
from ssldiff_fast.ops import group_norm_silu

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


class Product(nn.Linear):
    """A linear layer whose inference on a CPU goes to oneDNN; parameters as torch's."""

    def forward(
        self,
        x: Tensor,  # [..., K]
    ) -> Tensor:  # [..., N]
        """`x weight' + bias`."""
        return linear(x, self.weight, self.bias)


class Norm(nn.GroupNorm):
    """A GroupNorm by `group_norm_silu`: of channels-last maps torch's own takes nine times as long
    in bfloat16 as of contiguous ones; parameters as torch's."""

    def forward(
        self,
        x: Tensor,  # [B, C, ...]
    ) -> Tensor:  # like x
        """The norm alone."""
        groups, weight, bias = self.num_groups, self.weight, self.bias
        return group_norm_silu(x, groups, weight=weight, bias=bias, eps=self.eps, silu=False)


class OneTokenProcessor:
    """diffusers' attention where there is one token: the softmax over one key is 1.

    So the query, its norm and the key have no influence (design section 3); everything else goes
    to the processor that was there.
    """

    def __init__(self, inner: Callable[..., Tensor]) -> None:
        self.inner = inner

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [B, L, C]
        encoder_hidden_states: Tensor | None = None,  # [B, T, D]
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **options: Any,
    ) -> Tensor:  # [B, L, C]
        """The attention's output for its input."""
        one = encoder_hidden_states is not None and encoder_hidden_states.shape[1] == 1
        if not one or attention_mask is not None or hidden_states.ndim != 3 or not _is_plain(attn):
            return self.inner(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                temb=temb,
                **options,
            )
        out = attn.to_v(encoder_hidden_states)
        for layer in attn.to_out:
            out = layer(out)
        out = out.expand_as(hidden_states)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def optimize(network: Network) -> Network:
    """Put faster layers of the same result into a network, in place, and say which.

    `UNet` has them already. A U-Net of the CompVis code becomes one (a `CompVisUNet`, of the same
    parameters and call), if a trial shows that both compute the same. diffusers'
    UNet2DConditionModel, and any other network, gets them as far as its layers are of a known kind:
    channels-last weights; 3x3 convolutions, products, norms and gates of inference on a CPU by
    `Conv3x3`, oneDNN, `group_norm_silu` and `geglu`; attention to a single token of diffusers'
    blocks without queries and keys. Names, shapes and values of all parameters stay.

    A network whose layers are of no known kind is left as it is, and the log says so.

    Args:
        network: in the dtype and on the device where it is to run.

    Returns:
        The same network.

    Raises:
        TypeError: no module.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"optimize: network is a {type(network).__name__}, but a torch.nn.Module was expected; "
            "give the U-Net itself (pipeline.unet, model.unet)."
        )
    name = type(network).__name__
    if is_compvis_shaped(network) and not isinstance(network, UNet):
        reason = turn_into_ours(network)
        if reason is not None:
            logger.info("optimize: %s keeps its blocks: %s", name, reason)
    layout = _channels_last(network)
    applied = _own(network) if isinstance(network, UNet) else _replaced(network)
    if layout or applied:
        logger.info("optimize: %s: %s", name, ", ".join([*layout, *applied]))
    else:
        logger.warning("optimize: %s is used as it is: none of its layers is of a known kind", name)
    return network


def _channels_last(network: nn.Module) -> list[str]:
    count = _count(network, nn.Conv2d)
    if count:
        network.to(memory_format=torch.channels_last)
    return [f"{count} convolutions channels-last"] if count else []


def _own(unet: UNet) -> list[str]:
    """What our U-Net does by itself in inference, in its dtype and where it is."""
    parameter = next(unet.parameters())
    blocks = _count(unet, BasicTransformerBlock)
    applied = [f"{_count(unet, GroupNormSiLU)} norms and SiLU by group_norm_silu"]
    if blocks:
        applied += [
            "shared guidance prefix",
            f"{blocks} attentions to few tokens by token_attention",
            f"{blocks} self-attentions with one product for q, k and v",
        ]
    if parameter.device.type == "cuda" and why_not(unet) is None:
        applied.append("when it samples fused maps and CUDA graphs")
    if parameter.device.type == "cpu":
        if parameter.dtype == torch.float32:
            applied += ["products by oneDNN"] if has_onednn() else []
            fused = blocks and _C.has_vectors()
            applied += [f"{blocks} feed-forwards in one pass"] if fused else []
        elif blocks and parameter.dtype in (torch.bfloat16, torch.float16):
            applied.append(f"{blocks} gates in one pass")
        served = sum(isinstance(m, Conv3x3) and serves(m) for m in unet.modules())
        applied += [f"{served} convolutions by Winograd"] if served else []
    return applied


def _replaced(network: nn.Module) -> list[str]:
    """Change the classes of layers whose subclass here takes the same parameters."""
    products = convolutions = gates = norms = 0
    if next(network.parameters(), torch.empty(0)).device.type == "cpu" and _C.CPU_PROBLEM is None:
        for module in network.modules():
            if type(module) is nn.Linear and _takes_onednn(module):
                module.__class__ = Product
            elif type(module) is nn.Conv2d and _is_3x3(module) and serves(module):
                module.__class__ = Conv3x3
            elif type(module) is nn.GroupNorm and module.affine:
                module.__class__ = Norm
            elif _is_diffusers_geglu(module):
                module.__class__ = GEGLU
        products, gates = _count(network, Product), _count(network, GEGLU)
        convolutions, norms = _count(network, Conv3x3), _count(network, Norm)
    applied = [f"{products} products by oneDNN"] if products else []
    applied += [f"{convolutions} convolutions by Winograd"] if convolutions else []
    applied += [f"{norms} norms by group_norm_silu"] if norms else []
    applied += [f"{gates} gates in one pass"] if gates else []
    processors = getattr(network, "attn_processors", None)
    put_back: Any = getattr(network, "set_attn_processor", None)
    if isinstance(processors, dict) and put_back is not None:
        found = {
            name: processor
            if isinstance(processor, OneTokenProcessor) or ".attn2." not in name
            else OneTokenProcessor(processor)
            for name, processor in processors.items()
        }
        put_back(dict(found))  # it empties what it is given
        count = sum(isinstance(processor, OneTokenProcessor) for processor in found.values())
        applied += [f"{count} attentions that skip queries and keys of one token"] if count else []
    return applied


def _count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


def _takes_onednn(layer: nn.Linear) -> bool:
    """Whether PyTorch would send a product elsewhere, which it does in float32 alone."""
    return layer.weight.dtype == torch.float32 and has_onednn()


def _is_diffusers_geglu(module: Any) -> bool:
    """Whether a module is diffusers' gated GELU, which is computed as ours is."""
    kind = type(module)
    named = kind.__name__ == "GEGLU" and kind.__module__.startswith("diffusers.")
    return named and isinstance(getattr(module, "proj", None), nn.Linear)


def _is_3x3(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def _is_plain(attn: Any) -> bool:
    """Whether a diffusers Attention is projections and softmax alone."""
    extras = ("spatial_norm", "group_norm", "norm_cross", "add_k_proj", "norm_q", "norm_k")
    return all(not getattr(attn, name, None) for name in extras)
