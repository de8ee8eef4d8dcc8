# SPDX-License-Identifier: Apache-2.0
"""Patches to embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ssldiff_fast.encoders.spec import EncoderSpec


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values in half precision, in the order of the names.

    Half precision is what the bundled weights are stored in, so that the hash is the same before
    and after a model is saved.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu()
        if value.is_floating_point():
            value = value.half()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_network(spec: EncoderSpec) -> nn.Module:
    """The timm network of a spec, with initial weights.

    Raises:
        ValueError: timm has no such network, or its features are not `spec.width` wide.
    """
    import timm

    if not timm.is_model(spec.network):
        raise ValueError(
            f"encoder '{spec.name}' wants the network '{spec.network}', which timm "
            f"{timm.__version__} does not have; install a newer timm"
        )
    network = timm.create_model(
        spec.network, pretrained=False, num_classes=spec.width if spec.head else 0
    )
    if not spec.head and network.num_features != spec.width:
        raise ValueError(
            f"encoder '{spec.name}' says width {spec.width}, but the features of "
            f"'{spec.network}' are {network.num_features} wide"
        )
    return network


class Encoder:
    """An encoder with its weights and preprocessing.

    Args:
        spec: which network, and how patches are prepared for it.
        weights: the network's state dict; None for random weights (controls and tests).

    Raises:
        ValueError: the weights do not fit the network, or are not those whose hash the spec names.
    """

    def __init__(self, spec: EncoderSpec, weights: Mapping[str, Tensor] | None = None) -> None:
        self.network = build_network(spec)
        if weights is not None:
            found = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
            try:
                self.network.load_state_dict(found)
            except RuntimeError as error:
                problem = str(error).splitlines()[1].strip()
                raise ValueError(
                    f"the weights do not fit the encoder '{spec.name}': {problem[:200]}"
                ) from None
        digest = weights_hash(self.network.state_dict())
        if spec.weights_hash not in (None, digest):
            has = "other weights" if weights is not None else "no weights"
            raise ValueError(
                f"encoder '{spec.name}' names weights with the hash {spec.weights_hash}, but there "
                f"are {has}; its embeddings would mean nothing to the model, so get the model "
                "with its own encoder"
            )
        self.spec = replace(spec, weights_hash=digest)
        self.network.eval().requires_grad_(False)
        self._mean = torch.tensor(spec.mean).view(3, 1, 1)
        self._std = torch.tensor(spec.std).view(3, 1, 1)

    def to(self, device: str | torch.device) -> Encoder:
        """Move the network to a device; returns itself."""
        self.network.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @torch.inference_mode()
    def __call__(
        self,
        patches: Tensor | np.ndarray,  # [N, S, S, 3] uint8 | [N, 3, S, S] float in [0, 1]
    ) -> Tensor:  # [N, T, D] fp32 on the CPU
        """Embeddings of patches of `spec.patch_px` pixels at `spec.mpp`.

        Raises:
            ValueError: another shape than the two above.
        """
        x = torch.as_tensor(patches).to(self._mean.device)
        if x.dtype == torch.uint8 and x.ndim == 4 and x.shape[-1] == 3:
            x = x.permute(0, 3, 1, 2).float() / 255
        side = self.spec.patch_px
        if x.ndim != 4 or x.shape[1:] != (3, side, side) or not x.is_floating_point():
            raise ValueError(
                f"Encoder '{self.spec.name}': patches are {list(x.shape)} {x.dtype}; expected "
                f"uint8 [N, {side}, {side}, 3] or floats in [0, 1] [N, 3, {side}, {side}]"
            )
        if x.shape[0] == 0:
            return torch.zeros(0, self.spec.tokens, self.spec.width)
        features = self.network((x.float() - self._mean) / self._std)
        return features.float().view(len(x), self.spec.tokens, -1).cpu()
