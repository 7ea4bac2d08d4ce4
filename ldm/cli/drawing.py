"""What the drawing programs do alike: draw jobs, save pictures, and tell how far they are.

canvas = Canvas(pipeline, gallery, args)
with canvas.pictures(jobs) as pictures:
    for picture in pictures:
        canvas.save(picture)
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ldm.cli.jobs import Job, without_first
from ldm.cli.parser import Arguments
from ldm.cli.program import said_when_stopped
from ldm.distributed import ALONE, Process
from ldm.errors import InputError
from ldm.images import Gallery, Mask, Picture, Pixels
from ldm.modules.tome.config import ToMeConfig
from ldm.numbered import Numbers

if TYPE_CHECKING:  # torch comes only after the flags are checked
    from ldm.pipeline import Pipeline

SECONDS_BETWEEN = 30.0  # lines of a log that is no terminal

logger = logging.getLogger(__name__)


class Progress:
    """Says how far a run of several pictures is, and how long the rest will take.

    Args:
        n_pictures: of the run.
        stream: a terminal gets a line for each batch, a log one now and then.
        clock: seconds.
    """

    def __init__(
        self,
        n_pictures: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n_pictures = n_pictures
        self.n_done = 0
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start = self._last = clock()

    @property
    def shows_steps(self) -> bool:
        """Whether the sampler's own bar is of use: for single pictures, and on a terminal."""
        return self.n_pictures == 1 or self._stream.isatty()

    def step(self) -> None:
        """One more picture is finished."""
        self.n_done += 1
        now = self._clock()
        is_due = self._stream.isatty() or now - self._last >= SECONDS_BETWEEN
        if self.n_done >= self.n_pictures or not is_due:
            return
        self._last = now
        left = (now - self._start) / self.n_done * (self.n_pictures - self.n_done)
        print(
            f"picture {self.n_done} of {self.n_pictures}, about {duration(left)} left",
            file=self._stream,
            flush=True,
        )


def duration(seconds: float) -> str:
    """A time in words: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@dataclass
class Canvas:
    """Where pictures of a run go, and what is told meanwhile.

    Attributes:
        pipeline: what draws.
        gallery: what saves.
        args: the program's; for --profile and for what is said where it is stopped.
        process: this one of those that share the work.
    """

    pipeline: Pipeline
    gallery: Gallery
    args: Arguments
    process: Process = ALONE

    @contextmanager
    def pictures(
        self,
        jobs: Sequence[Job],
        init: Pixels | None = None,
        mask: Mask | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Iterator[Iterator[Picture]]:
        """All pictures of the jobs, each drawn when it is asked for; in the end the grid is saved.

        Raises:
            InputError: a setting cannot be used with this model; nothing has been drawn then.
        """
        pipeline, process = self.pipeline, self.process
        first = jobs[0].settings.seed
        jobs = without_first(
            [job.with_prompt(pipeline.defaults["prompt"]) for job in jobs],
            getattr(self.args, "skip", 0),
        )
        # what cannot be used is said before anything is drawn
        merging = [self._checked(job) for job in jobs]
        n_pictures = sum(job.settings.n_pictures for job in jobs)
        if process.n_processes > 1:  # every picture gets the number that it has without the others
            sizes = [len(batch) for job in jobs for batch in job.settings.batches()]
            numbers = process.share_numbers(sizes)
            self.gallery.expect(numbers)
            n_pictures = len(numbers)
            process.wait()  # until all have looked which numbers are free
        progress = self._progress = Progress(n_pictures)

        def finished() -> str:
            return how_to_go_on(progress, first, self.args, process.n_processes > 1)

        def runs(on_step: Any) -> Iterator[Iterator[Picture]]:
            n_before = 0
            for job, config in zip(jobs, merging, strict=True):
                pipeline.set_tome(config)
                yield pipeline.generate(
                    job.settings,
                    init,
                    mask,
                    progress=process.is_first and progress.shows_steps,
                    notes=notes,
                    process=process.after(n_before),
                    on_step=on_step,
                )
                n_before += len(job.settings.batches())

        with said_when_stopped(finished), self._profile() as on_step:
            yield itertools.chain.from_iterable(runs(on_step))
        self.gallery.close()
        print(where_saved(self.gallery, self.args))

    def _checked(self, job: Job) -> ToMeConfig:
        """What a run merges with this model; raise InputError where it cannot have its settings."""
        try:
            self.pipeline.check(job.settings)
            return self.pipeline.tome_config(job.tome)
        except InputError as error:
            raise InputError(f"{job.where}: {error}" if job.where else str(error)) from None

    def save(self, picture: Picture) -> None:
        """Save one of the pictures."""
        self.gallery.add(picture)
        self._progress.step()

    @contextmanager
    def _profile(self) -> Iterator[Any]:
        if not getattr(self.args, "profile", False):
            yield None
            return
        from ldm.cli.profile import StepProfile

        profile = StepProfile()
        with profile:
            yield profile.on_step
        path = Numbers(Path(self.args.outdir), "trace-{:04}.json").save(profile.write)
        print(f"The trace of a step is in {path}: open it in chrome://tracing or ui.perfetto.dev")


def where_saved(gallery: Gallery, args: Arguments) -> str:
    """Where a finished run's pictures are."""
    if gallery.has_samples or gallery.has_grid:
        return f"Pictures are in {args.outdir}"
    return "No picture was saved, as --skip_save says"


def how_to_go_on(progress: Progress, seed: int, args: Arguments, is_shared: bool = False) -> str:
    """What is finished of a run that was stopped, and the flags that draw the rest."""
    where = "drawn, and not saved" if args.skip_save else f"in {args.outdir}"
    done = f"{progress.n_done} of {progress.n_pictures} pictures are {where}"
    cannot_skip = args.rng == "upstream" or args.fixed_code or not hasattr(args, "skip")
    if cannot_skip or is_shared:
        return f"{done}; the same command draws all of them again"
    seeds = f"--seed {seed} " if args.seed == -1 else ""
    return f"{done}; the same command with {seeds}--skip {args.skip + progress.n_done} goes on"


def tell_more(args: Arguments) -> None:
    """Say more, if --verbose asks for it."""
    if args.verbose:
        logging.getLogger("ldm").setLevel(logging.DEBUG)
        import platform

        import torch

        from ldm import __version__

        logger.debug(
            "Version %s, Python %s, torch %s, %d threads",
            *(__version__, platform.python_version(), torch.__version__, torch.get_num_threads()),
        )
