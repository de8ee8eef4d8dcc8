# SPDX-License-Identifier: Apache-2.0
"""Models in and out, through `save_pretrained` and `load`."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from small_models import (
    CONFIG,
    RUN,
    assert_same_weights,
    full_state,
    lightning_checkpoint,
    small_model,
    write_run,
)
from ssldiff_fast.models import LatentDiffusion
from ssldiff_fast.models.ldm import file_hash
from ssldiff_fast.models.load import load


def edited_run(path: str, value: object) -> dict[str, Any]:
    """The run's configuration with one entry changed, or removed where `value` is ...."""
    run = copy.deepcopy(RUN)
    *folders, name = path.split(".")
    section = run["model"]["params"]
    for folder in folders:
        section = section[folder]
    if value is ...:
        del section[name]
    else:
        section[name] = value
    return run


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


# Published runs.


def test_a_run_folder_loads_by_its_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    run = write_run(tmp_path / "brca", lightning_checkpoint(monkeypatch, full_state(model)))
    for path in (run, run / "checkpoints" / "last.ckpt"):
        again = load(path)
        assert_same_weights(again, model)
        assert again.schedule == model.schedule
        assert (again.prediction, again.scale_factor, again.window) == ("eps", 1.0, (8, 8))
        assert again.conditioner.normalize
    assert load(run).name == "brca"


def test_a_published_checkpoint_loads_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = full_state(small_model(), ema=True)
    load(write_run(tmp_path / "run", lightning_checkpoint(monkeypatch, state)))
    assert caplog.records == []


def test_averaged_weights_are_taken_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    state = full_state(model, ema=True)
    run = write_run(tmp_path / "run", lightning_checkpoint(monkeypatch, state))
    averaged, last = load(run), load(run, use_ema=False)
    assert_same_weights(last, model)
    assert_same_weights(averaged.vae, model.vae)
    for half, whole in zip(averaged.unet.parameters(), model.unet.parameters()):
        assert torch.equal(half, whole / 2)


def test_a_bare_state_dict_and_safetensors_load_by_the_yaml_beside_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = full_state(small_model())
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(RUN))
    torch.save({f"module.{name}": value.half() for name, value in state.items()}, tmp_path / "a.pt")
    save_file(state, tmp_path / "b.safetensors")
    assert_same_weights(load(tmp_path / "b.safetensors"), small_model())
    half = load(tmp_path / "a.pt")
    torch.testing.assert_close(
        half.unet.out[2].weight, small_model().unet.out[2].weight, rtol=1e-3, atol=1e-3
    )


def test_a_checkpoint_without_autoencoder_takes_it_from_where_the_yaml_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model()
    state = {k: v for k, v in full_state(model).items() if not k.startswith("first_stage_model.")}
    run = write_run(tmp_path / "run", state)
    (run / "vq").mkdir()
    vae = {**model.vae.state_dict(), "loss.discriminator.main.0.weight": torch.ones(1)}
    torch.save({"state_dict": vae}, run / "vq" / "model.ckpt")
    assert_same_weights(load(run), model)
    assert caplog.records == []


def test_the_measured_scale_in_a_checkpoint_counts(tmp_path: Path) -> None:
    state = {**full_state(small_model()), "scale_factor": torch.tensor(0.5)}
    assert load(write_run(tmp_path / "run", state)).scale_factor == 0.5


def test_both_tokens_of_the_published_brca_model(tmp_path: Path) -> None:
    section = {
        "target": "ldm.modules.encoders.modules.SSLEmbedder",
        "params": {"patch_embed_dim": 10, "region_embed_dim": 12, "normalize_ssl": True},
    }
    run = edited_run("cond_stage_config", section)
    run["model"]["params"]["unet_config"]["params"]["context_dim"] = 512
    conditioner = {
        "type": "patch_region",
        "width": 10,
        "region_width": 12,
        "context_dim": 512,
    }
    unet = {**CONFIG["unet"], "context_dim": 512}
    model = small_model(conditioner=conditioner, unet=unet)
    again = load(write_run(tmp_path / "run", full_state(model), run=run))
    assert_same_weights(again, model)
    assert again.conditioner(torch.ones(1, 2, 12)).shape == (1, 2, 512)


