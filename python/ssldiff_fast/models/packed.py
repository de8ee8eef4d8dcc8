# SPDX-License-Identifier: Apache-2.0
"""What is made of weights before they are used: at first use, anew whenever they changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssldiff_fast import _C
from ssldiff_fast.models.products import is_eager_inference

# Columns that lie side by side in a panel.
PANEL = 32


def panels(
    weight: Tensor,  # [N, K]
) -> Tensor:  # [panels, K, PANEL]
    """The rows of a product's weight as panels of columns, the last one filled with zeros."""
    weight = F.pad(weight.detach(), (0, 0, 0, -len(weight) % PANEL))
    return weight.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def takes_panels(*tensors: Tensor | None) -> bool:
    """Whether our products serve these: plain float32 of inference on a CPU that has vectors."""
    given = [tensor for tensor in tensors if tensor is not None]
    plain = all(
        t.dtype == torch.float32 and t.is_contiguous() and type(t) in (Tensor, nn.Parameter)
        for t in given
    )
    return plain and is_eager_inference(given[0]) and _C.has_vectors()


@dataclass(frozen=True, eq=False)
class _Kept:
    made: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]  # held, so that no others take their addresses
    versions: tuple[int, ...]


class PackedWeights:
    """What was made of each module's weights, gone with the module.

    Args:
        make: of the weights given to `of`.
    """

    def __init__(self, make: Callable[..., tuple[Tensor, ...]]) -> None:
        self.make = make
        self._kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()

    def of(self, module: nn.Module, *weights: Tensor) -> tuple[Tensor, ...]:
        """What `make` makes of a module's weights, as they are now.

        (Changes through `.data` of a parameter are seen by nobody.)
        """
        versions = tuple(-1 if w.is_inference() else w._version for w in weights)
        kept = self._kept.get(module)
        if kept is not None and kept.versions == versions:
            pairs = zip(kept.sources, weights, strict=True)
            if all(old.data_ptr() == new.data_ptr() for old, new in pairs):
                return kept.made
        sources = tuple(weight.detach() for weight in weights)
        kept = self._kept[module] = _Kept(self.make(*weights), sources, versions)
        return kept.made

    def forget(self, module: nn.Module) -> None:
        """Free what a module's weights were made into, and them if they have moved."""
        self._kept.pop(module, None)
