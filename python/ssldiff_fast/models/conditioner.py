# SPDX-License-Identifier: Apache-2.0
"""The published conditioners: embeddings of a grid to tokens for cross-attention.

Each embedding is L2-normalised here, after interpolation; the zero vector stays zero, and the
conditioner applied to zeros is the unconditional token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast.models.products import linear

# What makes the unconditional token, said in configurations for their readers.
_NULL = "zeros"


class PatchConditioner(nn.Module):
    """One linear map of each (normalised) patch embedding: CompVis-style `PatchEmbedder`.

    Args:
        width: width D of an embedding.
        context_dim: width of a token, the U-Net's `context_dim`.
        normalize: L2-normalise embeddings first (`normalize_ssl` of the published configurations).
    """

    tokens = 1

    def __init__(self, width: int, context_dim: int, *, normalize: bool = True) -> None:
        super().__init__()
        _check_sizes("PatchConditioner", width=width, context_dim=context_dim)
        self.width = width
        self.context_dim = context_dim
        self.normalize = normalize
        self.patch_fc = nn.Linear(width, context_dim)

    def config(self) -> dict[str, Any]:
        """What `build_conditioner` takes to make this conditioner again."""
        return {
            "type": "patch",
            "width": self.width,
            "context_dim": self.context_dim,
            "normalize": self.normalize,
            "null": _NULL,
        }

    def null(self, count: int = 1) -> Tensor:  # [count, 1, context_dim]
        """The unconditional tokens of `count` windows."""
        return self(torch.zeros(count, 1, self.width, device=self.patch_fc.weight.device))

    def forward(
        self,
        embeddings: Tensor,  # [N, T, D] any float
    ) -> Tensor:  # [N, T, context_dim], dtype of the weights
        """Tokens of embeddings.

        Raises:
            ValueError: the shape is not [N, T, D].
        """
        if embeddings.ndim != 3 or embeddings.shape[2] != self.width:
            raise ValueError(
                f"PatchConditioner: embeddings has shape {list(embeddings.shape)}, expected "
                f"[N, T, {self.width}]; use the encoder that the model was trained with."
            )
        return _project(self.patch_fc, embeddings, normalize=self.normalize)


class PatchRegionConditioner(nn.Module):
    """Two tokens, of a patch and of the region around it: the published BRCA 20x model.

    Args:
        width, region_width: widths of the patch's and of the region's embedding.
        context_dim: width of a token, the U-Net's `context_dim`.
        normalize: L2-normalise embeddings first (`normalize_ssl` of the published configurations).
    """

    tokens = 2

    def __init__(
        self, width: int, region_width: int, context_dim: int, *, normalize: bool = True
    ) -> None:
        super().__init__()
        _check_sizes(
            "PatchRegionConditioner",
            width=width,
            region_width=region_width,
            context_dim=context_dim,
        )
        self.patch_width = width
        self.region_width = region_width
        self.context_dim = context_dim
        self.normalize = normalize
        self.patch_fc = nn.Linear(width, context_dim)
        self.region_fc = nn.Linear(region_width, context_dim)

    @property
    def width(self) -> int:
        """Width D of both tokens in a grid; the shorter embedding is padded with zeros."""
        return max(self.patch_width, self.region_width)

    def config(self) -> dict[str, Any]:
        """What `build_conditioner` takes to make this conditioner again."""
        return {
            "type": "patch_region",
            "width": self.patch_width,
            "region_width": self.region_width,
            "context_dim": self.context_dim,
            "normalize": self.normalize,
            "null": _NULL,
        }

    def null(self, count: int = 1) -> Tensor:  # [count, 2, context_dim]
        """The unconditional tokens of `count` windows."""
        return self(torch.zeros(count, 2, self.width, device=self.patch_fc.weight.device))

    def forward(
        self,
        embeddings: Tensor,  # [N, 2, max(D, D_region)], or [N, 1, D] without region
    ) -> Tensor:  # [N, 2, context_dim], dtype of the weights
        """Tokens of embeddings; a missing region is the zero vector, as in the published code.

        Raises:
            ValueError: the shape is neither of the two.
        """
        shape = list(embeddings.shape)
        whole = embeddings.ndim == 3 and shape[1:] == [2, self.width]
        if not whole and (embeddings.ndim != 3 or shape[1:] != [1, self.patch_width]):
            raise ValueError(
                f"PatchRegionConditioner: embeddings has shape {shape}, expected "
                f"[N, 2, {self.width}] (patch and region, the shorter padded with zeros) or "
                f"[N, 1, {self.patch_width}] (patch only)."
            )
        patch = embeddings[:, 0, : self.patch_width]
        if whole:
            region = embeddings[:, 1, : self.region_width]
        else:
            region = embeddings.new_zeros(shape[0], self.region_width)
        tokens = [
            _project(self.patch_fc, patch, normalize=self.normalize),
            _project(self.region_fc, region, normalize=self.normalize),
        ]
        return torch.stack(tokens, dim=1)


Conditioner = PatchConditioner | PatchRegionConditioner

_KINDS: dict[str, type[PatchConditioner] | type[PatchRegionConditioner]] = {
    "patch": PatchConditioner,
    "patch_region": PatchRegionConditioner,
}


def build_conditioner(config: Mapping[str, Any]) -> Conditioner:
    """Conditioner of the "conditioner" part of a configuration.

    Raises:
        ValueError: unknown type, or entries that this type does not have.
    """
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in _KINDS:
        raise ValueError(
            f"conditioner: type is {kind!r}, expected one of {', '.join(sorted(_KINDS))}."
        )
    null = options.pop("null", _NULL)
    if null != _NULL:
        raise ValueError(f"conditioner: null is {null!r}, expected {_NULL!r}.")
    try:
        return _KINDS[kind](**options)
    except TypeError as error:
        raise ValueError(
            f"conditioner: entries {sorted(options)} do not fit type {kind!r} ({error})."
        ) from None


def _check_sizes(call: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{call}: {name}={size!r}, expected a positive integer.")


def _project(layer: nn.Linear, embeddings: Tensor, *, normalize: bool) -> Tensor:
    # Normalised in float32 whatever the precision of the network: half precision would round
    # the direction, which is all that is left of the embedding.
    embeddings = embeddings.float()
    if normalize:
        embeddings = F.normalize(embeddings, dim=-1)
    return linear(embeddings.to(layer.weight.dtype), layer.weight, layer.bias)
