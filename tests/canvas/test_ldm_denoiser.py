# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy

import pytest
import torch

from golden_inputs import (
    UNET_A,
    VQ_SMALL,
    fill_whole_model,
    golden_input,
    golden_output,
    relative_error,
)
from ssldiff_fast.canvas import (
    CanvasDenoiser,
    GridField,
    LDMDenoiser,
    get_preset,
    ldm_denoiser,
    sample,
)
from ssldiff_fast.canvas.ldm_denoiser import LDMState
from ssldiff_fast.diffusion import Schedule
from ssldiff_fast.models.autoencoder import VQModel
from ssldiff_fast.models.conditioner import PatchConditioner
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.prepared import PreparedContext, TimeVectors
from ssldiff_fast.models.unet import UNet


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    unet = UNet(**{**UNET_A, "context_dim": 512})
    vae, conditioner = VQModel(**VQ_SMALL), PatchConditioner(48, 512)
    fill_whole_model(unet, vae, conditioner)
    return LatentDiffusion(unet, vae, conditioner, schedule=Schedule(), window=(64, 64)).eval()


@pytest.mark.golden
def test_the_authors_preset_is_the_published_large_image_loop(model: LatentDiffusion) -> None:
    preset, schedule = get_preset("authors"), model.schedule
    grid = golden_input("panorama.embeddings", 4, 48).view(2, 2, 1, 48)
    noise = [golden_input(f"panorama.noise{i}", 1, 3, 128, 128)[0] for i in range(6)]
    abar = schedule.abar(999)
    denoiser = CanvasDenoiser(
        LDMDenoiser(model),
        preset.windows(128, 128, model.window, seed=0),
        GridField(grid, model.window, preset.interpolation),
        guidance_scale=preset.guidance_scale,
        batch_size=5,
    )
    latent = sample(
        denoiser,
        abar**0.5 * noise[0] + (1 - abar) ** 0.5 * noise[1],
        schedule=schedule,
        solver=preset.solver,
        steps=4,
        spacing=preset.spacing,
        eta=preset.eta,
        step_noise=lambda step: noise[2 + step],
    )
    assert relative_error(latent[None], golden_output("panorama.latent")) < 1e-5


def test_a_guided_pair_is_two_evaluations_of_the_network(model: LatentDiffusion) -> None:
    denoiser = LDMDenoiser(model)
    embeddings = golden_input("some embeddings", 5, 1, 48)
    x, index = golden_input("some windows", 2, 3, 32, 32), torch.tensor([4, 1])
    state = denoiser.prepare(embeddings, torch.zeros(1, 1, 48))
    with torch.no_grad():
        pair = denoiser(x, 981.0, state, index)
        tokens = model.conditioner(torch.cat((embeddings[index], torch.zeros(2, 1, 48))))
        t = torch.full((2,), 981.0)
        assert pair.shape == (2, 2, 3, 32, 32)
        torch.testing.assert_close(pair[0], model.unet(x, t, tokens[:2]))
        torch.testing.assert_close(pair[1], model.unet(x, t, tokens[2:]))
        alone = denoiser(x, 981.0, denoiser.prepare(embeddings, None), index)
    assert alone.shape == (1, 2, 3, 32, 32)
    torch.testing.assert_close(alone[0], pair[0])