def test_an_unconditioned_run_has_no_conditioner(tmp_path: Path) -> None:
    unet = {
        k: v
        for k, v in CONFIG["unet"].items()
        if k not in ("use_spatial_transformer", "context_dim", "transformer_depth")
    }
    model = small_model(unet=unet, conditioner=None)
    run = edited_run("cond_stage_config", "__is_unconditional__")
    run["model"]["params"]["unet_config"]["params"] = unet
    run["model"]["params"].pop("conditioning_key")
    again = load(write_run(tmp_path / "run", full_state(model), run=run))
    assert again.conditioner is None
    assert_same_weights(again, model)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", full_state(small_model()))
    (path,) = run.glob("configs/*-project.yaml")
    path.write_text(path.read_text().replace("linear_start: 0.0015", "linear_start: 15e-4"))
    assert load(run).schedule.beta_start == 0.0015


def test_a_partial_match_says_what_was_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = full_state(small_model())
    del state["model.diffusion_model.out.2.bias"]
    state["model.diffusion_model.extra.weight"] = torch.ones(2)
    state["control_model.weight"] = torch.ones(2)
    with caplog.at_level(logging.WARNING):
        model = load(write_run(tmp_path / "run", state))
    (record,) = caplog.records
    for words in ("model.diffusion_model.out.2.bias", "extra.weight", "control_model.weight"):
        assert words in record.getMessage()
    assert torch.equal(model.unet.out[2].bias, torch.zeros(3))
    assert torch.equal(model.unet.out[2].weight, small_model().unet.out[2].weight)


def test_a_checkpoint_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"fc.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"matches no parameter .*fc.weight"):
        load(run)


def test_a_checkpoint_of_another_size_is_an_error(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        full_state(small_model()),
        run=edited_run("cond_stage_config.params.patch_embed_dim", 13),
    )
    with pytest.raises(ValueError, match=r"patch_fc.weight has shape \[16, 12\] .* \[16, 13\]"):
        load(run)


def test_a_checkpoint_with_another_noise_schedule_is_an_error(tmp_path: Path) -> None:
    run = edited_run("linear_end", 0.012)
    with pytest.raises(ValueError, match="noise schedule"):
        load(write_run(tmp_path / "run", full_state(small_model()), run=run))


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("unet_config.target", "os.system", "os.system for unet_config"),
        ("first_stage_config.target", "ldm.Other", "ldm.Other for first_stage_config"),
        ("cond_stage_config.target", "ldm.Text", "ldm.Text for cond_stage_config"),
        ("unet_config", ..., "no target for unet_config"),
        ("unet_config.params.num_classes", 1000, "num_classes=1000"),
        ("unet_config.params.model_channels", ..., "missing keyword model_channels"),
        ("first_stage_config.params.n_embed", ..., "lacks n_embed"),
        ("conditioning_key", "concat", "conditioning_key 'concat'"),
        ("beta_schedule", "sqrt", "beta_schedule 'sqrt'"),
        ("parameterization", "score", "'score'"),
    ],
)
def test_a_wrong_entry_of_the_yaml_is_named(
    tmp_path: Path, entry: str, value: object, words: str
) -> None:
    run = write_run(tmp_path / "run", full_state(small_model()), run=edited_run(entry, value))
    with pytest.raises(ValueError, match=words):
        load(run)


@pytest.mark.parametrize(("text", "words"), [("a: [", "not valid YAML"), ("- 1", 'no "model"')])
def test_a_yaml_of_another_kind_is_named(tmp_path: Path, text: str, words: str) -> None:
    run = write_run(tmp_path / "run", full_state(small_model()))
    (path,) = run.glob("configs/*-project.yaml")
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load(run)


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
