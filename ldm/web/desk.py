"""Takes what page and API want to have drawn: completes and checks it, and puts it in line."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import torch

from ldm import images
from ldm.device import choose_device, choose_dtype
from ldm.errors import InputError, shown
from ldm.images import Mask, Pixels
from ldm.pipeline import SIZE_LIMIT
from ldm.settings import SIZE_STEP, Settings
from ldm.web import limits
from ldm.web.models import find_addons, offered
from ldm.web.queue import Job, Queue
from ldm.web.report import Report
from ldm.web.runner import Runner
from ldm.web.task import Addons, Draw, Grid, Task

MOST_WEIGHT = 10.0  # of a LoRA, either way
_TAG = re.compile(r"<(\w+):([^:<>]*)(?::([^<>]*))?>")


class Desk:
    """Where jobs are ordered.

    Args:
        runner: what will draw.
        queue: where they wait.
    """

    def __init__(self, runner: Runner, queue: Queue[Task, Report]) -> None:
        self.runner = runner
        self.queue = queue

    def order(
        self,
        model: str,
        draws: Sequence[Draw],
        init: Pixels | None = None,
        mask: Mask | None = None,
        init_name: str = "",
        vae: str = "",
        is_pair: bool = False,
        grid: Grid | None = None,
    ) -> Job[Task, Report]:
        """Accept a job.

        Args:
            model: its name.
            draws: one after the other; what is None in them is the model's choice.
            init: the picture to start from.
            mask: where to paint it.
            init_name: what the user calls it.
            vae: a name among ``models/vae``; empty: the model's own.
            is_pair: two draws are with and without merging.
            grid: how to show all in one picture.

        Raises:
            InputError: something cannot be used, or is too much.
        """
        complete = tuple(self._completed(model, draw, init) for draw in draws)
        if mask is not None and not mask.any():
            raise InputError("there is nothing to paint: brush over the part to be redrawn")
        if vae:
            offered("vae", vae)
        task = Task(model, complete, init, mask, init_name, vae, is_pair, grid)
        if task.n_pictures > limits.MOST_PICTURES:
            raise InputError(
                f"Pictures {task.n_pictures}: allowed are {limits.MOST_PICTURES} in a job"
            )
        first = complete[0].settings
        title = "a grid" if grid is not None else str(first.prompt)[:80]
        report = Report(title, first.seed, task.n_pictures, is_pair)
        return self.queue.add(task, report)

    def _completed(self, model: str, draw: Draw, init: Pixels | None) -> Draw:
        info = self.runner.info(model)
        self.runner.resolve(model, draw.tome)
        settings = draw.settings
        prompt, loras = taken_loras(str(settings.prompt or info.defaults["prompt"]))
        settings = dataclasses.replace(settings, prompt=prompt)
        if init is not None and settings.hires_scale > 1:
            raise InputError(
                f"Enlarge by {settings.hires_scale:g}: not with a picture to start from, whose "
                "size Width and Height say"
            )
        limits.check(self._sized(settings, model, init), info, self._dtype(), self._room())
        words = f"{prompt}\n{settings.negative_prompt}"
        return dataclasses.replace(
            draw, settings=settings, loras=loras, embeddings=named_embeddings(words)
        )

    def _sized(self, settings: Settings, model: str, init: Pixels | None) -> Settings:
        """Settings without None, as the pipeline will have them."""
        defaults = self.runner.info(model).defaults
        if init is not None:
            longest = int(SIZE_LIMIT * max(defaults["H"], defaults["W"]))
            height, width = images.size_for(init, settings.H, settings.W, longest, SIZE_STEP)
            settings = dataclasses.replace(settings, H=height, W=width)
        return settings.filled(defaults)

    def _device(self) -> torch.device:
        return choose_device(self.runner.arguments["device"])

    def _dtype(self) -> str:
        kind = choose_dtype(self.runner.arguments["dtype"], self._device())
        return str(kind).removeprefix("torch.")

    def _room(self) -> int | None:
        return limits.free_memory(self._device())


def taken_loras(prompt: str) -> tuple[str, Addons]:
    """A prompt without its ``<lora:name:0.8>``, and what these name.

    Raises:
        InputError: there is no such file, a weight is no number, or a tag is of another kind.
    """
    loras: list[tuple[str, float]] = []
    known = find_addons("lora")
    for kind, name, weight in _TAG.findall(prompt):
        if kind.lower() != "lora":
            tag = shown(f"<{kind}:{name}>")
            raise InputError(f"Prompt {tag}: only <lora:NAME:WEIGHT> is known")
        if name not in known:
            have = ", ".join(known) or "none yet"
            raise InputError(f"LoRA {shown(name)}: not in models/lora, where there are: {have}")
        try:
            number = float(weight or 1)
        except ValueError:
            number = math.nan
        if not abs(number) <= MOST_WEIGHT:
            raise InputError(f"LoRA {shown(name)}: the weight {shown(weight)} is not -10 to 10")
        loras.append((name, number))
    return (" ".join(_TAG.sub("", prompt).split()) if loras else prompt), tuple(loras)


def named_embeddings(text: str) -> tuple[str, ...]:
    """The files of ``models/embeddings`` whose names are words of a text."""
    return tuple(
        name
        for name in find_addons("embeddings")
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)
    )
