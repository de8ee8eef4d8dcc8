# SPDX-License-Identifier: Apache-2.0
"""Feature reuse between neighbouring steps, for windows that are the same in every step.

In the first of `reuse` steps the whole U-Net is evaluated, and of every window what the lower
levels hand to the outermost one is kept; in the others the outermost level alone is evaluated (Ma
et al., "DeepCache: accelerating diffusion models for free", CVPR 2024). That changes the result:
docs/options.md has the measurements.

The maps are many times the canvas (in the paper's windows 700 times for the bundled model, 4,000
times for the published one), so there is a bound; and in the wavefront order those of as many
window rows as there are steps would be in memory at once, so it is for the plain order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from ssldiff_fast.canvas.ldm_denoiser import LDMDenoiser, LDMState
from ssldiff_fast.models.execution import SplitNetwork

if TYPE_CHECKING:
    from ssldiff_fast.canvas.denoiser import CanvasDenoiser

# Of the maps of all windows.
MOST_BYTES = 2**32

Place: TypeAlias = tuple[int, int]  # of a micro-batch: its window row, its first window there
Evaluate: TypeAlias = Callable[[Place, Tensor, float, Any, Tensor], Tensor]


class DeepMaps:
    """The maps of every micro-batch, of the last step that evaluated the whole network."""

    def __init__(self, denoiser: LDMDenoiser) -> None:
        self._denoiser = denoiser
        self._held: dict[Place, Tensor] = {}

    def renew(
        self,
        place: Place,
        x: Tensor,  # [B, C, h, w] fp32
        t: float,
        state: LDMState,
        index: Tensor,  # [B] int64
    ) -> Tensor:  # [2 or 1, B, C, h, w]
        """The model output; the maps are kept."""
        self._held.pop(place, None)
        output, self._held[place] = self._denoiser.with_deep(x, t, state, index)
        return output

    def reuse(
        self,
        place: Place,
        x: Tensor,  # [B, C, h, w] fp32
        t: float,
        state: LDMState,
        index: Tensor,  # [B] int64
    ) -> Tensor:  # [2 or 1, B, C, h, w]
        """The model output by the maps that were kept."""
        return self._denoiser.with_deep(x, t, state, index, self._held[place])[0]


def begins(denoiser: CanvasDenoiser, times: Sequence[float], reuse: int) -> list[bool]:
    """Which steps evaluate the whole network: the first of every `reuse`, and those in which
    guidance begins or ends, since a guided pair has two maps."""
    found: list[bool] = []
    last, guided = -reuse, False
    for number, time in enumerate(times):
        now = denoiser.scale_at(time) != 1.0
        begin = number - last >= reuse or now != guided
        found.append(begin)
        if begin:
            last, guided = number, now
    return found


def check_order(order: str, reuse: int, *, call: str) -> None:
    """Raise ValueError where steps are not done one after another."""
    if reuse != 1 and order == "wavefront":
        raise ValueError(
            f"{call}: reuse is {reuse}, but in the wavefront order the maps of as many window rows "
            "as there are steps would be in memory; use order='plain', or leave it out."
        )


def deep_maps(denoiser: CanvasDenoiser, reuse: int, canvases: int, *, call: str) -> DeepMaps:
    """Where the maps of a run are kept.

    Raises:
        ValueError: there is nothing to reuse, or the maps would be larger than MOST_BYTES.
    """
    network = denoiser.denoiser
    if not denoiser.has_one_plan:
        raise ValueError(
            f"{call}: reuse is {reuse}, but these windows move from step to step, so that no step "
            "has what the one before computed; leave it out, or use windows that stay, such as "
            "those of the preset 'paper'."
        )
    if not isinstance(network, LDMDenoiser) or not isinstance(network.network, SplitNetwork):
        kind = type(network.network if isinstance(network, LDMDenoiser) else network).__name__
        raise ValueError(
            f"{call}: reuse is {reuse}, but the network is a {kind}; it is for a model of `sf.load`"
            " with execution 'auto', 'eager' or 'graph' and without regions: leave it out."
        )
    unet, (h, w) = network.model.unet, network.window
    pair = 1 if denoiser.guidance_scale == 1.0 else 2
    of_window = pair * unet.deep_width * h * w * next(unet.parameters()).element_size()
    windows = canvases * denoiser.evaluator.count(denoiser.plan(0))
    if windows * of_window > MOST_BYTES:
        raise ValueError(
            f"{call}: reuse is {reuse}, which keeps {of_window / 2**20:.3g} MiB of each of "
            f"{windows} windows, {windows * of_window / 2**30:.3g} GiB in all, but the most is "
            f"{MOST_BYTES / 2**30:g} GiB; leave it out, or make a smaller image or a larger stride."
        )
    return DeepMaps(network)
