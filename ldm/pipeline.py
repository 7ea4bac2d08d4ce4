"""From a prompt to pictures: the Python interface, and what the scripts run.

from ldm.pipeline import Pipeline

pipeline = Pipeline.from_checkpoint(tome={"ratio": 0.5})
for picture in pipeline.txt2img("a red house on snowy hills at dawn", seed=1, n_samples=4):
    picture.save(f"house-{picture.settings['seed']}.png")
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ldm import images
from ldm.addons import Tags, taken_loras
from ldm.canvas import latent_shape, prepare
from ldm.device import FIRST_STAGE, NoiseStream
from ldm.distributed import ALONE, Process
from ldm.errors import InputError, NotFinite, memory_advice, shown
from ldm.images import Mask, Picture, Pixels
from ldm.loaded import Added, LoadedModel, pixels_of
from ldm.remarks import model_notes, prompt_remarks, report_tome, suspects
from ldm.sampling import Batch, OnStep, Pass, Texts, decode, enlarge, sample
from ldm.settings import SIZE_STEP, Settings
from ldm.util import word_list

# A picture to start from is worked on at up to this multiple of the model's own size.
SIZE_LIMIT = 1.5
# What has a method `set_NAME`.
ELSEWHERE = ("tome", "loras", "embeddings", "control")

logger = logging.getLogger(__name__)


class Pipeline(LoadedModel):
    """A loaded model that draws pictures.

    Several threads may use one object: they take turns, batch by batch, and each picture is what it
    would be without the others. What is set applies to pictures asked for from then on.

    A prompt names LoRAs of ``models/lora`` by ``<lora:NAME:WEIGHT>``, for itself alone, and
    embeddings of ``models/embeddings`` by their names; see `ldm.addons`.

    What is loaded and added, see LoadedModel.
    """

    def txt2img(self, prompt: str | Sequence[str] | None = None, **settings: Any) -> list[Picture]:
        """Draw pictures of a prompt, or of several; see Settings for what can be set."""
        return list(self.generate(_asked(prompt, settings)))

    def img2img(
        self,
        init: str | Path | Pixels | Picture,
        prompt: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> list[Picture]:
        """Redraw a picture (a file, pixels (H, W, 3), or one that was drawn) after a prompt."""
        return list(self.generate(_asked(prompt, settings), pixels_of(init)))

    def inpaint(
        self,
        init: str | Path | Pixels | Picture,
        mask: str | Path | NDArray[Any],
        prompt: str | Sequence[str] = "",
        **settings: Any,
    ) -> list[Picture]:
        """Redraw the part of a picture where a mask (a file, or (H, W)) is white or True."""
        if "strength" in settings:
            logger.warning("strength has no effect inside of a mask: all of it is drawn anew")
        hole = images.as_mask(mask)
        return list(self.generate(_asked(prompt, settings), pixels_of(init), hole))

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
        if init is not None and mask is not None:
            images.check_shape(mask, init)
        settings = self._settled(settings, init)
        batches = process.share(settings.batches())
        named = self._named_by(settings.prompts, settings.negative_prompt)
        plain = _untagged(settings)
        if settings.rng == "upstream" and len(named) > 1 and settings.n_samples > 1:
            raise InputError(
                "rng upstream is one stream of noise: prompts with different LoRAs need n_samples 1"
            )
        again = plain.second_pass() if settings.hires_scale > 1 else None
        known = self.defaults.get("vocabulary")
        vocabulary = word_list(known) if known else None
        with self._turn(settings, next(iter(named.values()))):
            for remark in prompt_remarks(self.model.cond_stage_model, plain, vocabulary):
                logger.warning("%s", remark)
        if init is not None:
            init = images.fit(init, *settings.size)
        if mask is not None:
            mask = images.fit_mask(mask, *settings.size)
        tome = self._merger.config
        first = Pass(plain, tome, Texts(self.model, plain, tome.context == "trim"), init, mask)
        second = None
        if again is not None:
            tome = tome.second_pass
            second = Pass(again, tome, Texts(self.model, again, tome.context == "trim"))
        watch = {"progress": progress, "on_step": on_step}
        pieces = ((named[tags], one) for batch in batches for tags, one in _of_tags(batch))
        return self._drawn(settings, pieces, first, second, notes or {}, watch)

    def _drawn(
        self,
        settings: Settings,
        pieces: Iterable[tuple[Added, Batch]],
        first: Pass,
        second: Pass | None,
        notes: Mapping[str, Any],
        watch: Mapping[str, Any],
    ) -> Iterator[Picture]:
        last = second or first
        stream: AbstractContextManager[None] = nullcontext()
        if settings.rng == "upstream":  # seeded after loading, so that nothing shifts the stream
            stream = NoiseStream(settings.seed, self.model.device)
        with self._turn(settings, self._applied):
            if second is not None:
                second.canvas = prepare(self.model, second.settings)
            with stream:
                first.canvas = prepare(self.model, settings, first.init, first.mask)
        for added, batch in self._alike(settings, pieces, first.texts):
            untagged = [(taken_loras(prompt)[0], seed) for prompt, seed in batch]
            with self._turn(settings, added), stream:
                with self._as_asked(first):
                    ground = first.texts, first.canvas
                    latents = sample(self.model, first.settings, untagged, *ground, **watch)
                if second is not None:
                    known = enlarge(self.model, second.settings, latents)
                    ground = second.texts, dataclasses.replace(second.canvas, known=known)
                    with self._as_asked(second):
                        latents = sample(self.model, second.settings, untagged, *ground, **watch)
            for (prompt, seed), one in zip(batch, latents.split(1), strict=True):
                with self._turn(settings, added), stream:
                    about = self.about(settings, prompt, seed, first)
                    pixels = last.pixels(decode(self.model, one)[0])
                yield Picture(pixels, {**about, **notes})
        report_tome(first.tally, first.tome)
        if second is not None:
            report_tome(second.tally, second.tome, "second pass: ")

    def _alike(
        self, settings: Settings, pieces: Iterable[tuple[Added, Batch]], texts: Texts
    ) -> Iterator[tuple[Added, Batch]]:
        """The parts of the pieces whose texts are equally long.

        So a picture does not depend on those beside it. With upstream's order of random numbers a
        batch is one piece.
        """
        if not settings.long_prompt or settings.rng == "upstream":
            yield from pieces
            return
        for added, batch in pieces:
            with self._turn(settings, added):
                texts.added = self._applied
                untagged = [(taken_loras(prompt)[0], seed) for prompt, seed in batch]
                sizes = [len(part) for part in texts.alike(untagged)]
            rest = iter(batch)
            for size in sizes:
                yield added, list(itertools.islice(rest, size))

    @contextmanager
    def _as_asked(self, one: Pass) -> Iterator[None]:
        """Let the model merge as a pass says, and its ControlNet guide; count what was merged."""
        merger, control = self._merger, self._applied.control
        one.texts.added = self._applied
        others = merger.config
        if one.tome is not others:
            merger.configure(one.tome)
        try:
            if control is None:
                yield
            else:
                _, h, w = latent_shape(self.model, one.settings)
                with control.over(self.model.model.diffusion_model, h, w):
                    yield
            one.tally.add(merger.tally)
        finally:
            if one.tome is not others:
                merger.configure(others)

    @contextmanager
    def _turn(self, settings: Settings, added: Added) -> Iterator[None]:
        """Have the model, with what is added, for oneself; errors say what to lower."""
        with self._lock, memory_advice():
            self._apply(added)
            try:
                yield
            except NotFinite as error:
                is_of_vae = error.stage == FIRST_STAGE and self.info.vae is not None
                path = self.info.vae if is_of_vae else self.info.path
                words = self.model.cond_stage_model.words
                raise InputError(
                    f"{error.stage} of {path} gives values that are not numbers, in float32 "
                    f"too: {suspects(settings, added.notes, words)}"
                ) from None

    # --- settings ---------------------------------------------------------------------------

    def _settled(self, settings: Settings, init: Pixels | None) -> Settings:
        """Settings without None."""
        if init is not None:
            longest = int(SIZE_LIMIT * max(self.defaults["H"], self.defaults["W"]))
            longest -= longest % SIZE_STEP
            height, width = images.size_for(init, settings.H, settings.W, longest, SIZE_STEP)
            if (height, width) != init.shape[:2]:
                cut = ", its sides cut off" if images.loses_sides(init, height, width) else ""
                logger.info(
                    "The picture of %dx%d is drawn at %dx%d%s (without H and W: multiples of %d, "
                    "at most %d)",
                    *(init.shape[1], init.shape[0], width, height, cut, SIZE_STEP, longest),
                )
            settings = dataclasses.replace(settings, H=height, W=width)
        reuse = self.model.model.diffusion_model.reuse.every
        settings = settings.filled({"reuse_deep": reuse, **self.defaults})
        self.check(settings)
        if settings.scale == 1 and settings.negative_prompt:
            logger.warning("the negative prompt has no effect at scale 1")
        if settings.hires_scale == 1 and self._merger.config.hires:
            logger.warning("ToMe hires has no effect without a second pass (hires_scale)")
        return settings

    def check(self, settings: Settings) -> None:
        """Refuse what this model cannot have, before anything is drawn.

        Raises:
            InputError: a setting cannot be used with this model.
        """
        settings = settings.filled(self.defaults)
        self.model.cond_stage_model.check_clip_skip(settings.clip_skip)
        for name in ("C", "f"):
            if getattr(settings, name) != self.defaults[name]:
                raise InputError(
                    f"{name} {getattr(settings, name)}: this model's is {self.defaults[name]}; "
                    "leave the setting out"
                )
        if settings.hires_scale > 1:
            settings.second_pass()

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
            **self._applied.notes,
        }


def _asked(prompt: str | Sequence[str] | None, given: Mapping[str, Any]) -> Settings:
    """Checked settings; refuse names that are none, also of what is set elsewhere."""
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in given:
        if name in ELSEWHERE:
            setter = f"set_{name}"
            raise InputError(f"{name} is set for all pictures that follow: pipeline.{setter}(...)")
        if name not in known:
            raise InputError(f"{shown(name)} is no setting of a picture; {', '.join(known)} are")
    return Settings(prompt, **given)


def _untagged(settings: Settings) -> Settings:
    """The settings without what their prompts say of LoRAs."""
    assert settings.prompt is not None
    if isinstance(settings.prompt, str):
        return dataclasses.replace(settings, prompt=taken_loras(settings.prompt)[0])
    prompts = tuple(taken_loras(prompt)[0] for prompt in settings.prompt)
    return dataclasses.replace(settings, prompt=prompts)


def _of_tags(batch: Batch) -> Iterator[tuple[Tags, Batch]]:
    """The parts of a batch whose prompts name the same LoRAs."""
    for tags, part in itertools.groupby(batch, lambda picture: taken_loras(picture[0])[1]):
        yield tags, list(part)
