# SPDX-License-Identifier: Apache-2.0
"""Statistics of an autoencoder's norms over all that it is trained on, and the autoencoder that
uses them in place of each image's own.

A decoder of large canvases cannot have each patch's own statistics (`models.local_autoencoder`);
one that was trained with both kinds gives the same pixels either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssldiff_fast.models.group_norm import GROUPS, GroupNormSiLU
from ssldiff_fast.models.local_autoencoder import (
    FixedGroupNorm,
    local_autoencoder,
    norm_names,
)
from ssldiff_fast.ops import GroupNormStatistics, group_norm_statistics

_DECAY = 0.98  # of the moving average over steps
_WHOLE = (1 << 30, 1 << 30)  # windows that hold any patch: attention stays as it is


class PopulationStatistics(nn.Module):
    """A moving average over steps of the statistics of a network's norms, each over a whole batch.

    Both are mixtures, so that variances follow the law of total variance: with shares s_k,

        mean = sum_k s_k mean_k,   variance = sum_k s_k (variance_k + (mean_k - mean)^2)

    Args:
        network: the autoencoder.
        prefix: which of its norms: those whose names begin so.
    """

    mean: Tensor  # [norms, G]
    variance: Tensor  # [norms, G]
    updates: Tensor  # []

    def __init__(self, network: nn.Module, prefix: str = "decoder.") -> None:
        super().__init__()
        self.names = norm_names(network, prefix)
        self.register_buffer("mean", torch.zeros(len(self.names), GROUPS))
        self.register_buffer("variance", torch.ones(len(self.names), GROUPS))
        self.register_buffer("updates", torch.zeros(()))
        # In lists, so that neither is saved or trained a second time.
        modules = dict(network.named_modules())
        self._norms = [modules[name] for name in self.names]
        fixed = local_autoencoder(network, self.by_name(), _WHOLE)
        self._fixed: tuple[Any, list[FixedGroupNorm]] = (
            fixed,
            [m for m in fixed.modules() if isinstance(m, FixedGroupNorm)],
        )

    def by_name(self) -> dict[str, GroupNormStatistics]:
        """The statistics as `local_autoencoder` takes them."""
        rows = zip(self.names, self.mean.split(1), self.variance.split(1))
        return {
            name: GroupNormStatistics.from_variance(mean, variance) for name, mean, variance in rows
        }

    @torch.no_grad()
    def take(self, statistics: Mapping[str, GroupNormStatistics]) -> None:
        """Go on from statistics measured before; where some are missing, from none."""
        if not set(self.names) <= set(statistics):
            return
        given = [statistics[name] for name in self.names]
        self.mean.copy_(torch.cat([part.mean for part in given]))
        self.variance.copy_(torch.cat([part.variance for part in given]))
        self.updates.fill_(1 / (1 - _DECAY))  # as many as the average remembers

    @contextmanager
    def watch(self) -> Iterator[None]:
        """What the network's norms see meanwhile, in one call of each, is averaged in."""
        seen: dict[nn.Module, GroupNormStatistics] = {}

        def note(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(norm, GroupNormSiLU)
            seen[norm] = group_norm_statistics(arguments[0], norm.num_groups)

        handles = [norm.register_forward_pre_hook(note) for norm in self._norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._average_in([seen[norm] for norm in self._norms])

    @torch.no_grad()
    def _average_in(self, seen: list[GroupNormStatistics]) -> None:
        means = torch.stack([given.mean for given in seen])  # [norms, B, G]
        variances = torch.stack([given.variance for given in seen])
        mean = means.mean(1)
        variance = variances.mean(1) + (means - mean[:, None]).square().mean(1)
        share = (1 / (self.updates + 1)).clamp(min=1 - _DECAY)
        apart = (mean - self.mean).square()
        self.variance.lerp_(variance, share).add_(share * (1 - share) * apart)
        self.mean.lerp_(mean, share)
        self.updates.add_(1)

    def fixed(self) -> Any:
        """The network with these statistics in place of its own: the same parameters."""
        network, norms = self._fixed
        for norm, given in zip(norms, self.by_name().values()):
            norm.statistics = given
        return network
