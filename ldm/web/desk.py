"""Takes what page and API want to have drawn: completes and checks it, and puts it in line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ldm import images
from ldm.addons import lora_files, offered, taken_loras
from ldm.device import choose_device, choose_dtype
from ldm.errors import InputError
from ldm.images import Mask, Pixels
from ldm.pipeline import SIZE_LIMIT
from ldm.settings import SIZE_STEP, Settings
from ldm.web import limits
from ldm.web.queue import Job, Queue
from ldm.web.report import Report
from ldm.web.runner import Runner
from ldm.web.task import Draw, Grid, Guide, Task


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
        guide: Guide | None = None,
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
            guide: what guides their layout.

        Raises:
            InputError: something cannot be used, or is too much.
        """
        complete = tuple(self._completed(model, draw, init) for draw in draws)
        if mask is not None and not mask.any():
            raise InputError("there is nothing to paint: brush over the part to be redrawn")
        if mask is not None and init is not None:
            images.check_shape(mask, init)
        if vae:
            offered("vae", vae)
        if guide is not None:
            offered("controlnet", guide.net)
        task = Task(model, complete, init, mask, init_name, vae, is_pair, grid, guide)
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
        prompt = str(info.defaults["prompt"] if settings.prompt is None else settings.prompt)
        lora_files(taken_loras(prompt)[1])  # which have to be there
        settings = dataclasses.replace(settings, prompt=prompt)
        if init is not None and settings.hires_scale > 1:
            raise InputError(
                f"Enlarge by {settings.hires_scale:g}: not with a picture to start from, whose "
                "size Width and Height say"
            )
        limits.check(self._sized(settings, model, init), info, self._dtype(), self._room())
        return dataclasses.replace(draw, settings=settings)

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
