# SPDX-License-Identifier: Apache-2.0
"""Published runs: CompVis folders and checkpoints, by their YAML."""

from __future__ import annotations

import copy
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
