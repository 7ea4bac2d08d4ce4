"""Draw every picture of a plan that is not there yet, and measure it at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.demo.scenes import Scene
from ldm.distributed import ALONE, Process
from ldm.errors import InputError
from ldm.evaluation.appendix_f.controls import control
from ldm.evaluation.appendix_f.measures import Judge
from ldm.evaluation.appendix_f.plan import Batch, Plan, Setting
from ldm.evaluation.appendix_f.store import Store
from ldm.images import to_pixels
from ldm.modules.attention import set_attention_backend
from ldm.modules.tome.config import ToMeConfig
from ldm.pipeline import Pipeline
from ldm.sampling import Texts, decode, draw
from ldm.settings import Settings

OTHER_BACKEND = {"sdpa": "einsum", "einsum": "sdpa"}

logger = logging.getLogger(__name__)


@dataclass
class Sweep:
    """A plan with all that it takes to carry it out.

    Attributes:
        pipeline: the model.
        plan: what to draw.
        store: where results go.
        judge: measures the pictures.
        scenes: what each prompt names, where that is known.
        process: this one, among those that share the work.
    """

    pipeline: Pipeline
    plan: Plan
    store: Store
    judge: Judge
    scenes: Sequence[Scene] | None = None
    process: Process = ALONE

    def run(self) -> None:
        """Draw this process's share of the pictures that are missing.

        Batch after batch, all settings for the same noise in turn, so that at any moment the
        settings can be compared on what is there.
        """
        batches = self.process.share(self.plan.batches())
        cheapest = min(self.plan.sizes)
        left = [
            ((batch.size / cheapest) ** 2 * len(batch.pictures), setting)
            for batch in batches
            for setting in self.plan.settings[batch.size]
            if not all(self.store.path(setting, batch.size, i).exists() for i in batch.numbers)
        ]
        runs: dict[int, Run] = {}
        with tqdm(
            total=sum(cost for cost, _ in left),
            unit="picture",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left",
            disable=not self.process.is_first,
        ) as bar:
            for batch in batches:
                if batch.size not in runs:
                    runs = {batch.size: self._run_of(batch.size)}
                bar.set_description(f"{batch.size}x{batch.size}, picture {batch.first}")
                for _ in self._batch(runs[batch.size], batch):
                    bar.update((batch.size / cheapest) ** 2 * len(batch.pictures))

    def _run_of(self, size: int) -> Run:
        settings = replace(self.plan.sampling, H=size, W=size)
        return Run(settings, Texts(self.pipeline.model, settings))

    def _batch(self, run: Run, batch: Batch) -> Iterator[None]:
        """Draw what a batch lacks; yields after each setting that was drawn."""
        unmerged, *others = self.plan.settings[batch.size]
        is_there = self.store.rows(unmerged, batch) is not None
        missing = [s for s in others if self.store.rows(s, batch) is None]
        if is_there and not missing:
            return
        reference = self._draw(run, unmerged, batch)
        if is_there and self._differs(unmerged, batch, reference):
            logger.warning(
                "pictures %d to %d do not come out as before on this machine; all settings of "
                "them are drawn anew, so that they can be compared",
                *(batch.first, batch.numbers[-1]),
            )
            is_there, missing = False, others
        if not is_there:
            self._add(run, unmerged, batch, reference, None)
            yield
        names = tqdm(missing, leave=False, unit="setting", disable=not self.process.is_first)
        for setting in names:
            names.set_description(setting.name)
            self._add(run, setting, batch, self._draw(run, setting, batch), reference)
            yield

    def _draw(self, run: Run, setting: Setting, batch: Batch) -> Drawn:
        model, unet = self.pipeline.model, self.pipeline.model.model.diffusion_model
        before = _dtypes(self.pipeline)
        start = time.perf_counter()
        with in_force(unet, setting, self.pipeline.attention, batch.first):
            run.texts.trims = unet.tome.config.context == "trim"
            latents = draw(model, run.settings, batch.pictures, run.texts)
            saved = None if setting.control else unet.tome.saved_work()
        pictures = torch.cat([decode(model, one) for one in latents.split(1)]).clamp(-1, 1)
        if _dtypes(self.pipeline) != before:
            raise InputError(
                "numbers became too large for this type, so pictures could not be compared with "
                "each other: begin again with --dtype float32 and another --outdir"
            )
        return Drawn(pictures, time.perf_counter() - start, saved)

    def _differs(self, setting: Setting, batch: Batch, drawn: Drawn) -> bool:
        there = [self.store.pixels(setting, batch.size, i) for i in batch.numbers]
        return not np.array_equal(np.stack(there), to_pixels(drawn.pictures))

    def _add(
        self, run: Run, setting: Setting, batch: Batch, drawn: Drawn, reference: Drawn | None
    ) -> None:
        scenes = None
        if self.scenes is not None:
            scenes = [self.scenes[i // self.plan.n_seeds] for i in batch.numbers]
        compared = None if reference is None else reference.pictures
        prompts = [prompt for prompt, _ in batch.pictures]
        rows = self.judge.rows(drawn.pictures, compared, prompts, scenes)
        for row in rows:
            row["seconds"] = drawn.seconds / len(rows)
            row["saved_work"] = drawn.saved_work
        about = [
            {**self.pipeline.about(run.settings, prompt, seed), "tome": setting.keys()}
            for prompt, seed in batch.pictures
        ]
        self.store.add(setting, batch, list(to_pixels(drawn.pictures)), about, rows)


@dataclass(frozen=True)
class Run:
    """Settings of one size, and the prompts as they are read for it."""

    settings: Settings
    texts: Texts


@dataclass(frozen=True)
class Drawn:
    """A batch of pictures.

    Attributes:
        pictures: (B, 3, H, W), float32 in [-1, 1].
        seconds: that they took, all together.
        saved_work: share of the self-attention work; None for a control.
    """

    pictures: Tensor
    seconds: float
    saved_work: float | None


@contextmanager
def in_force(unet: Any, setting: Setting, attention: str, seed: int) -> Iterator[None]:
    """Let a U-Net draw as a setting says, as long as the context lasts.

    Args:
        unet: a UNetModel.
        setting: which.
        attention: its backend otherwise.
        seed: of the random choices of a control.
    """
    before = unet.tome.config
    unet.tome.configure(ToMeConfig() if setting.control else setting.config)
    try:
        if setting.control == "rounding":
            set_attention_backend(unet, OTHER_BACKEND[attention])
            yield
        elif setting.control in ("", "again"):
            yield
        else:
            ratio = setting.config.ratio
            with control(unet, setting.control, float(ratio or 0), seed):
                yield
    finally:
        set_attention_backend(unet, attention)
        unet.tome.configure(before)


def _dtypes(pipeline: Pipeline) -> list[torch.dtype]:
    """Types of the parts; they change where numbers became too large."""
    model = pipeline.model
    parts = (model.model, model.first_stage_model, model.cond_stage_model)
    return [next(part.parameters()).dtype for part in parts]
