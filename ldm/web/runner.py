"""Runs what the page asks for, one job at a time, and tells how it goes. Knows no page."""

from __future__ import annotations

import logging
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from ldm.checkpoint.load import inspect_checkpoint
from ldm.cli.jobs import Job
from ldm.errors import InputError
from ldm.images import Gallery, Picture, Pixels, load_rgb
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import describe
from ldm.pipeline import Pipeline
from ldm.web.preview import Preview

PREVIEW_EVERY = 0.5  # seconds at least between two previews
WAIT_EVERY = 0.2  # seconds between two looks whether it is one's turn


class Stopped(Exception):
    """The user has stopped a job."""


@dataclass(frozen=True)
class Task:
    """What to draw.

    Attributes:
        model: its name among the runner's models.
        job: settings of the picture and of Token Merging.
        init: img2img: the file to start from.
        init_name: what the user calls it, for the picture's notes.
        compare: draw the same once more without merging.
    """

    model: str
    job: Job
    init: Path | None = None
    init_name: str = ""
    compare: bool = False


@dataclass(frozen=True)
class Progress:
    """How far it is: a text, a share from 0 to 1, and perhaps a preview."""

    text: str
    share: float = 0.0
    preview: Pixels | None = None


@dataclass(frozen=True)
class Message:
    """A line of what the package logs, as the scripts print it."""

    text: str
    is_warning: bool


@dataclass(frozen=True)
class Drawn:
    """A picture and where it is saved."""

    picture: Picture
    path: Path
    is_merged: bool


@dataclass(frozen=True)
class Finished:
    """All pictures of one kind are there.

    Attributes:
        is_merged: with Token Merging.
        seconds: for all of it, without the previews.
        step_seconds: the median step; None where there was a single one.
    """

    is_merged: bool
    seconds: float
    step_seconds: float | None


Event: TypeAlias = Progress | Message | Drawn | Finished
Say: TypeAlias = Callable[[Event], None]


