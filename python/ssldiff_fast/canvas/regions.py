# SPDX-License-Identifier: Apache-2.0
"""A prompt per region with soft masks (MultiDiffusion, section 4.2; paper Eq. 6 with weights).

    out(p) = sum_k w_k(p) sum_r m_r(p) D_kr(p) / sum_k w_k(p) sum_r m_r(p)

where D_kr is the model output of window k under region r's prompt. The masks do not depend on the
window, so they can be normalised once at every pixel, and blending the regions within each window
before windows are averaged is the same. So a canvas with regions is an ordinary canvas whose
window denoiser evaluates each window once for every region that touches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssldiff_fast._checks import check_finite, check_shape
from ssldiff_fast.canvas.conditioning import Cond, Conditioning, as_conditioning, one_window

if TYPE_CHECKING:
    from ssldiff_fast.canvas.denoiser import WindowDenoiser

# Windows whose masks are looked at together.
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class RegionConditioning:
    """What a `RegionField` returns: prompts of G regions, and the regions of each window.

    Args:
        prompts: conditioning of the G regions.
        masks: [G, H, W] fp32, normalised: the masks of a canvas add up to 1 at every pixel.
        origins: [N, 2] int64 of the windows.
        own: [N, G] bool, the regions of the canvas that a window lies on.
    """

    prompts: Conditioning
    masks: Tensor
    origins: Tensor
    own: Tensor

    def __len__(self) -> int:
        return len(self.origins)

    @classmethod
    def join(cls, parts: Sequence[RegionConditioning]) -> RegionConditioning:
        """The windows of several canvases, each with its own regions, as one set."""
        return cls(
            Conditioning.join([part.prompts for part in parts]),
            torch.cat([part.masks for part in parts]),
            torch.cat([part.origins for part in parts]),
            torch.block_diag(*(part.own.to(torch.uint8) for part in parts)).bool(),
        )

    def weights(
        self,
        index: Tensor,  # [B] int64
        window: tuple[int, int],
    ) -> Tensor:
        """The weights of the regions in some windows: [B, G, h, w] fp32.

        A window that runs over an end of the canvas goes on at its beginning.
        """
        height, width = self.masks.shape[1:]
        y = (self.origins[index, 0, None] + torch.arange(window[0])) % height
        x = (self.origins[index, 1, None] + torch.arange(window[1])) % width
        crops = self.masks[:, y[:, :, None], x[:, None, :]].transpose(0, 1)
        return crops * self.own[index][:, :, None, None]


class RegionField:
    """A prompt per region, each with a soft mask.

    Args:
        cond: the prompts: [R, T, D], or a `Conditioning` of R.
        masks: [R, H, W] on the canvas in latents, 0 or above, any scale: at every pixel a region's
            share is its mask over the sum of all. Every pixel must have a region; give the
            background a prompt and a mask too.
        uncond: the negative prompt, [1, T, D] or [T, D] or a `Conditioning` of one; needed for
            guidance.
    """

    def __init__(
        self,
        cond: Tensor | Conditioning,
        masks: Tensor,  # [R, H, W]
        *,
        uncond: Tensor | Conditioning | None = None,
    ) -> None:
        call = "RegionField"
        self.cond = as_conditioning(cond, call=call)
        check_shape("masks", masks, "R H W", {"R": len(self.cond)}, call=call)
        masks = masks.detach().to("cpu", torch.float32)
        check_finite("masks", masks, call=call)
        if bool((masks < 0).any()):
            raise ValueError(
                f"{call}: masks go down to {float(masks.min()):g}, but they must be 0 or above."
            )
        total = masks.sum(0)
        bare = int((total == 0).sum())
        if bare:
            y, x = (int(value) for value in torch.nonzero(total == 0)[0])
            raise ValueError(
                f"{call}: masks leave {bare} pixels without a region, first at (y, x) = "
                f"({y}, {x}); add a background prompt whose mask covers them."
            )
        self.masks = masks / total
        self.uncond = None if uncond is None else one_window(uncond, call=call).plain()

    @property
    def size(self) -> tuple[int, int]:
        """The canvas (H, W) in latents that the masks cover."""
        return self.masks.shape[1], self.masks.shape[2]

    def at(self, origins: Tensor) -> RegionConditioning:
        """The regions of the windows with these origins.

        Args:
            origins: [N, 2] int64, (y, x) in latents.
        """
        check_shape("origins", origins, "N 2", call="RegionField.at")
        own = torch.ones(len(origins), len(self.cond), dtype=torch.bool)
        return RegionConditioning(self.cond, self.masks, origins.cpu(), own)


@dataclass(frozen=True)
class RegionState:
    """The prompts as the network prepared them, and which regions touch which window."""

    inner: Any
    regions: RegionConditioning
    touched: Tensor  # [N, G] bool


class RegionDenoiser:
    """A window denoiser that evaluates each window under the prompts of its regions.

    A region whose mask does not touch a window is not evaluated there. Pairs of window and region
    are put into batches of one shape, that of the windows given, the last one padded; so the
    rounding depends on the plan, the masks and the batch size, which all belong to the recipe.
    """

    def __init__(self, denoiser: WindowDenoiser) -> None:
        self.inner = denoiser

    def __getattr__(self, name: str) -> Any:
        # The rest (channels, prediction, schedule, ...) is the network's.
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def prepare(
        self,
        cond: RegionConditioning,
        uncond: Cond | None,
    ) -> RegionState:
        """Prepares each prompt once, and finds the regions of each window."""
        touched = torch.cat(
            [
                cond.weights(index, self.inner.window).amax((2, 3)) > 0
                for index in torch.arange(len(cond)).split(_CHUNK)
            ]
        )
        return RegionState(self.inner.prepare(cond.prompts.plain(), uncond), cond, touched)

    def __call__(
        self,
        x: Tensor,  # [B, C, h, w] fp32
        t: float,
        state: RegionState,
        index: Tensor,  # [B] int64
    ) -> Tensor:
        """The blend of the regions' model outputs, for the guided pair or alone: [.., B, C, h, w].

        Args:
            x: windows of the canvas.
            t: the time that the network is told.
            state: what `prepare` returned.
            index: which windows of the set these are.
        """
        index = index.cpu()
        weights = state.regions.weights(index, self.inner.window).to(x.device)
        pairs = torch.nonzero(state.touched[index])  # [M, 2]: row of x, region; rows ascend
        size = len(index)
        total: Tensor | None = None
        for first in range(0, len(pairs), size):
            chosen = pairs[first : first + size]
            padded = torch.cat((chosen, chosen[-1:].expand(size - len(chosen), 2)))
            output = self.inner(x[padded[:, 0].to(x.device)], t, state.inner, padded[:, 1])
            output = output.float()
            if total is None:
                total = torch.zeros_like(output)
            # One after another: a fixed order of sums, on any device.
            for number, (row, region) in enumerate(chosen.tolist()):
                total[:, row] += weights[row, region] * output[:, number]
        if total is None:
            raise ValueError("RegionDenoiser: index is empty, but at least one window is needed.")
        return total


def with_regions(denoiser: WindowDenoiser, fields: Sequence[Any]) -> WindowDenoiser:
    """The denoiser that these fields need: where one has regions, one that blends them."""
    if any(isinstance(field, RegionField) for field in fields):
        return RegionDenoiser(denoiser)
    return denoiser
