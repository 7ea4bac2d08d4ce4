"""Draw every picture of a plan that is not there yet, and let networks judge what is there."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.demo.scenes import Scene
from ldm.device import memory_format
from ldm.distributed import ALONE, Process
from ldm.errors import InputError
from ldm.evaluation.appendix_f.controls import control
from ldm.evaluation.appendix_f.distances import distances
from ldm.evaluation.appendix_f.networks import Judge, Looked
from ldm.evaluation.appendix_f.plan import Batch, Plan, Setting
from ldm.evaluation.appendix_f.store import Store
from ldm.evaluation.benchmark.memory import peak_memory
from ldm.images import to_pixels, to_unit
from ldm.modules.attention import set_attention_backend
from ldm.modules.tome.config import ToMeConfig
from ldm.pipeline import Pipeline
from ldm.sampling import Texts, decode, sample

OTHER_BACKEND = {"sdpa": "einsum", "einsum": "sdpa"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """A batch of pictures.

    Attributes:
        pictures: (B, 3, H, W), float32 in [-1, 1].
        seconds: that they took, all together.
        peak_mib: the most memory in use meanwhile, MiB; None where the system does not tell.
        saved_work: share of the self-attention work; None for a control.
    """

    pictures: Tensor
    seconds: float
    peak_mib: float | None
    saved_work: float | None


@dataclass
class Experiment:
    """A plan with all that it takes to carry it out.

    Attributes:
        pipeline: the model.
        plan: what to draw.
        store: where results go.
        judges: networks that look at finished pictures.
        scenes: what each prompt names, where that is known.
        process: this one, among those that share the work.
    """

    pipeline: Pipeline
    plan: Plan
    store: Store
    judges: Sequence[Judge] = ()
    scenes: Sequence[Scene] | None = None
    process: Process = ALONE

    def draw(self) -> None:
        """Draw this process's share of the pictures that are missing.

        Batch after batch, all settings for the same noise in turn, so that at any moment the
        settings can be compared on what is there.
        """
        batches = self.process.share(self.plan.batches())
        with tqdm(
            total=sum(self._cost(b) * self._n_missing(b) for b in batches),
            unit="picture",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left",
            disable=not self.process.is_first,
        ) as bar:
            for batch in batches:
                bar.set_description(f"{batch.size}x{batch.size}, picture {batch.first}")
                for _ in self._draw_missing(batch):
                    bar.update(self._cost(batch))

    def _n_missing(self, batch: Batch) -> int:
        """Settings of which a batch lacks pictures, by the files' names."""
        return sum(
            not all(self.store.path(setting, batch.size, i).exists() for i in batch.numbers)
            for setting in self.plan.settings_of(batch)
        )

    def _cost(self, batch: Batch) -> int:
        return (batch.size // min(self.plan.sizes)) ** 2 * len(batch.pictures)

    def _draw_missing(self, batch: Batch) -> Iterator[None]:
        """Draw what a batch lacks; yields after each setting that was drawn."""
        unmerged, *others = self.plan.settings_of(batch)
        is_there = self.store.rows(unmerged, batch) is not None
        missing = [s for s in others if self.store.rows(s, batch) is None]
        if is_there and not missing:
            return
        reference = self.drawn(unmerged, batch)
        if is_there and self._differs(unmerged, batch, reference):
            logger.warning(
                "pictures %d to %d do not come out as before on this machine; all settings of "
                "them are drawn anew, so that they can be compared",
                *(batch.first, batch.numbers[-1]),
            )
            is_there = False
        if not is_there:
            missing = others  # the distances of those that are there are to another picture
            self.store.remove(batch)
            self._add(unmerged, batch, reference, None)
            yield
        names = tqdm(missing, leave=False, unit="setting", disable=not self.process.is_first)
        for setting in names:
            names.set_description(setting.name)
            self._add(setting, batch, self.drawn(setting, batch), reference)
            yield

    def drawn(self, setting: Setting, batch: Batch, steps: int | None = None) -> Drawn:
        """Draw a batch.

        Args:
            setting: how.
            batch: what.
            steps: another number of them than the plan's or the setting's.

        Raises:
            InputError: numbers became too large for the model's type.
        """
        changes = {**setting.sampling, **({} if steps is None else {"steps": steps})}
        settings = replace(self.plan.sampling, H=batch.size, W=batch.size, **changes)
        model = self.pipeline.model
        unet = model.model.diffusion_model
        before = _dtypes(self.pipeline)
        start = time.perf_counter()
        with peak_memory(model.device) as peak, self._in_force(setting, batch.first):
            self._texts.trims = unet.tome.config.context == "trim"
            latents = sample(model, settings, batch.pictures, self._texts)
            is_merging = not setting.control and not setting.sampling
            saved = unet.tome.saved_work() if is_merging else None
            pictures = torch.cat([decode(model, one) for one in latents.split(1)]).clamp(-1, 1)
        seconds = time.perf_counter() - start
        if _dtypes(self.pipeline) != before:
            raise InputError(
                "numbers became too large for this type, so pictures could not be compared with "
                "each other: begin again with --dtype float32 and another --outdir"
            )
        return Drawn(pictures, seconds, peak.mib, saved)

    @cached_property
    def _texts(self) -> Texts:
        """The prompts as the model reads them."""
        return Texts(self.pipeline.model, replace(self.plan.sampling, prompt=self.plan.prompts))

    @contextmanager
    def _in_force(self, setting: Setting, seed: int) -> Iterator[None]:
        """Let the model draw as a setting says; the seed is of a control's random choices."""
        attention = self.pipeline.attention
        with merging(self.pipeline.model.model.diffusion_model, setting, attention, seed):
            if setting.control == "precision":
                with other_precision(self.pipeline.model.model):
                    yield
            else:
                yield

    def _differs(self, setting: Setting, batch: Batch, drawn: Drawn) -> bool:
        there = [self.store.pixels(setting, batch.size, i) for i in batch.numbers]
        return not np.array_equal(np.stack(there), to_pixels(drawn.pictures))

    def _add(self, setting: Setting, batch: Batch, drawn: Drawn, reference: Drawn | None) -> None:
        rows, about = [], []
        settings = replace(self.plan.sampling, **setting.sampling)
        for i, (prompt, seed) in enumerate(batch.pictures):
            row: dict[str, Any] = {
                "seconds": drawn.seconds / len(batch.pictures),
                "peak_mib": drawn.peak_mib,
                "saved_work": drawn.saved_work,
            }
            if reference is not None:
                row |= distances(drawn.pictures[i : i + 1], reference.pictures[i : i + 1])
            rows.append(row)
            size = {"H": batch.size, "W": batch.size, "tome": setting.keys()}
            about.append({**self.pipeline.about(settings, prompt, seed), **size})
        self.store.add(setting, batch, list(to_pixels(drawn.pictures)), about, rows)

    # --- networks -------------------------------------------------------------------------------

    def judge(self) -> None:
        """Let the networks look at this process's share of the pictures, where they have not."""
        for batch in tqdm(
            self.process.share(self.plan.batches()),
            desc="measures",
            unit="batch",
            disable=not self.judges or not self.process.is_first,
        ):
            unmerged, *others = self.plan.settings_of(batch)
            if self.store.rows(unmerged, batch) is None:
                continue
            self._judge(unmerged, batch, None)
            for setting in others:
                if self.store.rows(setting, batch) is not None:
                    self._judge(setting, batch, unmerged)

    def _judge(self, setting: Setting, batch: Batch, unmerged: Setting | None) -> None:
        there = self.store.judged(setting, batch)
        missing = [judge for judge in self.judges if judge.entry not in there]
        if not missing:
            return
        seen = [self._looked(setting, batch, i, unmerged) for i in batch.numbers]
        found = {judge.entry: np.stack([judge(one) for one in seen]) for judge in missing}
        self.store.add_judged(setting, batch, found)

    def _looked(
        self, setting: Setting, batch: Batch, number: int, unmerged: Setting | None
    ) -> Looked:
        def stored(which: Setting) -> Tensor:
            return torch.from_numpy(to_unit(self.store.pixels(which, batch.size, number)[None]))

        return Looked(
            stored(setting),
            None if unmerged is None else stored(unmerged),
            batch.pictures[number - batch.first][0],
            None if self.scenes is None else self.scenes[number // self.plan.n_seeds],
        )


@contextmanager
def merging(unet: Any, setting: Setting, attention: str, seed: int) -> Iterator[None]:
    """Let a U-Net merge as a setting says, as long as the context lasts.

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
        if setting.control in ("none", "random", "drop"):
            ratio = setting.config.ratio
            with control(unet, setting.control, float(ratio or 0), seed):
                yield
        else:
            yield
    finally:
        set_attention_backend(unet, attention)
        unet.tome.configure(before)


@contextmanager
def other_precision(wrapper: Any) -> Iterator[None]:
    """Let a model draw with a copy of its U-Net in another type, as long as the context lasts.

    Half types become float32, float32 becomes bfloat16.

    Args:
        wrapper: has the U-Net as ``diffusion_model``.
    """
    unet = wrapper.diffusion_model
    weight = next(unet.parameters())
    kind = torch.bfloat16 if weight.dtype == torch.float32 else torch.float32
    twin = copy.deepcopy(unet).to(kind)
    wrapper.diffusion_model = twin.to(memory_format=memory_format(kind, weight.device))
    try:
        yield
    finally:
        wrapper.diffusion_model = unet


def _dtypes(pipeline: Pipeline) -> list[torch.dtype]:
    """Types of the parts; they change where numbers became too large."""
    model = pipeline.model
    parts = (model.model, model.first_stage_model, model.cond_stage_model)
    return [next(part.parameters()).dtype for part in parts]
