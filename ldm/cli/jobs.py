"""Runs with settings of their own: what the lines of a file of prompts ask for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm.addons import Tags, lora_files, taken_loras
from ldm.cli import options
from ldm.cli.options import MOST_PICTURES
from ldm.cli.parser import Arguments
from ldm.cli.values import Wishes
from ldm.errors import InputError
from ldm.modules.tome.config import ToMeWish
from ldm.settings import Settings
from ldm.text import parse_json


@dataclass(frozen=True)
class Job:
    """One run: the settings, and what is asked of Token Merging.

    Attributes:
        settings: what is drawn, and how.
        tome: what is merged.
        where: file and line that ask for it, if it is one of a file.
    """

    settings: Settings
    tome: ToMeWish
    where: str = ""

    def with_prompt(self, prompt: str) -> Job:
        """This run, of a prompt if it has none of its own."""
        if self.settings.prompt is not None:
            return self
        return replace(self, settings=replace(self.settings, prompt=prompt))


def read_jobs(args: Arguments) -> list[Job]:
    """The runs that a command line asks for: one, or what is in the file of ``--from-file``.

    A line of the file is a prompt, or a JSON object with flags by their names, such as
    ``{"prompt": "hills", "steps": 30, "tome": {"ratio": 0.4}}``, over those of the command line.
    Lines with the same flags are one run, drawn in batches. Picture i of the file uses seed + i,
    where its line names no seed.

    Raises:
        InputError: a value is out of range, a LoRA is not there, or the file cannot be used; the
            message has the line.
    """
    wishes = options.wishes(args)
    if args.from_file is None:
        options.refuse_repeat(args)
        lora_files(taken_loras(args.prompt or "")[1])
        return [Job(wishes.settings(), wishes.tome)]
    where = "standard input" if args.from_file == "-" else args.from_file
    lines = options.read_lines(args.from_file, args.repeat)
    runs: list[tuple[str, dict[str, Any], Wishes, list[str]]] = []
    known: set[Tags] = set()
    uses_flag = False
    for number, line in lines:
        at = f"{where}, line {number}"
        changes = _changes(line, at)
        uses_flag |= changes.get("prompt") is None
        try:
            own = wishes.changed(changes)
            prompt = own.given.get("prompt")
            tags = taken_loras(prompt or "")[1]
            if tags not in known:
                lora_files(tags)
            known.add(tags)
        except InputError as error:
            raise InputError(f"{at}: {error}") from None
        if prompt is None:
            raise InputError(f"{at}: there is no prompt in it")
        others = {name: value for name, value in changes.items() if name != "prompt"}
        if not runs or runs[-1][1] != others or "seed" in others:
            runs.append((at, others, own, []))
        runs[-1][3].extend(itertools.repeat(prompt, args.repeat))
    if not uses_flag:
        options.say_unused_prompt(args)
    seed = Settings(seed=args.seed).seed  # the same for the whole file, also where one is chosen
    jobs: list[Job] = []
    for at, changes, own, prompts in runs:
        try:
            if changes.get("seed") is None:
                own = own.changed({"seed": seed})
            job = Job(own.settings(prompts), own.tome, at)
        except InputError as error:
            raise InputError(f"{at}: {error}") from None
        jobs.append(job)
        seed += job.settings.n_pictures
    return jobs


def prompts_of(jobs: Sequence[Job]) -> list[str]:
    """All prompts of the runs."""
    return [prompt for job in jobs for prompt in job.settings.prompts]


def check_skip(args: Arguments) -> None:
    """Refuse --skip where pictures depend on those before.

    Raises:
        InputError: they do.
    """
    if args.skip and (args.rng == "upstream" or args.fixed_code):
        raise InputError(
            f"--skip {args.skip}: with --rng upstream and --fixed_code pictures depend on those "
            "before"
        )


def without_first(jobs: list[Job], n: int) -> list[Job]:
    """The runs without their first n pictures, which have been drawn before.

    Raises:
        InputError: there are not so many, or too many.
    """
    left = []
    for job in jobs:
        settings = job.settings
        n_pictures = settings.n_pictures
        if n == 0:
            left.append(job)
        elif n < n_pictures:
            if n_pictures > MOST_PICTURES:
                raise InputError(f"--skip is for runs of at most {MOST_PICTURES} pictures")
            pictures = [picture for batch in settings.batches() for picture in batch][n:]
            prompts = tuple(prompt for prompt, _ in pictures)
            rest = replace(settings, prompt=prompts, seed=pictures[0][1], n_iter=1)
            left.append(replace(job, settings=rest))
        n = max(0, n - n_pictures)
    if not left:
        raise InputError("--skip: there are not so many pictures, so nothing would be drawn")
    return left


def _changes(line: str, where: str) -> dict[str, Any]:
    """What a line says: flags by their names, among them the prompt."""
    return parse_json(line, where) if line.startswith("{") else {"prompt": line}