class Runner:
    """Draws with the model that was used last, which stays loaded.

    Args:
        models: checkpoints by the names that the page shows.
        arguments: of Pipeline.from_checkpoint, but for the path.
        gallery: where pictures are saved.

    Attributes:
        loaded: the name of the model in memory, or None.
        pipeline: that model, or None.
    """

    def __init__(
        self, models: Mapping[str, Path], arguments: Mapping[str, Any], gallery: Gallery
    ) -> None:
        self.models = models
        self.arguments = arguments
        self.gallery = gallery
        self.loaded: str | None = None
        self.pipeline: Pipeline | None = None
        self._preview: Preview | None = None
        self._turn = threading.Lock()
        self._stops: set[threading.Event] = set()

    def load(self, model: str, stop: threading.Event | None = None) -> Iterator[Event]:
        """Load a model; what happens is told while it does.

        Raises:
            InputError: the checkpoint cannot be used; the one before is still there, if the file
                already shows it.
            Stopped: the event ``stop`` was set before the turn came.
        """
        return self._run(lambda say: self._use(model, say), stop or threading.Event())

    def draw(self, task: Task, stop: threading.Event | None = None) -> Iterator[Event]:
        """Draw and save pictures; what happens is told while it does.

        Setting ``stop`` ends it after the step under way, as does closing the iterator. Pictures
        that are finished by then stay.

        Raises:
            InputError: something of the task cannot be used.
            Stopped: it was stopped.
        """
        stop = stop or threading.Event()
        return self._run(lambda say: self._draw(task, say, stop), stop)

    def describe(self, tome: Any) -> str:
        """Token Merging settings in one line, as far as they are known before a run.

        Raises:
            InputError: they cannot be used.
        """
        config = self.resolve(tome)
        return "ToMe: off" if config.is_off else f"ToMe: {describe(config)}"

    def resolve(self, tome: Any) -> ToMeConfig:
        """Token Merging settings over those of the loaded model, if there is one."""
        if self.pipeline is not None:
            return self.pipeline.tome_config(tome)
        return ToMeConfig.from_mapping(tome or {})

    def close(self, timeout: float = 60.0) -> None:
        """Stop all jobs, and wait for the one under way: seconds at most."""
        for stop in list(self._stops):
            stop.set()
        if self._turn.acquire(timeout=timeout):
            self._turn.release()

    # --- in a thread of its own -------------------------------------------------------------

    def _run(self, work: Callable[[Say], None], stop: threading.Event) -> Iterator[Event]:
        told: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()
        self._stops.add(stop)

        def run() -> None:
            end: Exception | None = None
            try:
                while not self._turn.acquire(timeout=WAIT_EVERY):
                    _check(stop)
                    told.put(Progress("Waiting for another job"))
                try:
                    with _Listening(told.put):
                        work(told.put)
                finally:
                    self._turn.release()
            except Exception as error:
                end = error
            self._stops.discard(stop)
            told.put(end)

        threading.Thread(target=run, daemon=True).start()
        try:
            while (event := told.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            stop.set()  # nobody listens any more

    def _use(self, model: str, say: Say) -> None:
        if model == self.loaded:
            return
        if model not in self.models:
            raise InputError(f"model {model}: choose one of {', '.join(self.models)}")
        path = self.models[model]
        names = ("config", "parameterization", "ema")
        inspect_checkpoint(path, *(self.arguments[name] for name in names))
        say(Progress(f"Loading {model}"))
        self.loaded = self.pipeline = self._preview = None  # two may be too much for the memory
        self.pipeline = Pipeline.from_checkpoint(path=path, **self.arguments)
        self._preview = Preview(self.pipeline.model)
        self.loaded = model

    def _draw(self, task: Task, say: Say, stop: threading.Event) -> None:
        init = None if task.init is None else load_rgb(task.init)
        notes = {} if init is None else {"init_img": task.init_name or str(task.init)}
        self._use(task.model, say)
        pipeline, preview = self.pipeline, self._preview
        assert pipeline is not None
        assert preview is not None
        wanted = pipeline.tome_config(task.job.tome)
        if task.compare and wanted.is_off:
            raise InputError("there is no merging to compare with: choose a preset or a ratio")
        for tome in (wanted, ToMeConfig()) if task.compare else (wanted,):
            is_merged = not tome.is_off
            kind = ("merged, " if is_merged else "unmerged, ") if task.compare else ""
            pipeline.set_tome(tome)
            watch = _Watch(preview, kind, say, stop)
            pictures = pipeline.generate(task.job.settings, init, notes=notes, on_step=watch)
            for i, picture in enumerate(pictures):
                watch.pause()
                path = self.gallery.add(picture)
                assert path is not None
                say(Drawn(picture, path, is_merged))
                watch.learn(picture.pixels, i)
                watch.go_on()
                _check(stop)
            watch.pause()
            say(Finished(is_merged, watch.seconds, watch.step_seconds))


class _Watch:
    """Follows the steps of a run: tells the progress, measures time, and stops it if wanted."""

    def __init__(self, preview: Preview, kind: str, say: Say, stop: threading.Event) -> None:
        self.preview, self.kind, self.say, self.stop = preview, kind, say, stop
        self.seconds = 0.0
        self._steps: list[float] = []
        self._shown = time.perf_counter()
        self._latents: Tensor | None = None
        self.go_on()

    def __call__(self, index: int, n_steps: int, predicted: Tensor) -> None:
        is_finite = bool(predicted.isfinite().all())  # waits for the device: the step is over
        taken = self.pause()
        _check(self.stop)
        if index > 0:  # the first one has what is done before the steps
            self._steps.append(taken)
        self._latents = predicted if is_finite else None
        share = (index + 1) / n_steps
        shown = None
        is_time = time.perf_counter() - self._shown >= PREVIEW_EVERY
        if is_finite and is_time and index + 1 < n_steps:
            shown = self.preview.pixels(predicted[0])
            self._shown = time.perf_counter()
        self.say(Progress(f"{self.kind}step {index + 1} of {n_steps}", share, shown))
        self.go_on()

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

    @property
    def step_seconds(self) -> float | None:
        """The median time of a step."""
        return statistics.median(self._steps) if self._steps else None


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


class _Listening(logging.Handler):
    """Passes on what the package logs in this thread, as long as the context lasts."""

    def __init__(self, say: Say) -> None:
        super().__init__(logging.INFO)
        self.say = say
        self.thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            self.say(Message(record.getMessage(), record.levelno >= logging.WARNING))

    def __enter__(self) -> None:
        logging.getLogger("ldm").addHandler(self)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("ldm").removeHandler(self)
