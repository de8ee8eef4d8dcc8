# SPDX-License-Identifier: Apache-2.0
"""What all adapters share: conditioning on the network's device, the guided pair, output shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssldiff_fast._checks import check_choice, check_count
from ssldiff_fast.canvas.conditioning import Conditioning, as_conditioning

# "flow" is the velocity noise - x0 of rectified flow, x = (1 - sigma) x0 + sigma noise. Schedulers
# of flow-matching models take it as it is; our own solvers know the other three.
PREDICTIONS = ("eps", "v", "x0", "flow")


@dataclass(frozen=True, eq=False)
class PairState:
    """Conditioning of a window set, on the network's device and in its precision."""

    cond: Conditioning  # of N windows
    uncond: Conditioning | None  # of one


class NetworkDenoiser(ABC):
    """A network of another library as a `WindowDenoiser`.

    Subclasses say in `evaluate` how the network is called; the rest is here.

    Args:
        network: the module, for its device and precision.
        window: (h, w) in latents.
        channels: latent channels C.
        prediction: "eps", "v", "x0" or "flow"; None where it is not known.
        call: the function that users called, for messages.
    """

    def __init__(
        self,
        network: Any,
        *,
        window: Sequence[int] | int,
        channels: int,
        prediction: str | None,
        call: str,
    ) -> None:
        self.call = call
        self.network = network
        self.window = window_pair(window, call=call)
        self.channels = check_count("channels", channels, call=call)
        if prediction is not None:
            check_choice("prediction", prediction, PREDICTIONS, call=call)
        self._prediction = prediction

    @property
    def prediction(self) -> str:
        """What the network predicts: "eps", "v", "x0" or "flow".

        Raises:
            ValueError: neither the model nor the caller said it.
        """
        if self._prediction is None:
            raise ValueError(
                f"{self.call}: prediction is None, and this model does not say what it predicts; "
                "pass prediction='eps', 'v', 'x0' or 'flow' (or the model's scheduler)."
            )
        return self._prediction

    @abstractmethod
    def evaluate(
        self,
        x: Tensor,  # [M, C, h, w] on the network's device, in its precision
        t: float,
        cond: Conditioning,  # of M windows
    ) -> Tensor:
        """The model output [M, C, h, w] of one call of the network."""

    @abstractmethod
    def check(self, cond: Conditioning) -> None:
        """Raises unless the network can be called with this conditioning."""

    def prepare(
        self,
        cond: Tensor | Conditioning,  # [N, T, D], or of N windows
        uncond: Tensor | Conditioning | None,  # of one window
    ) -> PairState:
        """Moves the conditioning to the network, once per window set; checks that it fits.

        Raises:
            ValueError: conditioning is missing or of another width, or cond and uncond differ in
                kind or shape.
        """
        many = as_conditioning(cond, call=self.call)
        one = None if uncond is None else as_conditioning(uncond, call=self.call)
        self.check(many)
        if one is not None:
            self.check(one)
            Conditioning.join([many[:1], one])  # says where they differ
        device, dtype = placement(self.network)
        return PairState(many.to(device, dtype), None if one is None else one.to(device, dtype))

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,  # [B, C, h, w] fp32
        t: float,
        state: PairState,
        index: Tensor,  # [B] int64
    ) -> Tensor:
        """[2, B, C, h, w] conditional and unconditional, or [1, B, C, h, w] without guidance."""
        cond, pair = state.cond[index], 1
        if state.uncond is not None:
            cond, pair = Conditioning.join([cond, state.uncond.expand(len(index))]), 2
        device, dtype = placement(self.network)
        stacked = x.to(device, dtype).repeat(pair, 1, 1, 1)
        output = self.evaluate(stacked, float(t), cond)
        if not isinstance(output, Tensor) or output.shape != stacked.shape:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise RuntimeError(
                f"{self.call}: {type(self.network).__name__} returned {got} for windows "
                f"{list(stacked.shape)}, but a model output of the windows' shape was expected; "
                "check window and channels, or wrap the model in a WindowDenoiser of your own."
            )
        return output.view(pair, *x.shape).to(x.device)


def placement(network: Any) -> tuple[torch.device, torch.dtype]:
    """Device and precision of a network's floating-point parameters."""
    if isinstance(network, nn.Module):
        for parameter in network.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def window_pair(window: Sequence[int] | int, *, call: str) -> tuple[int, int]:
    """A window's (h, w), of two numbers or of one for a square."""
    pair = (window, window) if isinstance(window, int) else tuple(window)
    if len(pair) != 2:
        raise ValueError(f"{call}: window is {window!r}, but (h, w) in latents was expected.")
    h, w = (check_count("window", side, call=call) for side in pair)
    return h, w
