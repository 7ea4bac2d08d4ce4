"""Runs with settings of their own: what the lines of a file of prompts ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ldm.cli import flags
from ldm.config import TomeKeys
from ldm.errors import InputError
from ldm.settings import Settings


@dataclass(frozen=True)
class Job:
    """One run: the settings, and those of Token Merging (see Pipeline.from_checkpoint)."""

    settings: Settings
    tome: TomeKeys


def read_jobs(parser: flags.Parser, args: flags.Arguments) -> list[Job]:
    """The runs that a command line asks for: one, or what is in the file of ``--from-file``.

    A line of the file is a prompt, or a JSON object with flags by their names, such as
    ``{"prompt": "hills", "steps": 30, "tome": {"ratio": 0.4}}``, over those of the command line.
    Lines with the same flags are one run, drawn in batches. Picture i of the file uses seed + i,
    where its line names no seed.

    Raises:
        InputError: a value is out of range, or the file cannot be used; the message has the line.
    """
    if args.from_file is None:
        return [Job(flags.settings(args), flags.tome_arguments(args))]
    runs: list[tuple[int, dict[str, Any], list[str]]] = []
    for number, line in flags.read_lines(args.from_file, args.repeat):
        changes = _changes(line, f"{args.from_file}, line {number}")
        prompt = changes.pop("prompt", args.prompt)
        if not isinstance(prompt, str):
            raise InputError(f"{args.from_file}, line {number}: there is no prompt in it")
        if runs:
            first, before, prompts = runs[-1]
            if before == changes and ("seed" not in changes or first == number):
                prompts.append(prompt)
                continue
        runs.append((number, changes, [prompt]))
    seed = Settings(seed=args.seed).seed  # the same for the whole file, also where one is chosen
    jobs: list[Job] = []
    for number, changes, prompts in runs:
        try:
            own = parser.changed(args, {"seed": seed, **changes})
            own.prompt, own.from_file, own.repeat = prompts, None, 1
            job = Job(flags.settings(own), flags.tome_arguments(own))
        except InputError as error:
            raise InputError(f"{args.from_file}, line {number}: {error}") from None
        jobs.append(job)
        seed += sum(len(batch) for batch in job.settings.batches())
    return jobs


def _changes(line: str, where: str) -> dict[str, Any]:
    """What a line says: flags by their names, among them the prompt."""
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not a JSON object ({error})") from None
