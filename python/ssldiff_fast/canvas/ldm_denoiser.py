# SPDX-License-Identifier: Apache-2.0
"""Our own latent diffusion models as window denoisers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ssldiff_fast.models.execution import Network, SplitNetwork, network_for
from ssldiff_fast.models.fused_unet import versions_of
from ssldiff_fast.models.heap import keep_freed_memory
from ssldiff_fast.models.threads import timed

if TYPE_CHECKING:
    from ssldiff_fast.models.ldm import LatentDiffusion
    from ssldiff_fast.models.prepared import PreparedContext, TimeVectors

# Of prepared vectors, which are some twenty times the tokens: what was used last is kept. A window
# set that is larger by itself is prepared batch by batch.
PREPARED_BYTES = 2**28
# Timesteps whose vectors are kept: those of all steps, which the wavefront order needs in turn.
PREPARED_TIMES = 1024

# Of a model: its U-Net as it was, with device, dtype and execution, and the form that it is run in.
_NETWORKS: WeakKeyDictionary[LatentDiffusion, tuple[Any, Network]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LDMState:
    """Conditioning tokens of a window set."""

    cond: Tensor  # [N, T, context_dim]
    uncond: Tensor | None  # [1, T, context_dim]


@dataclass(frozen=True)
class _Vectors:
    cond: PreparedContext  # of N windows
    uncond: PreparedContext | None  # of one
    kind: tuple[torch.device, torch.dtype]  # of the U-Net that they were made for


class LDMDenoiser:
    """The U-Net and conditioner of a `LatentDiffusion` as a `WindowDenoiser`.

    What the U-Net's blocks need of the tokens is computed once per window set, not once per step,
    as long as it fits into PREPARED_BYTES; it is computed again, to the same bits, where it was
    dropped for another set.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        if model.conditioner is None:
            raise ValueError(
                f"LDMDenoiser: model {model.name!r} has no conditioner, so a grid cannot guide it; "
                "load a model that was trained on embeddings."
            )
        self.model = model
        self.conditioner = model.conditioner
        self._parameters = list(model.unet.parameters())
        # In the order of their last use, and of which weights they were made.
        self._times: OrderedDict[Any, TimeVectors] = OrderedDict()
        self._versions: tuple[int, ...] = ()
        # In the order of their last use; gone with the state that they belong to.
        self._prepared: WeakKeyDictionary[LDMState, _Vectors] = WeakKeyDictionary()
        keep_freed_memory()

    @property
    def window(self) -> tuple[int, int]:
        """(h, w) in latents."""
        h, w = self.model.window
        return h, w

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return int(self.model.latent_channels)

    @property
    def prediction(self) -> str:
        """What the U-Net predicts: "eps", "v" or "x0"."""
        return str(self.model.prediction)

    def prepare(
        self,
        cond: Tensor,  # [N, T, D] fp32
        uncond: Tensor | None,  # [1, T, D] fp32
    ) -> LDMState:
        """Conditioning tokens of all windows, and the null token once.

        Changes of the U-Net's weights are noticed here, not between the steps of one window set.
        """
        versions = versions_of(self._parameters)
        if versions != self._versions:
            self._versions = versions
            self._times.clear()
        # In float32 whatever the network's precision: the conditioner normalises before it casts.
        device = next(self.conditioner.parameters()).device
        tokens = self.conditioner(cond.to(device))
        return LDMState(tokens, None if uncond is None else self.conditioner(uncond.to(device)))

    def __call__(
        self,
        x: Tensor,  # [B, C, h, w] fp32
        t: float,
        state: LDMState,
        index: Tensor,  # [B] int64
    ) -> Tensor:
        """[2, B, C, h, w] conditional and unconditional, or [1, B, C, h, w] without guidance."""
        parameter = next(self.model.unet.parameters())
        windows = x.to(parameter.device, parameter.dtype)
        context = self._context(state, index)
        if torch.is_grad_enabled():
            time = torch.tensor(t, device=parameter.device)
            output = self.model.unet(windows, time, context)
        else:
            assert not isinstance(context, Tensor)  # for the type checker
            # Twice as many contexts as windows are guided pairs, which share what both have in
            # common.
            network, vectors = self.network, self._time(t)
            output = timed(lambda: network(windows, vectors, context), len(context))
        return output.unflatten(0, (-1, x.shape[0])).to(x.device)

    @torch.no_grad()
    def with_deep(
        self,
        x: Tensor,  # [B, C, h, w] fp32
        t: float,
        state: LDMState,
        index: Tensor,  # [B] int64
        deep: Tensor | None = None,  # [B or 2 B, width, h, w], of the same windows
    ) -> tuple[Tensor, Tensor]:
        """The model output, and what the U-Net's lower levels made; see `UNet.with_deep`."""
        parameter, network = next(self.model.unet.parameters()), self.network
        assert isinstance(network, SplitNetwork)  # or the run is refused
        windows = x.to(parameter.device, parameter.dtype)
        context = self._context(state, index)
        assert not isinstance(context, Tensor)  # for the type checker
        evaluate = partial(network.with_deep, windows, self._time(t), context, deep)
        # Threads are chosen by evaluations of the whole network, which take longer than others.
        output, deep = timed(evaluate, len(context)) if deep is None else evaluate()
        return output.unflatten(0, (-1, x.shape[0])).to(x.device), deep

    @property
    def network(self) -> Network:
        """The U-Net in the form that is the fastest where it is, see `models.execution`; the same
        for all denoisers of a model, since graphs take time to capture."""
        parameter = next(self.model.unet.parameters())
        unet, execution = self.model.unet, self.model.execution
        key = unet, parameter.device, parameter.dtype, execution
        made = _NETWORKS.get(self.model)
        if made is None or made[0] != key:
            made = _NETWORKS[self.model] = key, network_for(unet, execution)
        return made[1]

    def _time(self, t: float) -> TimeVectors:
        """What the network takes for a timestep, made once for all batches of all steps."""
        parameter = next(self.model.unet.parameters())
        key = t, parameter.device, parameter.dtype, self.model.execution
        found = self._times.pop(key, None)
        if found is None:
            found = self.network.prepare_time(torch.tensor(t, device=parameter.device))
        self._times[key] = found
        if len(self._times) > PREPARED_TIMES:
            self._times.popitem(last=False)
        return found

    def _context(self, state: LDMState, index: Tensor) -> Tensor | PreparedContext:
        """What the U-Net takes for these windows, the guided pair one after the other."""
        # Not waited for: pageable memory has been read on return, and a wait would idle a GPU.
        index = index.to(state.cond.device, non_blocking=True)
        vectors = None if torch.is_grad_enabled() else self._vectors(state)
        if vectors is not None:
            context = vectors.cond[index]
            return context if vectors.uncond is None else context.followed_by(vectors.uncond)
        tokens = state.cond[index]
        if state.uncond is not None:
            tokens = torch.cat((tokens, state.uncond.expand_as(tokens)))
        return tokens if torch.is_grad_enabled() else self.network.prepare(tokens)

    def _vectors(self, state: LDMState) -> _Vectors | None:
        """The vectors of the whole set, made at its first use; None where they would not fit."""
        parameter = next(self.model.unet.parameters())
        kind = parameter.device, parameter.dtype
        found = self._prepared.pop(state, None)
        if found is None or found.kind != kind:
            network, windows = self.network, len(state.cond)
            uncond = None if state.uncond is None else network.prepare(state.uncond)
            one = network.prepare(state.cond[:1]) if uncond is None else uncond
            if one.nbytes * windows > PREPARED_BYTES:
                return None
            found = _Vectors(network.prepare(state.cond), uncond, kind)
        self._prepared[state] = found
        while sum(vectors.cond.nbytes for vectors in self._prepared.values()) > PREPARED_BYTES:
            del self._prepared[next(self._prepared.keys())]
        return found
