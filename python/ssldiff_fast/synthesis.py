# SPDX-License-Identifier: Apache-2.0
"""From a grid to a file: the canvas is denoised, decoded in bands, and streamed to disk."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ssldiff_fast._checks import check_choice, check_count
from ssldiff_fast.canvas.interrupt import Interrupted
from ssldiff_fast.canvas.micro_batch import auto_batch_size
from ssldiff_fast.canvas.noise import check_seed
from ssldiff_fast.canvas.presets import Preset
from ssldiff_fast.canvas.preview import PreviewFile
from ssldiff_fast.canvas.reuse import check_order
from ssldiff_fast.canvas.sampler import ORDERS, StepCallback
from ssldiff_fast.canvas.state import (
    StateFolder,
    difference_of,
    environment,
    going_on,
    remove_state,
)
from ssldiff_fast.canvas.wide import Spill
from ssldiff_fast.models.ldm import LatentDiffusion
from ssldiff_fast.models.threads import measured_threads
from ssldiff_fast.pipeline import Background, PixelSink, needed
from ssldiff_fast.slides.cog import Georeference
from ssldiff_fast.slides.grid import Grid
from ssldiff_fast.slides.output import RowWriter, atomic_bytes, check_output
from ssldiff_fast.slides.raster import sidecar
from ssldiff_fast.slides.writer_state import FILE
from ssldiff_fast.slides.writer_state import remove_state as remove_writer_state
from ssldiff_fast.slides.writers import check_out, open_writer
from ssldiff_fast.synthesis_inputs import loaded_model, opened_grid, wanted_grid
from ssldiff_fast.synthesis_plan import Geometry, Plan, digest, settle
from ssldiff_fast.synthesis_space import WaitingRows

# A canvas with more bytes than this is denoised in the wavefront order.
_WAVEFRONT_BYTES = 2**28


@dataclass(frozen=True)
class Synthesis:
    """What a run made.

    Attributes:
        path: the file.
        size_px: (width, height).
        mpp: micrometres per pixel.
        seconds: of the stages "denoise" and "decode and write".
        recipe: everything besides the seed that decides the bytes.
        seed: the seed.
        evaluations: of the network in the run; a guided pair is two.
        evaluations_saved: those of windows without tissue, which the mask left out.
    """

    path: Path
    size_px: tuple[int, int]
    mpp: float
    seconds: Mapping[str, float]
    recipe: Mapping[str, Any]
    seed: int
    evaluations: int
    evaluations_saved: int


def synthesize(
    model: LatentDiffusion | str | os.PathLike[str],
    grid: Grid | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    preset: str | Preset = "fast",
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    eta: float | None = None,
    reuse: int | None = None,
    stride: int | tuple[int, int] | None = None,
    decode_stride: int | tuple[int, int] | None = None,
    decoder: str | None = None,
    wrap: str | None = None,
    mask: bool = False,
    order: str = "auto",
    batch_size: int | Literal["auto"] = 16,
    format: str | None = None,
    georeference: Georeference | None = None,
    codec: str | None = None,
    quality: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    decoder_dtype: str | None = None,
    execution: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    state: StateFolder | str | os.PathLike[str] | None = None,
    resume: bool | None = None,
    preview: str | os.PathLike[str] | None = None,
    callback_on_step_end: StepCallback | None = None,
) -> Synthesis:
    """Synthesize the large image that a grid describes (paper section 3.2) and write it.

    The same model, grid, seed and settings give the same bytes, after any interruption and on any
    number of threads, on one kind of machine and version of PyTorch (the file's "environment").

    Args:
        model: a loaded model, or what `sf.load` takes.
        grid: a grid, or the path of its HDF5 file. A cell spans one window without overlap.
        out: the file: .tif (tiled pyramidal BigTIFF), .ome.tif, .dzi, .zarr, .geo.tif or .png.
        seed: of the noise.
        preset: "fast", "paper" or "authors"; or a `Preset` of your own.
        steps, guidance_scale, guidance_interval, eta, stride: in place of the preset's own;
            `stride` in latents, one number or (y, x); the interval (low, high) in t, 0 to 999.
        reuse: the network's lower levels are evaluated in every so many steps, and what they made
            is used in the steps between. Changes the result (docs/options.md says by how much);
            for windows that stay, plain order, images of a few thousand pixels.
        decode_stride: distance between the reference decoder's tiles in latents, likewise.
        decoder: "reference" (the published overlapped tiles), "local" (each latent about once with
            the model's fixed statistics, or by tiles that overlap by half, in staggered rows,
            where it has none) or "global" (the whole canvas at once), in place of the preset's.
        wrap: "x", "y" or "both" makes an image that is tileable along it.
        mask: leave out windows without tissue (cells of the grid that are not valid): they become
            plain glass, and cost nothing, nor does decoding them; within three quarters of a window
            what is painted beside tissue hands over to it, its white balanced tile by tile. Without
            it the model paints all.
        order: "plain", one step after another; "wavefront", which finishes the first rows first,
            in memory that does not grow with the image, while they are decoded and written; the
            bytes are the same. "auto" takes it for large canvases.
        batch_size: windows of one network call, at most; belongs to the recipe. "auto" takes the
            fastest that fits into memory, by a short measurement before the run starts. On a GPU a
            number that does not fit is halved until it does, before the run starts.
        format, georeference, codec, quality: of the file, as for `slides.open_writer`.
        device, dtype, decoder_dtype, execution: for a model that is loaded here, as `sf.load` takes
            them; load it yourself for anything else.
        overwrite: replace an existing file.
        progress: show progress with the time that remains.
        state: a folder that keeps the run: after a kill or Ctrl-C the same call goes on and ends
            in the same bytes. It is removed with the end of the run.
        resume: True: there must be a state; False: start over; None: go on where there is one.
        preview: a .png that shows the canvas while it is denoised (plain order).
        callback_on_step_end: called as (denoiser, step, t, {"latents", "denoised"}) every step
            (plain order); the tensors are the run's own and change with the next step.

    Returns:
        What was made, with its recipe and the seconds of each stage.

    Raises:
        ValueError: the grid is of another encoder or width, has NaN, or is smaller than one
            window; a setting is out of range. Nothing has been written then.
        MemoryError: not even one window fits into the GPU's memory. Nothing has been written then.
        OSError: the output exists or cannot be written.
        RuntimeError: NaN or infinity appeared; the message names step and window.
    """
    chosen = settle(
        preset,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        eta=eta,
        reuse=reuse,
    )
    if batch_size != "auto":
        batch_size = check_count("batch_size", batch_size, call="synthesize")
    seed = check_seed(seed)
    check_choice("order", order, ("auto", *ORDERS), call="synthesize")
    # What is quickly known comes before the model, whose weights may take seconds to read.
    # An output may be there from the run that is gone on with; that is looked at below.
    going = state is not None and _Kept.of(state).there
    check_out(out, format=format, overwrite=overwrite or going)
    if preview is not None:
        check_output(preview, overwrite=True)
    cells = opened_grid(grid)
    loaded = loaded_model(model, device, dtype, decoder_dtype, execution)
    cells.check_for(wanted_grid(loaded, cells))
    geometry = Geometry(stride, decode_stride, decoder, wrap, mask)
    if batch_size == "auto":
        batch_size = auto_batch_size(loaded, guided=chosen.guidance_scale != 1.0)
    plan = Plan.make(loaded, cells, chosen, seed, geometry, batch_size)
    callback = _with_preview(callback_on_step_end, preview, plan)
    recipe = plan.recipe()
    metadata = {
        "synthetic": True,
        "seed": seed,
        "recipe": recipe,
        "recipe_hash": digest(recipe),
        "environment": environment(),
        "source_region_px": list(cells.region_px),  # decides no byte, but where to compare
    }
    width, height = plan.size_px
    options: dict[str, Any] = {
        "format": format,
        "georeference": georeference,
        "codec": codec,
        "quality": quality,
        "metadata": metadata,
        "overwrite": overwrite,
    }
    in_order = _settle_order(order, plan, callback)
    with _kept(state, resume) as kept, measured_threads(loaded):
        if kept is not None:
            options["metadata"] = kept.metadata(metadata)
            options["state"] = kept.writer
            if going and kept.has_written(out):  # and was killed before it could say so
                seconds = {"denoise": 0.0, "decode and write": 0.0}
                made = (Path(out), plan.size_px, plan.mpp, seconds, recipe, seed)
                return Synthesis(*made, *plan.evaluations())
        in_files = in_order == "wavefront" and plan.is_on_cpu
        if in_files:
            waiting = WaitingRows.of(plan)
            options["more_bytes"] = waiting.bytes_needed(keeps_state=kept is not None)
        with (
            open_writer(out, width, height, plan.mpp, **options) as writer,
            _dropped_while_empty(writer),
        ):
            folder = None if kept is None else kept.folder.path
            scratch = Spill(Path(out).parent) if in_files else None
            sink = PixelSink(
                plan, writer, saves=folder is not None, progress=progress, scratch=scratch
            )
            shared: dict[str, Any] = {
                "state": kept and kept.folder,
                "resume": resume,
                "progress": progress,
            }
            start = time.perf_counter()
            if in_order == "wavefront":
                rows = plan.rows(seed, durable=sink.durable, scratch=scratch, **shared)
                # Closed here, for a failed run then saves its state while the folder is its own.
                with contextlib.closing(rows), Background(sink.take) as background:
                    for band in needed(rows, sink.first):
                        background.put(band)
                    denoised = time.perf_counter()
            else:
                canvas = plan.denoise(seed, callback=callback, **shared)
                denoised = time.perf_counter()
                sink.take([canvas[:, sink.first :]])
    seconds = {"denoise": denoised - start, "decode and write": time.perf_counter() - denoised}
    made = (Path(out), plan.size_px, plan.mpp, seconds, recipe, seed)
    return Synthesis(*made, *plan.evaluations())


def _settle_order(order: str, plan: Plan, callback: StepCallback | None) -> str:
    """The order of a run; the bytes are the same in each."""
    if order == "auto":
        whole = callback is not None or plan.geometry.wraps[0] or plan.preset.reuse != 1
        return "wavefront" if plan.canvas_bytes > _WAVEFRONT_BYTES and not whole else "plain"
    if order == "wavefront" and callback is not None:
        raise ValueError(
            "synthesize: a callback or preview needs the whole canvas of a step, which the "
            "wavefront order never has; leave it out, or use order='plain'."
        )
    check_order(order, plan.preset.reuse, call="synthesize")
    return order


@dataclass(frozen=True)
class _Kept:
    """The folder of a run's state: the canvas's own, and beside it the writer's."""

    folder: StateFolder

    @classmethod
    def of(cls, state: StateFolder | str | os.PathLike[str]) -> _Kept:
        return cls(state if isinstance(state, StateFolder) else StateFolder(state))

    @property
    def there(self) -> bool:
        """Whether there is a run to go on with."""
        return self._about.exists()

    @property
    def writer(self) -> Path:
        return self.folder.path / "writer"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that a run could go on from."""
        return not (self.folder.files() or (self.writer / FILE).exists())

    def has_written(self, out: str | os.PathLike[str]) -> bool:
        """Whether the output has its name already, and nothing but the state is left to remove."""
        if (self.writer / FILE).exists() or not Path(out).exists():
            return False
        with contextlib.suppress(OSError, ValueError):
            said = json.loads(Path(sidecar(out)).read_text())
            before = self._before() or {}
            return all(said.get(name) == before.get(name) for name in ("seed", "recipe_hash"))
        return False

    @property
    def _about(self) -> Path:
        return self.folder.path / "metadata.json"

    def metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """What the file says of itself: when a run goes on, what it said where it began."""
        before = self._before()
        if before is None:
            atomic_bytes(self._about, json.dumps(metadata).encode())
            return metadata
        here = json.loads(json.dumps({name: metadata[name] for name in ("seed", "recipe")}))
        difference = difference_of({name: before.get(name) for name in here}, here)
        if difference:
            raise self.folder.of_another_run(difference)
        return before

    def _before(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self._about.read_text()))
        except (FileNotFoundError, ValueError):  # none, or damaged
            return None

    def forget(self) -> None:
        """Removes everything of a run that is over, or is to begin anew."""
        self.folder.clear()
        remove_writer_state(self.writer)
        with contextlib.suppress(OSError):
            self.writer.rmdir()
        # Last: without it a run that is killed in between could not tell that it had ended.
        self._about.unlink(missing_ok=True)


@contextlib.contextmanager
def _kept(
    state: StateFolder | str | os.PathLike[str] | None, resume: bool | None
) -> Iterator[_Kept | None]:
    """The state of the whole run, decoding and writing included; removed when it ends well."""
    if state is None:
        if resume:
            raise ValueError("synthesize: resume is True, but there is no state folder; pass it.")
        yield None
        return
    kept = _Kept.of(state)
    with kept.folder:
        if resume is False:
            kept.forget()
        try:
            yield kept
        except BaseException as error:
            if kept.is_empty:
                kept.forget()
            elif isinstance(error, KeyboardInterrupt) and not str(error):
                raise Interrupted(going_on(kept.folder)) from None
            raise
        kept.forget()
    remove_state(kept.folder.path)


@contextlib.contextmanager
def _dropped_while_empty(writer: RowWriter) -> Iterator[None]:
    """A file without a row is not worth keeping when its run fails."""
    try:
        yield
    except BaseException:
        if writer.rows_written == 0:
            writer.abort()
        raise


def _with_preview(
    callback: StepCallback | None, preview: str | os.PathLike[str] | None, plan: Plan
) -> StepCallback | None:
    """The caller's callback, and before it a picture."""
    if preview is None:
        return callback
    picture = PreviewFile(preview, plan.model, last_step=plan.preset.steps - 1)

    def both(
        denoiser: Any, step: int, t: float, shown: dict[str, Tensor]
    ) -> dict[str, Tensor] | None:
        picture(denoiser, step, t, shown)
        return None if callback is None else callback(denoiser, step, t, shown)

    return both
