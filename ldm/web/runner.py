"""Draws what the page and the API ask for, with one model loaded. Knows neither of them."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ldm import images
from ldm.addons import offered
from ldm.checkpoint.load import CheckpointInfo, inspect_checkpoint
from ldm.config import AskedTome, model_tome
from ldm.errors import InputError, shown
from ldm.images import Gallery, Picture, Pixels
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.tally import describe
from ldm.numbered import Numbers
from ldm.pipeline import Pipeline
from ldm.settings import Settings
from ldm.web.preview import Preview
from ldm.web.queue import Stopped
from ldm.web.report import Report, Shown
from ldm.web.task import Draw, DrawJob, Grid, Guide, Task

PREVIEW_EVERY = 0.5  # seconds at least between two previews
CELL = 192  # pixels that a picture of a grid is wide, at least


class _Skipped(Exception):
    """The user wants the next picture."""


class Runner:
    """Draws with the model that was used last, which stays loaded.

    Args:
        models: checkpoints by the names that the page shows.
        arguments: of Pipeline.from_checkpoint, but for the path.
        gallery: where pictures are saved.
        own: the model that ``config``, ``parameterization`` and ``ema`` are about; None: all.

    Attributes:
        loaded: the name of the model in memory, or on its way there, or None.
        pipeline: that model, or None.
    """

    def __init__(
        self,
        models: Mapping[str, Path],
        arguments: Mapping[str, Any],
        gallery: Gallery,
        own: str | None = None,
    ) -> None:
        self.models = models
        self.arguments = arguments
        self.own = own
        self.gallery = gallery
        self.loaded: str | None = None
        self._vae = ""
        self._guided = False  # by a ControlNet of the last job
        self.pipeline: Pipeline | None = None
        self._preview: Preview | None = None
        self._infos: dict[str, CheckpointInfo] = {}

    def info(self, model: str) -> CheckpointInfo:
        """What a checkpoint's header says.

        Raises:
            InputError: there is no such model, or it cannot be used.
        """
        if not isinstance(model, str) or model not in self.models:
            raise InputError(f"Model {shown(model)}: choose one of {', '.join(self.models)}")
        if model not in self._infos:
            names = ("config", "parameterization", "ema", "vae")
            given = (self._given(model)[name] for name in names)
            self._infos[model] = inspect_checkpoint(self.models[model], *given)
        return self._infos[model]

    def _given(self, model: str) -> dict[str, Any]:
        """The arguments for a model: what the command line says of one file holds for no other."""
        others = {"config": None, "parameterization": None, "ema": False}
        return {**self.arguments, **({} if self.own in (None, model) else others)}

    def resolve(self, model: str, tome: AskedTome) -> ToMeConfig:
        """Token Merging settings over those of a model's YAML.

        Raises:
            InputError: they cannot be used.
        """
        return model_tome(self.info(model).config, tome)

    def describe(self, model: str, tome: AskedTome) -> str:
        """Token Merging settings in one line, as far as they are known before a run."""
        config = self.resolve(model, tome)
        words = ["off" if one.is_off else describe(one) for one in (config, config.second_pass)]
        return f"ToMe: {'; second pass: '.join(dict.fromkeys(words))}"

    def load(self, model: str, vae: str = "") -> Pipeline:
        """The pipeline of a model; the one before is given up, if the new file looks right.

        Args:
            model: its name.
            vae: a name among ``models/vae``; empty: the model's own.

        Raises:
            InputError: the checkpoint cannot be used.
        """
        if self.pipeline is None or (model, vae) != (self.loaded, self._vae):
            self.info(model)
            arguments = self._given(model)
            if vae:
                arguments["vae"] = offered("vae", vae)
            self.pipeline = self._preview = None  # two may be too much for memory
            self._guided = False
            self.loaded, self._vae = model, vae  # while it loads, others already ask which it is
            try:
                self.pipeline = Pipeline.from_checkpoint(path=self.models[model], **arguments)
            except BaseException:
                self.loaded = None
                raise
            self._preview = Preview(self.pipeline.model)
        return self.pipeline

    def work(self, job: DrawJob) -> None:
        """Draw and save the pictures of a job, and report.

        Raises:
            InputError: something of the task cannot be used.
            Stopped: the user has stopped it.
        """
        report, task = job.report, job.task
        with _Listening(report, job):
            report.text = f"loading {task.model}" if task.model != self.loaded else "starting"
            job.tell()
            pipeline = self.load(task.model, task.vae)
            self._guide(pipeline, task.guide)
            watch = _Watch(self._preview, job)
            results: list[tuple[Pixels, float] | None] = []
            for draw in task.draws:
                results.append(self._draw(pipeline, draw, watch))
            if task.grid is not None:
                self._save_grid(task, task.grid, results, report)

    # --- parts of a job ---------------------------------------------------------------------

    def _guide(self, pipeline: Pipeline, guide: Guide | None) -> None:
        """Let a job's ControlNet guide it, or else the program's own, if there is one."""
        if guide is None and self._guided:
            pipeline.set_control(**(self.arguments.get("control") or {}))
        elif guide is not None:
            path = offered("controlnet", guide.net)
            pipeline.set_control(path, guide.picture, guide.strength, guide.finds_edges)
        self._guided = guide is not None

    def _draw(self, pipeline: Pipeline, draw: Draw, watch: _Watch) -> tuple[Pixels, float] | None:
        """Pictures of one choice of settings; returns the first, and the seconds for all."""
        task, report = watch.job.task, watch.job.report
        config = pipeline.tome_config(draw.tome)
        pipeline.set_tome(config)
        notes = {} if task.init is None else {"init_img": task.init_name}
        first: Pixels | None = None
        watch.start(draw.settings.n_iter)
        for settings in _pieces(draw.settings):
            watch.job.skip.clear()
            report.n_at_once = settings.n_pictures
            watch.go_on()
            drawn = pipeline.generate(
                settings, task.init, mask=task.mask, notes=notes, on_step=watch
            )
            try:
                for i, picture in enumerate(drawn):
                    watch.pause()
                    self._save(picture, draw.label, report)
                    watch.learn(picture.pixels, i)
                    first = picture.pixels if first is None else first
                    watch.check()
                    watch.go_on()
            except _Skipped:
                n = settings.n_pictures
                report.say("One picture was skipped" if n == 1 else f"{n} pictures were skipped")
            watch.pause()
            watch.next_piece()
        median = watch.step_seconds
        step = "" if median is None else f", {median:.3g} s a step"
        if task.grid is None and first is not None:
            what = "Without" if config.changes_nothing else "With"
            report.say(f"{what} merging: {watch.seconds:.3g} s{step}")
        return None if first is None else (first, watch.seconds)

    def _save(self, picture: Picture, label: str, report: Report) -> None:
        path = self.gallery.add(picture)
        assert path is not None
        report.pictures.append(Shown(f"samples/{path.name}", label))
        report.infos.append(dict(picture.settings))
        report.say(f"Saved {path}")

    def _save_grid(
        self,
        task: Task,
        grid: Grid,
        results: list[tuple[Pixels, float] | None],
        report: Report,
    ) -> None:
        """Save all cells in one picture: words, time, and distance to the unmerged one below."""
        cells = []
        for cell, unmerged in zip(grid.cells, grid.unmerged, strict=True):
            drawn, plain = results[cell], results[unmerged]
            if drawn is None:
                cells.append(np.full((CELL, CELL, 3), 255, np.uint8))
                continue
            facts = f"{drawn[1]:.3g} s, "
            if cell == unmerged:
                facts += "unmerged"
            elif plain is not None:
                facts += f"{_psnr(drawn[0], plain[0])} to unmerged"
            words = task.draws[cell].label.split(" | ")
            cells.append(images.label(_enlarged(drawn[0]), [*words, facts]))
        about = {**report.infos[0], "grid": [draw.label for draw in task.draws]}
        picture = Picture(images.make_grid(cells, grid.n_columns), about)
        path = Numbers(self.gallery.folder, "grid-{:04}.png").save(picture.write)
        report.pictures.append(Shown(path.name, "grid"))
        report.infos.append(about)
        report.say(f"Saved {path}")


def _pieces(settings: Settings) -> Iterator[Settings]:
    """A batch at a time, with the noise that it has in the whole; one piece where that depends."""
    if settings.rng != "image" or settings.fixed_code or not isinstance(settings.prompt, str):
        yield settings
        return
    for i in range(settings.n_iter):
        seed = settings.seed + i * settings.n_samples
        yield dataclasses.replace(settings, n_iter=1, seed=seed)


def _enlarged(pixels: Pixels) -> Pixels:
    factor = -(-CELL // pixels.shape[1])
    return pixels.repeat(factor, 0).repeat(factor, 1)


def _psnr(one: Pixels, other: Pixels) -> str:
    """How near two pictures are; 48 dB are differences that a screen hardly shows."""
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return "identical" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB"


class _Watch:
    """Follows the steps of a job: tells the progress, measures time, stops or skips if wanted."""

    def __init__(self, preview: Preview | None, job: DrawJob) -> None:
        assert preview is not None
        self.preview, self.job = preview, job
        self.seconds = 0.0
        self._steps: list[float] = []
        self._shown = time.monotonic()
        self._latents: Tensor | None = None
        self._n_pieces = 1
        self._piece = 0
        self._n_draws = len(job.task.draws)
        self._draw = -1
        self._n_before = 0  # pictures of the draws before
        self._pass = 0
        self.go_on()

    def start(self, n_pieces: int) -> None:
        """A draw begins, of so many pieces."""
        if self._draw >= 0:
            before = self.job.task.draws[self._draw].settings
            self._n_before += before.n_iter * before.n_samples
        self.seconds, self._steps = 0.0, []
        self._n_pieces, self._piece, self._pass = n_pieces, 0, 0
        self._draw += 1

    def next_piece(self) -> None:
        """A batch is finished, or skipped."""
        self._piece, self._pass = self._piece + 1, 0
        self.check()

    def __call__(self, index: int, n_steps: int, predicted: Tensor) -> None:
        is_finite = bool(predicted.isfinite().all())  # waits for the device: the step is over
        taken = self.pause()
        self.check()
        if self.job.skip.is_set():
            raise _Skipped
        if index > 0:  # the first one has what is done before the steps
            self._steps.append(taken)
        self._latents = predicted if is_finite else None
        is_time = time.monotonic() - self._shown >= PREVIEW_EVERY
        if is_finite and is_time and index + 1 < n_steps:
            self._show(predicted[0])
        self._tell(index + 1, n_steps)
        self.go_on()

    def _show(self, latents: Tensor) -> None:
        report = self.job.report
        report.preview = images.encode_webp(self.preview.pixels(latents), lossless_up_to=0)
        report.n_previews += 1
        self._shown = time.monotonic()

    def _tell(self, step: int, n_steps: int) -> None:
        report, draw = self.job.report, self.job.task.draws[self._draw]
        label = draw.label.replace(" | ", ", ") + (" without merging" if draw.is_plain else "")
        n_passes = 2 if draw.settings.hires_scale > 1 else 1
        done = (self._pass + step / n_steps) / n_passes
        piece = min(self._piece, self._n_pieces - 1)
        share = (self._draw + (piece + min(done, 1.0)) / self._n_pieces) / self._n_draws
        if step == n_steps:
            self._pass += 1
        report.start()
        report.share, report.step = share, (step, n_steps)
        words = [label.strip()] if label.strip() else []
        if report.n_pictures > 1:
            number = self._n_before + piece * draw.settings.n_samples + 1
            last = number + report.n_at_once - 1
            which = f"picture {number}" if last == number else f"pictures {number} to {last}"
            words.append(f"{which} of {report.n_pictures}")
        report.text = ", ".join([*words, f"step {step} of {n_steps}"])
        self.job.tell()

    def check(self) -> None:
        """End the job here if the user wants that."""
        if self.job.stop.is_set():
            raise Stopped

    def pause(self) -> float:
        """Stop the clock; returns the seconds since it went on."""
        taken = time.perf_counter() - self._since
        self.seconds += taken
        return taken

    def go_on(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def learn(self, pixels: Pixels, row: int) -> None:
        """Fit the preview to a finished picture, where its latents were seen."""
        if self._latents is not None:
            self.preview.fit(self._latents[row % len(self._latents)], pixels)
        self.job.report.preview = None

    @property
    def step_seconds(self) -> float | None:
        """The median time of a step."""
        return statistics.median(self._steps) if self._steps else None


class _Listening(logging.Handler):
    """Passes on what the package logs in this thread, as long as the context lasts."""

    def __init__(self, report: Report, job: DrawJob) -> None:
        super().__init__(logging.INFO)
        self.report = report
        self.job = job
        self.thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            text = record.getMessage()
            kind = "tome" if text.startswith("ToMe:") else ""
            if record.levelno >= logging.WARNING:
                text, kind = f"warning: {text}", "warning"
            self.report.say(text, kind)
            self.job.tell()

    def __enter__(self) -> None:
        logging.getLogger("ldm").addHandler(self)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("ldm").removeHandler(self)
