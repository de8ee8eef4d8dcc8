# SPDX-License-Identifier: Apache-2.0
"""Models in and out, through `save_pretrained` and `load`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from small_models import (
    CONFIG,
    assert_same_weights,
    full_state,
    small_model,
    write_run,
)
from ssldiff_fast.models import LatentDiffusion
from ssldiff_fast.models.ldm import file_hash
from ssldiff_fast.models.load import load

# Our own format.


def test_a_saved_model_loads_the_same(tmp_path: Path) -> None:
    model = small_model(prediction="v", scale_factor=0.25, schedule={"zero_terminal_snr": True})
    folder = model.save_pretrained(tmp_path / "new" / "model", card="# Card\n")
    again = load(folder)
    assert_same_weights(model, again)
    assert again.to_config() == model.to_config()
    assert again.schedule == model.schedule
    assert (again.prediction, again.scale_factor, again.window) == ("v", 0.25, (8, 8))
    assert (folder / "README.md").read_text() == "# Card\n"
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["model"]
    assert not again.training


def test_the_hash_of_the_weights_is_that_of_the_file(tmp_path: Path) -> None:
    model = small_model()
    folder = model.save_pretrained(tmp_path / "model")
    assert load(folder).weights_hash == file_hash(folder / "model.safetensors")
    before = model.weights_hash
    assert before == small_model().weights_hash
    with torch.no_grad():
        model.unet.out[2].bias.add_(1)
    assert model.weights_hash != before


def test_half_precision_on_disk_is_float32_in_memory(tmp_path: Path) -> None:
    model = small_model()
    full = model.save_pretrained(tmp_path / "full") / "model.safetensors"
    half = model.save_pretrained(tmp_path / "half", dtype="float16") / "model.safetensors"
    assert half.stat().st_size < 0.6 * full.stat().st_size
    again = load(half.parent)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.vae.quantize.embedding.weight, model.vae.quantize.embedding.weight)
    for mine, theirs in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-4)


def test_dtype_is_that_of_network_and_conditioner_not_of_the_autoencoder(tmp_path: Path) -> None:
    model = load(small_model().save_pretrained(tmp_path / "model"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.conditioner.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}


def test_a_model_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    folder = small_model().save_pretrained(tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    before = file_hash(folder / "model.safetensors")
    other = small_model(scale_factor=0.5)
    with pytest.raises(FileExistsError, match=r"already holds config\.json"):
        other.save_pretrained(folder)
    assert file_hash(folder / "model.safetensors") == before
    other.save_pretrained(folder, overwrite=True)
    assert load(folder).scale_factor == 0.5
    assert (folder / "notes.txt").read_text() == "mine"


def test_nothing_is_left_behind_when_saving_fails(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.unet.out[2].bias.fill_(1e6)
    with pytest.raises(ValueError, match=r"model.diffusion_model.out.2.bias .* use bfloat16"):
        model.save_pretrained(tmp_path / "model", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        small_model().save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_folder_can_be_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        small_model().save_pretrained(tmp_path / "file" / "model")
    with pytest.raises(FileExistsError, match="is a file; expected a folder"):
        small_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_dtype_to_save_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'int8', expected one of float32, bfloat16, float16"):
        small_model().save_pretrained(tmp_path / "model", dtype="int8")


def test_a_weights_file_loads_by_the_config_beside_it(tmp_path: Path) -> None:
    folder = small_model().save_pretrained(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "step-5.safetensors")
    assert_same_weights(load(folder / "step-5.safetensors"), small_model())
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("format", "other", "no configuration of this package"),
        ("version", 99, "version 99"),
        ("unet", {**CONFIG["unet"], "model_chanels": 1}, "model_chanels"),
        ("vae", {"type": "jpeg"}, "type is 'jpeg'"),
        ("vae", {"type": "vq", "n_embed": 3}, "vae: entries"),
        ("conditioner", {"type": "patch", "width": 12, "context_dim": 8}, "tokens of width 8"),
        ("schedule", {"betas": "steep"}, "'steep'"),
        ("schedule", "cosine", "schedule is 'cosine'"),
        ("prediction", "noise", "'noise'"),
        ("scale_factor", 0, "scale_factor is 0"),
        ("window", [8, 7], "multiples of 2"),
        ("colour", "blue", "unknown entry 'colour'"),
    ],
)
def test_a_wrong_entry_of_config_json_is_named(
    tmp_path: Path, entry: str, value: object, words: str
) -> None:
    folder = small_model().save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, entry: value}))
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    folder = small_model().save_pretrained(tmp_path / "model")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(folder)


def test_a_model_carries_its_encoder(tmp_path: Path) -> None:
    from ssldiff_fast.encoders.encoder import Encoder
    from ssldiff_fast.encoders.spec import EncoderSpec

    spec = EncoderSpec("tiny", "test_resnet", width=12, patch_px=32, mpp=0.5, head=True)
    made = Encoder(spec)
    model = small_model()
    model.encoder_spec = made.spec
    model.encoder_weights = made.network.state_dict()
    again = load(model.save_pretrained(tmp_path / "model"))
    assert again.encoder_spec == made.spec
    patches = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.encoder(patches), made(patches))
    tokens = again.conditioner(again.encoder(patches))
    assert tokens.shape == (2, 1, 16)


def test_the_decoder_alone_may_be_of_half_precision(tmp_path: Path) -> None:
    folder = small_model().save_pretrained(tmp_path / "model")
    vae = load(folder, decoder_dtype="bfloat16").vae
    assert {p.dtype for p in vae.decoder.parameters()} == {torch.bfloat16}
    others = [p for name, p in vae.named_parameters() if not name.startswith("decoder.")]
    assert {p.dtype for p in others} == {torch.float32}
    with pytest.raises(ValueError, match="decoder_dtype is 'auto', expected one of float32"):
        load(folder, decoder_dtype="auto")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_encoder_is_recognised_in_whatever_precision_it_was_saved(
    tmp_path: Path, dtype: str
) -> None:
    from tiny_models import tiny_grid, tiny_model

    model = tiny_model()
    grid = tiny_grid(model)
    again = load(model.save_pretrained(tmp_path / "model", dtype=dtype))
    assert again.encoder.spec.weights_hash == model.encoder_spec.weights_hash
    grid.check_for(again.encoder.spec)  # of a grid made before the model was saved
    twice = load(again.save_pretrained(tmp_path / "again", dtype=dtype))
    assert twice.encoder.spec == again.encoder.spec


# Where things are looked for.


def test_an_unknown_name_says_where_it_was_looked_for_and_what_is_bundled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_model().save_pretrained(tmp_path / "data" / "tiny-demo")
    monkeypatch.setattr("ssldiff_fast.models.load.BUNDLED", tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/he-demoo.*bundled: tiny-demo"):
        load("he-demoo")
    assert load("tiny-demo").name == "small"


def test_a_bundled_name_wins_over_a_folder_here_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssldiff_fast.models.load.BUNDLED", tmp_path / "data")
    small_model(scale_factor=1.0).save_pretrained(tmp_path / "data" / "demo")
    small_model(scale_factor=0.5).save_pretrained(tmp_path / "demo")
    assert load("demo").scale_factor == 1.0
    assert "./demo" in caplog.text
    assert load("./demo").scale_factor == 0.5


@pytest.mark.parametrize("missing", ["configs", "checkpoints"])
def test_a_missing_part_of_a_run_says_where_it_was_looked_for(tmp_path: Path, missing: str) -> None:
    run = write_run(tmp_path / "run", full_state(small_model()))
    for path in (run / missing).iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{run}"):
        load(run)


def test_a_checkpoint_without_configuration_says_what_to_put_beside_it(tmp_path: Path) -> None:
    torch.save(full_state(small_model()), tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"looked for a.yaml .* put the .yaml"):
        load(tmp_path / "a.ckpt")


def test_an_unknown_device_or_dtype_is_named_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="device is 'gpu'"):
        load("nowhere", device="gpu")
    with pytest.raises(RuntimeError, match="'cuda:99' is not available"):
        load("nowhere", device="cuda:99")
    with pytest.raises(ValueError, match="dtype is 'half'"):
        load("nowhere", dtype="half")


def test_a_model_without_encoder_says_so() -> None:
    with pytest.raises(ValueError, match="'small' does not name its encoder"):
        _ = small_model().encoder


def test_latents_and_images_are_in_the_scale_of_the_canvas() -> None:
    model = small_model(scale_factor=0.5)
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        latent = model.to_latent(images)
        torch.testing.assert_close(latent, model.vae.encode(images) / 2)
        torch.testing.assert_close(model.from_latent(latent), model.vae.decode(latent * 2))
    assert latent.shape == (1, model.latent_channels, 8, 12)
    assert model.downsample_factor == 2


def test_an_empty_model_draws_no_initial_values() -> None:
    model = LatentDiffusion.from_config(CONFIG, empty=True)
    assert all(p.is_meta for p in model.parameters())
    assert not model.schedule.alphas_cumprod.is_meta
