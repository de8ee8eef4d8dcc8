# SPDX-License-Identifier: Apache-2.0
"""What users get wrong, through the command line: one sentence, and nothing has run or is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from slide_files import blank_image, refuse, tissue_image, unwritable_folder, write_slide
from small_models import full_state, small_model, write_run
from ssldiff_fast.cli import main
from ssldiff_fast.encoders import Encoder
from ssldiff_fast.models.autoencoder import VQModel
from ssldiff_fast.models.unet import UNet
from ssldiff_fast.slides import Grid
from tiny_models import PATCH_PX, tiny_grid, tiny_model

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model, slide and grid, and many bad ones."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_model()
    model.save_pretrained(folder / "tiny")
    write_slides(folder)
    write_grids(folder, tiny_grid(model))
    write_models(folder)
    return folder


def write_slides(folder: Path) -> None:
    whole = write_slide(folder / "slide.tif", tissue_image()).read_bytes()
    (folder / "truncated.tif").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.svs").write_text("these are not pixels")
    (folder / "empty.svs").write_bytes(b"")
    write_slide(folder / "silent.tif", tissue_image(), mpp=None)
    write_slide(folder / "impossible.tif", tissue_image(), mpp=352.8)
    write_slide(folder / "coarse.tif", tissue_image(), mpp=4.0)
    write_slide(folder / "small.tif", tissue_image(PATCH_PX - 1, 400))
    write_slide(folder / "blank.tif", blank_image())
    Image.fromarray(tissue_image()).save(folder / "image.png")
    Image.new("L", (64, 51)).save(folder / "nothing.png")
    nowhere = {"type": "FeatureCollection", "features": []}
    (folder / "nothing.geojson").write_text(json.dumps(nowhere))


def write_grids(folder: Path, good: Grid) -> None:
    whole = good.save(folder / "grid.h5").read_bytes()
    (folder / "truncated.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "foreign.h5").write_text("not HDF5")
    with h5py.File(folder / "table.h5", "w") as file:
        file["patients"] = np.arange(5)
    embeddings = good.embeddings.clone()
    embeddings[1, 2, 0, 3] = float("nan")
    for name, changes in {
        "nan": {"embeddings": embeddings},
        "uni": {"encoder": {**good.encoder, "name": "uni_v1"}},
        "retrained": {"encoder": {**good.encoder, "weights_hash": "0" * 64}},
        "narrow": {"embeddings": good.embeddings[..., :5], "encoder": {}},
        "scale": {"mpp": 0.25},
        "cells": {"cell_px": 4 * PATCH_PX},
    }.items():
        dataclasses.replace(good, **changes).save(folder / f"{name}.h5")
    for name, shape in {"none": (0, 3, 1, 12), "huge": (10**7, 10**7, 1, 12)}.items():
        shutil.copy(folder / "grid.h5", folder / f"{name}.h5")
        with h5py.File(folder / f"{name}.h5", "r+") as file:
            file["ssldiff_fast"].attrs["shape"] = shape


def write_models(folder: Path) -> None:
    for name in ("truncated", "foreign", "stranger", "weightless"):
        shutil.copytree(folder / "tiny", folder / name)
    weights = (folder / "tiny" / "model.safetensors").read_bytes()
    (folder / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "foreign" / "model.safetensors").write_bytes(b"PK\x03\x04 something else" * 100)
    from safetensors.torch import save_file

    save_file({"bert.pooler": torch.ones(3)}, folder / "stranger" / "model.safetensors")
    (folder / "weightless" / "model.safetensors").unlink()
    run = write_run(folder / "run", full_state(small_model()))
    checkpoint = run / "checkpoints" / "last.ckpt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    write_run(folder / "notebook", {"cells": [1, 2, 3]})
    (folder / "bare.ckpt").write_bytes(whole)  # without its YAML


@pytest.fixture
def refused(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refused:
    """Runs a command in an empty folder; returns the sentence that it ends with."""
    monkeypatch.chdir(tmp_path)
    for network in (UNet, VQModel, Encoder):
        method = "__call__" if network is Encoder else "forward"
        monkeypatch.setattr(network, method, refuse(network.__name__))

    def run(*words: str) -> str:
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        found = [str(inputs / word) if (inputs / word).exists() else word for word in words]
        assert main(found) == 2
        said = capsys.readouterr()
        lines = said.err.strip().splitlines()
        assert len(lines) == 1 or lines[0].startswith("Usage: ")
        assert lines[-1].startswith(("ssldiff: ", "Error: "))
        after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        assert after == before
        return lines[-1]

    return run


ENCODE = {
    "no file": (["nothing.svs"], "there is no file nothing.svs"),
    "folder": (["."], "is a folder: give the slide file in it"),
    "text": (["notes.svs"], "neither a slide that OpenSlide reads nor"),
    "empty file": (["empty.svs"], "neither a slide that OpenSlide reads nor"),
    "truncated": (["truncated.tif"], "truncated"),
    "no mpp": (["silent.tif"], "does not say its mpp (micrometres per pixel): give it"),
    "no mpp, image": (["image.png"], "(command line: --mpp 0.5)"),
    "impossible mpp": (["impossible.tif"], "is 352.8 um per pixel, expected 0.05 to 20"),
    "mpp 0": (["image.png", "--mpp", "0"], "is 0 um per pixel"),
    "mpp negative": (["image.png", "--mpp", "-0.5"], "is -0.5 um per pixel"),
    "mpp nan": (["image.png", "--mpp", "nan"], "is nan um per pixel"),
    "too coarse": (["coarse.tif"], "would invent detail"),
    "outside": (["slide.tif", "--region", "600,0,64,64"], "has 640 x 512 level-0 pixels"),
    "before": (["slide.tif", "--region", "-1,0,64,64"], "choose a region inside"),
    "negative size": (["slide.tif", "--region", "0,0,-64,64"], "positive width and height"),
    "huge size": (["slide.tif", "--region", f"0,0,{10**12},64"], "choose a region inside"),
    "no region": (["slide.tif", "--region", "all"], "is not x,y,width,height"),
    "small slide": (["small.tif"], "smaller than one window of 32 x 32"),
    "small region": (["slide.tif", "--region", "9,9,31,99"], "smaller than one window"),
    "no tissue": (["blank.tif"], "has no tissue in the region"),
    "empty mask": (["slide.tif", "--mask", "nothing.png"], "no tissue in the region"),
    "empty outline": (["slide.tif", "--mask", "nothing.geojson"], "nothing.geojson"),
    "no mask": (["slide.tif", "--mask", "mask.png"], "mask.png"),
    "batch": (["slide.tif", "--batch-size", "0"], "0 is not in the range x>=1"),
    "device": (["slide.tif", "--device", "abacus"], "device is 'abacus', expected cpu, cuda"),
    "model": (["slide.tif", "--model", "he-dema"], "nor a bundled model"),
    "output folder": (["slide.tif", "-o", "no/where.h5"], "folder no does not exist: make it"),
    "output is a folder": (["slide.tif", "-o", "."], "is a folder: give the name of a file"),
}


@pytest.mark.parametrize(("words", "message"), ENCODE.values(), ids=ENCODE.keys())
def test_encode_says_what_is_wrong(refused: Refused, words: list[str], message: str) -> None:
    chosen = [] if "--model" in words else ["--model", "tiny"]
    assert message in refused("encode", *words, *chosen)


SYNTHESIZE: dict[str, tuple[list[str], str]] = {
    "no grid": (["nothing.h5"], "there is no grid file nothing.h5"),
    "foreign grid": (["foreign.h5"], "is not an HDF5 file, or truncated"),
    "truncated grid": (["truncated.h5"], "truncated"),
    "table": (["table.h5"], "expected `features` with `coords`"),
    "nan": (["nan.h5"], "NaN or infinity in 1 cell(s), first at row 1, column 2"),
    "encoder": (["uni.h5"], "by the encoder uni_v1 and the model is conditioned on tiny-encoder"),
    "weights": (["retrained.h5"], "with other weights (000000000000)"),
    "width": (["narrow.h5"], "of width 5 and the model takes 1 of width 12"),
    "scale": (["scale.h5"], "made at 0.25 um per pixel and the model works at 0.5"),
    "cells": (["cells.h5"], "cells are 128 px (64 um) wide and the model takes 32 px (16 um)"),
    "no cells": (["none.h5"], "make it again"),
    "huge grid": (["huge.h5"], "make it again"),
    "no model": (["grid.h5", "--model", "he-dema"], "nor a bundled model"),
    "truncated model": (["grid.h5", "--model", "truncated"], "may be truncated, fetch or copy it"),
    "foreign model": (["grid.h5", "--model", "foreign"], "not a whole safetensors file"),
    "other model": (["grid.h5", "--model", "stranger"], "matches no parameter of the model"),
    "no weights": (["grid.h5", "--model", "weightless"], "but no model.safetensors"),
    "truncated run": (["grid.h5", "--model", "run"], "is no whole checkpoint"),
    "foreign run": (["grid.h5", "--model", "notebook"], "holds no weights"),
    "no YAML": (["grid.h5", "--model", "bare.ckpt"], "no configuration for"),
    "no folder of a model": (["grid.h5", "--model", "."], "holds neither config.json"),
    "preset": (["grid.h5", "--preset", "slow"], "one of authors, fast, paper"),
    "device": (["grid.h5", "--device", "abacus"], "device is 'abacus'"),
    "dtype": (["grid.h5", "--dtype", "int8"], "dtype is 'int8', expected one of float32"),
    "codec": (["grid.h5", "--codec", "gif"], "codec 'gif' is unknown"),
    "suffix": (["grid.h5", "-o", "out.jpg"], "must be one of .tif or .tiff"),
    "format": (["grid.h5", "--format", "svs"], "format 'svs' is unknown"),
    "another format": (
        ["grid.h5", "-o", "out.dzi", "--format", "cog"],
        "format 'cog' does not fit the output 'out.dzi': name it with .tif, or choose dzi",
    ),
    "crs": (["grid.h5", "--crs", "EPSG:32633"], "belong together"),
    "no suffix": (["grid.h5", "-o", "out"], "must be one of .tif or .tiff"),
    "steps": (["grid.h5", "--steps", "-4"], "steps is -4, but it must be above zero"),
    "many steps": (["grid.h5", "--steps", "5000"], "steps is 5000; expected 1 to 1000"),
    "stride": (["grid.h5", "--stride", "0"], "stride is 0, but it must be from 1"),
    "wide stride": (["grid.h5", "--stride", "9"], "from 1 to the window's 8 latents"),
    "tiles": (["grid.h5", "--decode-stride", "99"], "decode_stride is 99"),
    "eta": (["grid.h5", "--eta", "-1", "--preset", "paper"], "eta is -1.0"),
    "no noise": (["grid.h5", "--eta", "0.5"], "this solver draws no noise"),
    "scale of guidance": (["grid.h5", "--guidance-scale", "nan"], "guidance_scale is nan"),
    "seed": (["grid.h5", "--seed", "-1"], "seed is -1; expected an integer from 0"),
    "long seed": (["grid.h5", "--seed", str(2**64)], "expected an integer from 0 to 2^64 - 1"),
    "batch": (["grid.h5", "--batch-size", "-1"], "-1 is not in the range x>=1"),
}


@pytest.mark.parametrize(("words", "message"), SYNTHESIZE.values(), ids=SYNTHESIZE.keys())
def test_synthesize_says_what_is_wrong(refused: Refused, words: list[str], message: str) -> None:
    model = [] if "--model" in words else ["--model", "tiny"]
    out = [] if "-o" in words else ["-o", "out.tif"]
    assert message in refused("synthesize", *words, *model, *out)


DEMO = {
    "no slide": (["--slide", "nothing.svs"], "there is no file nothing.svs"),
    "no mpp": (["--slide", "image.png"], "--mpp 0.5"),
    "small": (["--slide", "small.tif"], "take a larger slide"),
    "preset": (["--slide", "slide.tif", "--preset", "slow"], "one of authors, fast, paper"),
    "seed": (["--slide", "slide.tif", "--seed", "-1"], "seed is -1"),
    "device": (["--slide", "slide.tif", "--device", "abacus"], "device is 'abacus'"),
    "region": (["--slide", "slide.tif", "--region", "0,0,9999,9999"], "choose a region inside"),
}


@pytest.mark.parametrize(("words", "message"), DEMO.values(), ids=DEMO.keys())
def test_the_demo_says_what_is_wrong(refused: Refused, words: list[str], message: str) -> None:
    assert message in refused("demo", *words, "--model", "tiny", "-o", "out")


# Each makes an output, whose name follows.
OUTPUTS = {
    "encode": (["encode", "slide.tif", "--model", "tiny", "-o"], "out.h5"),
    "slide": (["synthesize", "grid.h5", "--model", "tiny", "-o"], "out.tif"),
    "image": (["synthesize", "grid.h5", "--model", "tiny", "-o"], "out.png"),
    "demo": (["demo", "--slide", "slide.tif", "--model", "tiny", "-o"], "out"),
}


@pytest.fixture(params=OUTPUTS.values(), ids=OUTPUTS.keys())
def output(request: pytest.FixtureRequest) -> tuple[list[str], str]:
    return request.param


@dataclasses.dataclass
class Usage:
    free: int


def test_a_folder_that_cannot_be_written_is_named(
    refused: Refused, tmp_path: Path, output: tuple[list[str], str]
) -> None:
    words, name = output
    folder = unwritable_folder(tmp_path / "locked")
    said = refused(*words, str(folder / name))
    assert str(folder) in said
    assert "choose another folder" in said


def test_a_full_disk_is_found_before_the_work(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, output: tuple[list[str], str]
) -> None:
    words, name = output
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=1000))
    assert "has 1000 bytes free: make room" in refused(*words, name)


def test_an_existing_output_is_kept(refused: Refused, output: tuple[list[str], str]) -> None:
    words, name = output
    path = Path(name)
    if name == "out":
        path.mkdir()
        path = path / "preview.png"
    path.write_bytes(b"precious")
    assert "--overwrite" in refused(*words, name)
    assert path.read_bytes() == b"precious"


def test_the_json_beside_an_output_is_kept_too(refused: Refused) -> None:
    Path("out.tif.json").write_text("notes")
    words = ["synthesize", "grid.h5", "--model", "tiny", "-o", "out.tif"]
    assert "out.tif.json exists and is kept" in refused(*words)


def test_a_file_is_not_taken_for_the_demos_folder(refused: Refused) -> None:
    Path("out").write_text("notes")
    words = ["demo", "--slide", "slide.tif", "--model", "tiny", "-o", "out"]
    assert "the output folder out cannot be made (File exists)" in refused(*words)
