"""From a prompt to pictures: the Python interface, and what the scripts run.

from ldm.pipeline import Pipeline

pipeline = Pipeline.from_checkpoint(tome={"ratio": 0.5})
for picture in pipeline.txt2img("a red house on snowy hills at dawn", seed=1, n_samples=4):
    picture.save(f"house-{picture.settings['seed']}.png")
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm import images
from ldm.canvas import Canvas, latent_shape, prepare
from ldm.device import NoiseStream
from ldm.distributed import ALONE, Process
from ldm.errors import InputError, NotFinite, memory_advice
from ldm.images import Mask, Picture, Pixels
from ldm.loaded import LoadedModel, pixels_of
from ldm.remarks import model_notes, prompt_remarks, report_tome, suspects
from ldm.sampling import Batch, OnStep, Pass, Texts, decode, draw, enlarge
from ldm.settings import SIZE_STEP, Settings
from ldm.util import word_list

# A picture to start from is worked on at up to this multiple of the model's own size.
SIZE_LIMIT = 1.5

logger = logging.getLogger(__name__)


class Pipeline(LoadedModel):
    """A loaded model that draws pictures.

    Several threads may use one object: they take turns, batch by batch, and each picture is what it
    would be without the others. What is set applies to pictures asked for from then on; LoRAs and
    embeddings also to those that another thread has yet to draw.

    What is loaded and added, see LoadedModel.
    """

    def txt2img(self, prompt: str | Sequence[str] | None = None, **settings: Any) -> list[Picture]:
        """Draw pictures of a prompt, or of several; see Settings for what can be set."""
        return list(self.generate(Settings(prompt, **settings)))

    def img2img(
        self,
        init: str | Path | Pixels,
        prompt: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> list[Picture]:
        """Redraw a picture (a file, or pixels (H, W, 3)) after a prompt."""
        return list(self.generate(Settings(prompt, **settings), pixels_of(init)))

    def inpaint(
        self,
        init: str | Path | Pixels,
        mask: str | Path | Mask,
        prompt: str | Sequence[str] = "",
        **settings: Any,
    ) -> list[Picture]:
        """Redraw the part of a picture where a mask (a file, or (H, W)) is white or True."""
        hole = mask if isinstance(mask, np.ndarray) else images.load_mask(mask)
        return list(self.generate(Settings(prompt, **settings), pixels_of(init), hole))

    def generate(
        self,
        settings: Settings,
        init: Pixels | None = None,
        mask: Mask | None = None,
        progress: bool = False,
        notes: Mapping[str, Any] | None = None,
        process: Process = ALONE,
        on_step: OnStep | None = None,
    ) -> Iterator[Picture]:
        """Draw pictures, each handed out as soon as it is there.

        Args:
            settings: what and how.
            init: the picture to start from, (H, W, 3).
            mask: with init: where to paint, (H, W) of its size.
            progress: show the sampler's progress.
            notes: entries to add to the pictures' settings.
            process: this one of those that share the batches; the others draw the rest.
            on_step: called after each step of each pass; what it raises ends the drawing.

        Raises:
            InputError: a setting cannot be used with this model, at once; or, while drawing, the
                model gives values that are not numbers.
            OutOfMemory: while drawing.
        """
        if settings.hires_scale > 1 and init is not None:
            raise InputError(
                f"hires_scale {settings.hires_scale:g} is for txt2img; with a picture to start "
                "from, H and W say how large it is drawn"
            )
        settings = self._settled(settings, init)
        again = settings.second_pass() if settings.hires_scale > 1 else None
        batches = process.share(settings.batches())
        known = self.defaults.get("vocabulary")
        vocabulary = word_list(known) if known else None
        for remark in prompt_remarks(self.model.cond_stage_model, settings, vocabulary):
            logger.warning("%s", remark)
        if init is not None:
            init = images.fit(init, *settings.size)
        if mask is not None:
            mask = images.fit_mask(mask, *settings.size)
        tome = self._merger.config
        first = Pass(
            settings, tome, Texts(self.model, settings, tome.context == "trim"), init, mask
        )
        second = None
        if again is not None:
            tome = tome.second_pass
            second = Pass(again, tome, Texts(self.model, again, tome.context == "trim"))
        watch = {"progress": progress, "on_step": on_step}
        return self._drawn(batches, first, second, notes or {}, watch)

    def _drawn(
        self,
        batches: Sequence[Batch],
        first: Pass,
        second: Pass | None,
        notes: Mapping[str, Any],
        watch: Mapping[str, Any],
    ) -> Iterator[Picture]:
        settings, last = first.settings, second or first
        stream: AbstractContextManager[None] = nullcontext()
        if settings.rng == "upstream":  # seeded after loading, so that nothing shifts the stream
            stream = NoiseStream(settings.seed, self.model.device)
        with self._turn(settings):
            if second is not None:
                second.canvas = prepare(self.model, second.settings)
            with stream:
                first.canvas = prepare(self.model, settings, first.init, first.mask)
        for batch in batches:
            with self._turn(settings), stream:
                latents = self._latents(first, batch, first.canvas, watch)
                if second is not None:
                    large = enlarge(self.model, second.settings, latents)
                    canvas = dataclasses.replace(second.canvas, known=large)
                    latents = self._latents(second, batch, canvas, watch)
            for (prompt, seed), one in zip(batch, latents.split(1), strict=True):
                with self._turn(settings), stream:
                    about = self.about(settings, prompt, seed, first)
                    pixels = last.pixels(decode(self.model, one)[0])
                yield Picture(pixels, {**about, **notes})
        report_tome(first.tally, first.tome)
        if second is not None:
            report_tome(second.tally, second.tome, "second pass: ")

    def _latents(
        self, one: Pass, batch: Batch, canvas: Canvas, watch: Mapping[str, Any]
    ) -> torch.Tensor:
        """Latents of a batch, merged as the pass says; what was merged is counted."""
        merger = self._merger
        others = merger.config
        if one.tome is not others:
            merger.configure(one.tome)
        try:
            with self._guided(one.settings):
                latents = draw(self.model, one.settings, batch, one.texts, canvas, **watch)
            one.tally.add(merger.tally)
        finally:
            if one.tome is not others:
                merger.configure(others)
        return latents

    def _guided(self, settings: Settings) -> AbstractContextManager[None]:
        """Let the ControlNet, if there is one, guide what is drawn."""
        if self._control is None:
            return nullcontext()
        _, h, w = latent_shape(self.model, settings)
        return self._control.over(self.model.model.diffusion_model, h, w)

    @contextmanager
    def _turn(self, settings: Settings) -> Iterator[None]:
        """Have the model for oneself, and errors that say what to lower."""
        with self._lock, memory_advice():
            try:
                yield
            except NotFinite as stage:
                words = self.model.cond_stage_model.words
                cause = suspects(settings, self._added.get("loras", ()), words)
                raise InputError(
                    f"{stage} of {self.info.path} gives values that are not numbers, in float32 "
                    f"too: {cause}"
                ) from None

    # --- settings ---------------------------------------------------------------------------

    def _settled(self, settings: Settings, init: Pixels | None) -> Settings:
        """Settings without None."""
        if init is not None:
            longest = int(SIZE_LIMIT * max(self.defaults["H"], self.defaults["W"]))
            longest -= longest % SIZE_STEP
            height, width = images.size_for(init, settings.H, settings.W, longest, SIZE_STEP)
            if (height, width) != init.shape[:2]:
                logger.info(
                    "The picture of %dx%d is drawn at %dx%d (without H and W: multiples of %d, at "
                    "most %d)",
                    *(init.shape[1], init.shape[0], width, height, SIZE_STEP, longest),
                )
            settings = dataclasses.replace(settings, H=height, W=width)
        reuse = self.model.model.diffusion_model.reuse.every
        settings = settings.filled({"reuse_deep": reuse, **self.defaults})
        self.model.cond_stage_model.check_clip_skip(settings.clip_skip)
        for name in ("C", "f"):
            if getattr(settings, name) != self.defaults[name]:
                raise InputError(
                    f"{name} {getattr(settings, name)}: this model's is {self.defaults[name]}; "
                    "leave the setting out"
                )
        if settings.scale == 1 and settings.negative_prompt:
            logger.warning("the negative prompt has no effect at scale 1")
        if settings.hires_scale == 1 and self._merger.config.hires:
            logger.warning("ToMe hires has no effect without a second pass (hires_scale)")
        return settings

    def about(
        self, settings: Settings, prompt: str, seed: int, drawn: Pass | None = None
    ) -> dict[str, Any]:
        """Everything that decided about a picture.

        Args:
            settings: of its run.
            prompt: its own.
            seed: its own.
            drawn: the first pass over it, if there was one.
        """
        has_strength = drawn is not None and drawn.init is not None and drawn.mask is None
        tome = self._merger.config if drawn is None else drawn.tome
        return {
            **settings.noted(has_strength),
            "prompt": prompt,
            "seed": seed,
            **model_notes(self.model, self.info, self._hash, self.ema),
            "attention": self.attention,
            "tome": dataclasses.asdict(tome),
            **self._added,
        }
