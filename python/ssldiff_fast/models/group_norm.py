# SPDX-License-Identifier: Apache-2.0
"""The GroupNorm of all networks here, with what surrounds it."""

from __future__ import annotations

from torch import Tensor, nn

from ssldiff_fast.ops import GroupNormStatistics, group_norm_silu

# GroupNorm has this many groups in all published networks.
GROUPS = 32


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm of 32 groups, then SiLU unless `silu` is false; parameters as torch's GroupNorm.

    Args:
        channels: a multiple of 32.
        eps: added to the variance; 1e-5 in the U-Net's blocks, 1e-6 elsewhere.
        silu: whether SiLU follows.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, silu: bool = True) -> None:
        super().__init__(GROUPS, channels, eps=eps)
        self.silu = silu

    def forward(
        self,
        x: Tensor,  # [B, C, ...]
        *,
        add: Tensor | None = None,  # [B, C]
        scale: Tensor | None = None,  # [B, C]
        shift: Tensor | None = None,  # [B, C]
        statistics: GroupNormStatistics | None = None,
    ) -> Tensor:  # like x
        """`silu(norm(x + add) (1 + scale) + shift)`, see `ops.group_norm_silu`."""
        return group_norm_silu(
            x,
            self.num_groups,
            weight=self.weight,
            bias=self.bias,
            add=add,
            scale=scale,
            shift=shift,
            statistics=statistics,
            eps=self.eps,
            silu=self.silu,
        )
