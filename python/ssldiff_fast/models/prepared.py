# SPDX-License-Identifier: Apache-2.0
"""What a U-Net needs of its conditioning tokens, whatever the timestep: made once, used often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenVectors:
    """What one cross-attention needs of the tokens of N windows.

    Either the vectors of `token_attention` (values [N, C] for one token; values and keys
    [N, heads * T, C] and offsets [N, heads * T] for a few), or, without offsets, the projected
    keys and values [N, T, heads * head_width] of ordinary attention.
    """

    values: Tensor
    keys: Tensor | None = None
    offsets: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [v for v in (self.values, self.keys, self.offsets) if v is not None]


@dataclass(frozen=True, eq=False)
class TimeVectors:
    """What each residual block adds (or scales and shifts by) at S timesteps.

    Args:
        blocks: [S, C] of each block, in the order in which they run; S is 1 where all windows are
            at the same timestep.
    """

    blocks: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.blocks[0])

    def of(
        self,
        block: int,
        windows: int,
    ) -> Tensor:  # [windows, C]
        """A block's vectors; those of a guided pair are its windows' twice."""
        vectors = self.blocks[block]
        if len(vectors) == 1:
            return vectors.expand(windows, -1)
        return vectors if len(vectors) == windows else vectors.repeat(windows // len(vectors), 1)


@dataclass(frozen=True, eq=False)
class PreparedContext:
    """The vectors of every transformer block for N windows, in the order in which they run.

    Args:
        blocks: the vectors.
        packed: [N, sum of the widths], where the blocks' values are its columns one after another
            and nothing else: windows are then chosen and copied all at once.
    """

    blocks: tuple[TokenVectors, ...]
    packed: Tensor | None = None

    @classmethod
    def of_one_token(cls, packed: Tensor, widths: Sequence[int]) -> PreparedContext:
        """The context whose blocks' values, of one token, are columns of `packed`."""
        columns = packed.split(list(widths), dim=1)
        return cls(tuple(TokenVectors(values) for values in columns), packed)

    def _repacked(self, packed: Tensor) -> PreparedContext:
        return self.of_one_token(packed, [block.values.shape[1] for block in self.blocks])

    def __len__(self) -> int:
        return len(self.blocks[0].values)

    @property
    def nbytes(self) -> int:
        """Memory of all vectors."""
        return sum(tensor.nbytes for block in self.blocks for tensor in block.tensors())

    def map(self, change: Callable[[Tensor], Tensor]) -> PreparedContext:
        """The same with every tensor changed."""
        if self.packed is not None:
            return self._repacked(change(self.packed))
        return PreparedContext(
            tuple(TokenVectors(*(change(t) for t in block.tensors())) for block in self.blocks)
        )

    def __getitem__(self, index: Tensor | slice) -> PreparedContext:
        """Some of the windows: `index` is [B] int64 or a slice."""
        return self.map(lambda tensor: tensor[index])

    def followed_by(self, one: PreparedContext) -> PreparedContext:
        """These windows, then as many of another context that holds a single one."""
        if self.packed is not None and one.packed is not None:
            return self._repacked(torch.cat((self.packed, one.packed.expand_as(self.packed))))
        pairs = zip(self.blocks, one.blocks, strict=True)
        return PreparedContext(
            tuple(
                TokenVectors(
                    *(
                        torch.cat((tensor, other.expand_as(tensor)))
                        for tensor, other in zip(many.tensors(), single.tensors(), strict=True)
                    )
                )
                for many, single in pairs
            )
        )