class Counter:
    """How often the U-Net prepared a context, and for how many windows."""

    def __init__(self, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[int] = []
        prepare = model.unet.prepare

        def counted(context: torch.Tensor) -> PreparedContext:
            self.windows.append(len(context))
            return prepare(context)

        monkeypatch.setattr(model.unet, "prepare", counted)


def run_twice(
    denoiser: LDMDenoiser, state: LDMState, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        first = denoiser(x, 981.0, state, torch.tensor([4, 1]))
        return first, denoiser(x, 981.0, state, torch.tensor([4, 1]))


def test_the_blocks_vectors_are_made_once_for_all_steps(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, denoiser = Counter(model, monkeypatch), LDMDenoiser(model)
    state = denoiser.prepare(golden_input("some embeddings", 5, 1, 48), torch.zeros(1, 1, 48))
    first, second = run_twice(denoiser, state, golden_input("some windows", 2, 3, 32, 32))
    assert counter.windows == [1, 5]
    assert torch.equal(first, second)
    # The vectors go with the state, as its owner drops it.
    del state
    assert len(denoiser._prepared) == 0


def test_a_timestep_is_prepared_once_for_all_window_sets_until_weights_change(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(model)
    denoiser, x = LDMDenoiser(model), golden_input("some windows", 2, 3, 32, 32)
    times: list[float] = []
    prepare_time = model.unet.prepare_time

    def counted(t: torch.Tensor) -> TimeVectors:
        times.append(float(t))
        return prepare_time(t)

    monkeypatch.setattr(model.unet, "prepare_time", counted)
    cond, index = golden_input("some embeddings", 5, 1, 48), torch.tensor([4, 1])
    with torch.no_grad():
        for state in [denoiser.prepare(cond, None) for _ in range(3)]:
            before = [denoiser(x, t, state, index) for t in (981.0, 961.0)][-1]
        assert times == [981.0, 961.0]
        model.unet.time_embed[0].weight.mul_(1.5)
        after = denoiser(x, 961.0, denoiser.prepare(cond, None), index)
    assert times == [981.0, 961.0, 961.0]
    assert not torch.equal(before, after)
    monkeypatch.setattr(ldm_denoiser, "PREPARED_TIMES", 2)
    with torch.no_grad():
        for t in (981.0, 961.0, 941.0, 941.0):
            denoiser(x, t, state, index)
    assert times[3:] == [981.0, 941.0]
    assert len(denoiser._times) == 2


def test_what_does_not_fit_is_prepared_again_and_the_bits_are_the_same(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, x = LDMDenoiser(model), golden_input("some windows", 2, 3, 32, 32)
    sets = [golden_input(name, 5, 1, 48) for name in ("some embeddings", "others")]
    states = [denoiser.prepare(cond, torch.zeros(1, 1, 48)) for cond in sets]
    expected, _ = run_twice(denoiser, states[0], x)
    one = model.unet.prepare(model.conditioner(torch.zeros(1, 1, 48))).nbytes
    # Room for one set: each drops the other.
    monkeypatch.setattr(ldm_denoiser, "PREPARED_BYTES", 6 * one)
    counter = Counter(model, monkeypatch)
    for state in (states[1], states[0], states[1], states[0]):
        made, _ = run_twice(denoiser, state, x)
    assert torch.equal(made, expected)
    assert counter.windows == [1, 5] * 4
    # Room for none: the network prepares each batch by itself.
    monkeypatch.setattr(ldm_denoiser, "PREPARED_BYTES", 4 * one)
    fresh = LDMDenoiser(model)
    made, _ = run_twice(fresh, states[0], x)
    torch.testing.assert_close(made, expected)
    assert len(fresh._prepared) == 0


def test_a_network_moved_to_another_precision_prepares_anew(model: LatentDiffusion) -> None:
    half = copy.deepcopy(model)
    denoiser, x = LDMDenoiser(half), golden_input("some windows", 2, 3, 32, 32)
    state = denoiser.prepare(golden_input("some embeddings", 5, 1, 48), None)
    exact, _ = run_twice(denoiser, state, x)
    half.unet.to(torch.bfloat16)
    made, _ = run_twice(denoiser, state, x)
    assert made.dtype == torch.bfloat16
    assert relative_error(made.float(), exact) < 3e-2


def test_gradients_reach_the_embeddings(model: LatentDiffusion) -> None:
    denoiser, x = LDMDenoiser(model), golden_input("some windows", 2, 3, 32, 32)
    embeddings = golden_input("some embeddings", 5, 1, 48).requires_grad_()
    index = torch.tensor([4, 1])
    with torch.no_grad():
        denoiser(x, 981.0, denoiser.prepare(embeddings, None), index)
    denoiser(x, 981.0, denoiser.prepare(embeddings, None), index).square().sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist() == [1, 4]


def test_the_direction_of_an_embedding_is_found_before_precision_is_lost(
    model: LatentDiffusion,
) -> None:
    half = copy.deepcopy(model)
    half.unet.to(torch.bfloat16)
    half.conditioner.to(torch.bfloat16)
    embeddings = 1e5 * golden_input("some embeddings", 5, 1, 48)  # beyond float16 as well
    state = LDMDenoiser(half).prepare(embeddings, None)
    assert torch.equal(state.cond, half.conditioner(embeddings))


def test_the_denoiser_describes_its_model(model: LatentDiffusion) -> None:
    denoiser = LDMDenoiser(model)
    assert (denoiser.window, denoiser.channels, denoiser.prediction) == ((64, 64), 3, "eps")


def test_a_model_without_a_conditioner_is_refused() -> None:
    unet = UNet(**{**UNET_A, "use_spatial_transformer": False, "context_dim": None})
    plain = LatentDiffusion(unet, VQModel(**VQ_SMALL), schedule=Schedule(), name="plain")
    with pytest.raises(ValueError, match="model 'plain' has no conditioner"):
        LDMDenoiser(plain)
