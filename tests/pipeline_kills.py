# SPDX-License-Identifier: Apache-2.0
"""Kills whole syntheses with SIGKILL at random moments: `python pipeline_kills.py FOLDER KILLS`.

Prints one JSON object: kills, how often a run found rows already written, and the digests of each
kind of run with and without kills. PyTorch is imported once, and each run is a fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TypeAlias

import torch

import ssldiff_fast as sf
from ssldiff_fast import pipeline
from ssldiff_fast.canvas import StateFolder, canvas_noise
from ssldiff_fast.canvas.state import remove_state
from ssldiff_fast.models.local_autoencoder import measure_statistics
from ssldiff_fast.slides.writer_state import FILE
from tiny_models import tiny_grid, tiny_model

When: TypeAlias = float | Path | None
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT

KINDS: dict[str, dict[str, Any]] = {
    "wavefront.tif": {"order": "wavefront", "decoder": "local", "mask": True},
    "plain.png": {"order": "plain", "decoder": "reference"},
}


MODEL = tiny_model()
MODEL.set_statistics(
    measure_statistics(MODEL.vae, MODEL.vae.decode, canvas_noise(0, 3, 8, 8)[None])
)


def run(out: Path, settings: dict[str, Any], state: Path | None) -> None:
    folder = None if state is None else StateFolder(state, share=float("inf"))
    options: dict[str, Any] = {"steps": 2, "progress": False, "batch_size": 8, **settings}
    grid = tiny_grid(MODEL, 8, 2)
    grid.valid[:2], grid.valid[4, 1] = False, False
    sf.synthesize(MODEL, grid, out, state=folder, **options)


def forked(out: Path, settings: dict[str, Any], state: Path | None, when: When) -> bool:
    """Whether the run ended before it was killed: after seconds, or when a file is there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(out, settings, state)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if isinstance(when, Path):
        while not when.exists() and not os.waitid(os.P_PID, child, _ENDED):
            time.sleep(0.001)
    elif when is not None:
        time.sleep(when)
    if when is not None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if status:
        raise RuntimeError("a run failed")
    return True


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    random.seed(0)
    # States as often as there is something to save.
    pipeline._SECONDS, pipeline._SPACING = 0.0, 0.0
    report: dict[str, Any] = {"kills": 0, "written before": 0, "digests": {}}
    for name, settings in KINDS.items():
        whole = folder / f"whole.{name}"
        start = time.perf_counter()
        forked(whole, settings, None, None)
        seconds = time.perf_counter() - start
        digests = [hashlib.sha256(whole.read_bytes()).hexdigest()]
        killed = 0
        while killed < kills // len(KINDS):
            out, state = folder / f"out{killed}.{name}", folder / "state"
            in_this_run = 0
            # First as soon as rows are kept, then at any moments, and then no more.
            moments: list[When] = [state / "writer" / FILE]
            moments += [random.uniform(0.02, seconds) for _ in range(4)] + [None]
            while not forked(out, settings, state, moments[in_this_run]):
                report["written before"] += (state / "writer" / FILE).exists()
                killed += 1
                in_this_run += 1
                if out.exists() and not (state / "metadata.json").exists():
                    break  # it had ended: nothing was left to do but to remove an empty folder
            digests.append(hashlib.sha256(out.read_bytes()).hexdigest())
        report["digests"][name] = digests
        report["kills"] += killed
        if state.exists():  # of a run that was killed when it had ended
            remove_state(state)
    report["left"] = sorted(
        path.name for path in folder.iterdir() if path.name.startswith((".", "state"))
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
