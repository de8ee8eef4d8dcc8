# SPDX-License-Identifier: Apache-2.0
"""The autoencoders against the published implementation's numbers and names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from golden_inputs import (
    VQ_SMALL,
    fill,
    golden_input,
    golden_output,
    published_shapes,
    relative_error,
)
from ssldiff_fast.models import AutoencoderKL, VQModel, autoencoder_blocks

PAPER = {
    **VQ_SMALL,
    "n_embed": 8192,
    "ddconfig": {**VQ_SMALL["ddconfig"], "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2},
}
KL = {
    "embed_dim": 4,
    "ddconfig": {**VQ_SMALL["ddconfig"], "double_z": True, "z_channels": 4, "ch_mult": [1, 2]},
}


@pytest.fixture(scope="module")
def vae() -> VQModel:
    return fill(VQModel(**VQ_SMALL))


@pytest.mark.golden
def test_encodes_as_the_published_autoencoder(vae: VQModel) -> None:
    with torch.no_grad():
        z = vae.encode(golden_input("vq.img", 1, 3, 64, 96).tanh())
    assert relative_error(z, golden_output("vq.encode")) < 1e-5


@pytest.mark.golden
def test_decodes_as_the_published_autoencoder(vae: VQModel) -> None:
    z = golden_input("vq.z", 1, 3, 24, 16)
    with torch.no_grad():
        raw, quantized = vae.decode(z, quantize=False), vae.decode(z)
    assert relative_error(raw, golden_output("vq.decode_raw")) < 1e-5
    assert relative_error(quantized, golden_output("vq.decode_quantized")) < 1e-5


@pytest.mark.golden
def test_quantises_to_the_published_codes(vae: VQModel) -> None:
    with torch.no_grad():
        codes, indices = vae.quantize(golden_input("vq.z", 1, 3, 24, 16))
    assert torch.equal(indices.flatten(), golden_output("vq.indices"))
    assert relative_error(codes, golden_output("vq.quantized")) < 1e-6


@pytest.mark.parametrize(("section", "config"), [("SMALL", VQ_SMALL), ("PAPER", PAPER)])
def test_has_exactly_the_published_parameters(section: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        vae = VQModel(**config)
    ours = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    assert ours == published_shapes("vq_keys.txt", section)


def test_kl_encodes_to_the_mean_and_decodes_to_the_size_of_the_image() -> None:
    vae = fill(AutoencoderKL(**KL))
    images = golden_input("img", 2, 3, 16, 24).tanh()
    with torch.no_grad():
        z = vae.encode(images)
        mean, log_variance = vae.moments(images)
        out = vae.decode(z)
    assert torch.equal(z, mean)
    assert z.shape == log_variance.shape == (2, 4, 8, 12)
    assert out.shape == images.shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"double_z": True}, "double_z"),
        ({"ch": 40}, "multiple of 32"),
        ({"channels": 3}, "unknown entries"),
    ],
)
def test_a_wrong_ddconfig_entry_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VQModel(**{**VQ_SMALL, "ddconfig": {**VQ_SMALL["ddconfig"], **change}})


def test_an_image_whose_sides_do_not_divide_is_named(vae: VQModel) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        vae.encode(torch.zeros(1, 3, 64, 66))


def test_a_latent_of_another_width_is_named(vae: VQModel) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 3, h, w\]"):
        vae.decode(torch.zeros(1, 4, 8, 8))


def test_inference_computes_what_training_does(vae: VQModel) -> None:
    # Inference goes by other kernels: Winograd's convolutions, channels-last, oneDNN's products.
    image, z = golden_input("vq.img", 1, 3, 64, 96).tanh(), golden_input("vq.z", 1, 3, 24, 16)
    trained = vae.encode(image), vae.decode(z, quantize=False)
    with torch.no_grad():
        inferred = vae.encode(image), vae.decode(z, quantize=False)
    for theirs, ours in zip(trained, inferred):
        assert theirs.requires_grad
        assert relative_error(ours, theirs.detach()) < 1e-5


def test_attention_in_parts_is_the_attention_of_the_whole(
    vae: VQModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = vae.decoder.mid.attn_1, torch.randn(2, 64, 6, 7)
    with torch.no_grad():
        whole = block(x)
        monkeypatch.setattr(autoencoder_blocks, "SCORES", 42 * 5)
        torch.testing.assert_close(block(x), whole)
