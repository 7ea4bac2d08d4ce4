"""From a prompt to pictures: the Python interface, and what the scripts run.

from ldm.pipeline import Pipeline

pipeline = Pipeline.from_checkpoint(tome={"ratio": 0.5})
for picture in pipeline.txt2img("a red house on snowy hills at dawn", seed=1, n_samples=4):
    picture.save(f"house-{picture.settings['seed']}.png")
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm import __version__, images
from ldm.checkpoint.embedding import Embedding, read_embedding
from ldm.checkpoint.load import (
    CheckpointInfo,
    default_checkpoint,
    inspect_checkpoint,
    load_model,
    stored_shapes,
)
from ldm.checkpoint.lora import Lora, WeightChanges, read_lora
from ldm.config import TomeKeys, model_tome
from ldm.device import choose_device, choose_dtype
from ldm.distributed import ALONE, Process
from ldm.errors import InputError, memory_advice
from ldm.images import Mask, Picture, Pixels
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import truncated_words
from ldm.modules.encoders.prompts import plain_text
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import Tally
from ldm.sampling import OnStep, Run
from ldm.settings import SIZE_STEP, Settings
from ldm.util import word_list

# A picture to start from is worked on at up to this multiple of the model's own size.
SIZE_LIMIT = 1.5

logger = logging.getLogger(__name__)


class Pipeline:
    """A loaded model that draws pictures.

    Args:
        model: on its device, in its type, in evaluation mode.
        info: what is known of its checkpoint.
        attention: how it computes attention; noted in the pictures, as is the next.
        ema: whether it has the averaged weights.

    Attributes:
        defaults: what decides where a setting is None: H, W, scale, steps, sampler, prompt.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        info: CheckpointInfo,
        attention: str = "sdpa",
        ema: bool = False,
    ) -> None:
        self.model = model
        self.info = info
        self.attention = attention
        self.ema = ema
        self.defaults = info.defaults
        self._tome: tuple[TomeKeys, ToMeConfig] | None = None  # the last that was settled
        self._weights = WeightChanges(model)
        self._added: dict[str, list[dict[str, Any]]] = {}  # noted in the pictures, likewise

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | None = None,
        config: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        tome: TomeKeys = None,
        attention: str = "sdpa",
        ema: bool = False,
        parameterization: str | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        embeddings: Sequence[str | Path] = (),
    ) -> Pipeline:
        """Load a checkpoint.

        Args:
            path: ``.ckpt``, ``.safetensors``, or a folder of the latter; None: upstream's default
                path if there is a file, else the demo model.
            config: its YAML; None: recognised.
            device: auto, cpu, mps, cuda or cuda:N.
            dtype: of the weights: auto, float32, bfloat16 or float16.
            tome: Token Merging settings, over those of the YAML; False: merge nothing.
            attention: sdpa or einsum.
            ema: use the averaged weights of a training checkpoint.
            parameterization: eps or v, where that cannot be recognised.
            loras: see set_loras.
            embeddings: see set_embeddings.

        Raises:
            InputError: something of this cannot be had; the message says what to do.
        """
        note = None
        if path is None:
            path, note = default_checkpoint()
        where = choose_device(device)
        kind = choose_dtype(dtype, where)
        info = inspect_checkpoint(path, config, parameterization, ema)
        merging = model_tome(info.config, tome)
        # These are looked at before loading, which takes a while.
        shapes = stored_shapes(path) if loras or embeddings else {}
        changes = [read_lora(file, weight, shapes) for file, weight in loras]
        vectors = _read_embeddings(embeddings, shapes)
        logger.info("%s", note or info.summary())
        logger.info("Device: %s, %s", where, str(kind).removeprefix("torch."))
        model = load_model(path, config, parameterization, ema, kind, where, merging, attention)
        pipeline = cls(model, info, attention, ema)
        pipeline._tome = tome, merging
        if changes:
            pipeline._use_loras(changes)
        if vectors:
            pipeline._use_embeddings(vectors)
        return pipeline

    def set_tome(self, tome: ToMeConfig | TomeKeys) -> None:
        """Change the Token Merging settings.

        Args:
            tome: what `tome_config` gave, or what it takes.

        Raises:
            InputError: they cannot be used.
        """
        config = tome if isinstance(tome, ToMeConfig) else self.tome_config(tome)
        self.model.model.diffusion_model.tome.configure(config)

    def tome_config(self, tome: TomeKeys) -> ToMeConfig:
        """What Token Merging settings come to with this model; see from_checkpoint.

        Raises:
            InputError: they cannot be used.
        """
        if self._tome is None or self._tome[0] != tome:
            self._tome = tome, model_tome(self.info.config, tome)
        return self._tome[1]

    def set_loras(self, loras: Sequence[tuple[str | Path, float]]) -> None:
        """Add LoRAs to the model's weights, instead of those set before.

        Without any, the weights are again those of the checkpoint, to the bit. The originals of
        the changed weights are kept in main memory meanwhile.

        Args:
            loras: files, each with the weight that it gets; 1 is as it was trained.

        Raises:
            InputError: a file cannot be used with this model; nothing has changed then.
        """
        shapes = self._shapes()
        self._use_loras([read_lora(file, weight, shapes) for file, weight in loras])

    def set_embeddings(self, embeddings: Sequence[str | Path]) -> None:
        """Let words in prompts stand for the vectors of files, instead of those set before.

        The words are each file's name and, if it has one, the word in it.

        Raises:
            InputError: a file cannot be used with this model; nothing has changed then.
        """
        self._use_embeddings(_read_embeddings(embeddings, self._shapes()))

    def _use_loras(self, loras: Sequence[Lora]) -> None:
        self._weights.set(loras)
        self._note("loras", [{**_named(one.path), "weight": one.weight} for one in loras])
        for one in loras:
            logger.info("%s", one.summary())

    def _use_embeddings(self, embeddings: list[Embedding]) -> None:
        self.model.cond_stage_model.set_words(
            {word: one.vectors for one in embeddings for word in one.words}
        )
        self._note("embeddings", [_named(one.path) for one in embeddings])
        for one in embeddings:
            logger.info("%s", one.summary())

    def _note(self, what: str, files: list[dict[str, Any]]) -> None:
        self._added.pop(what, None)
        if files:
            self._added[what] = files

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

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
        return list(self.generate(Settings(prompt, **settings), _pixels(init)))

    def inpaint(
        self,
        init: str | Path | Pixels,
        mask: str | Path | Mask,
        prompt: str | Sequence[str] = "",
        **settings: Any,
    ) -> list[Picture]:
        """Redraw the part of a picture where a mask (a file, or (H, W)) is white or True."""
        hole = mask if isinstance(mask, np.ndarray) else images.load_mask(mask)
        return list(self.generate(Settings(prompt, **settings), _pixels(init), hole))

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
            InputError: a setting cannot be used with this model, or memory does not suffice.
        """
        if settings.hires_scale > 1 and init is not None:
            raise InputError(
                f"hires_scale {settings.hires_scale:g} is for txt2img; with a picture to start "
                "from, H and W say how large it is drawn"
            )
        settings = self._settled(settings, init)
        self._check_prompts(settings)
        has_strength = init is not None and mask is None
        name = self.info.path
        with memory_advice():
            second = None  # made first: making the other starts the noise of rng upstream
            if settings.hires_scale > 1:
                again = settings.second_pass()
                second = Run(self.model, name, again, progress=progress, on_step=on_step)
            run = Run(self.model, name, settings, init, mask, progress, on_step)
            merger = self.model.model.diffusion_model.tome
            tally, second_tally = Tally(), Tally()
            for batch in process.share(settings.batches()):
                latents = run.latents(batch)
                tally.add(merger.tally)
                if second is not None:
                    with self._second_pass_tome():
                        start = second.enlarged(latents, settings.hires_upscaler)
                        latents = second.latents(batch, start)
                        second_tally.add(merger.tally)
                for (prompt, seed), z in zip(batch, latents.split(1), strict=True):
                    about = self.about(settings, prompt, seed, has_strength)
                    pixels = (second or run).pixels(z)
                    yield Picture(pixels, {**about, **(notes or {})})
        _report_tome(tally, merger.config)
        if second is not None:
            _report_tome(second_tally, merger.config.second_pass, "second pass: ")

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
        settings = settings.filled(self.defaults)
        for name in ("C", "f"):
            if getattr(settings, name) != self.defaults[name]:
                raise InputError(
                    f"{name} {getattr(settings, name)}: this model's is {self.defaults[name]}; "
                    "leave the setting out"
                )
        if settings.scale == 1 and settings.negative_prompt:
            logger.warning("the negative prompt has no effect at scale 1")
        if settings.hires_scale == 1 and self.model.model.diffusion_model.tome.config.hires:
            logger.warning("ToMe hires has no effect without a second pass (hires_scale)")
        return settings

    def _check_prompts(self, settings: Settings) -> None:
        """Warn of words that the model does not read, or does not know."""
        known = self.defaults.get("vocabulary")
        vocabulary = word_list(known) if known else None
        words = self.model.cond_stage_model.words
        prompts = [prompt for batch in settings.batches() for prompt, _ in batch]
        for prompt in dict.fromkeys([*prompts, settings.negative_prompt]):
            if settings.emphasis:
                prompt = plain_text(prompt)
            cut = truncated_words(prompt, self.model.cond_stage_model.max_length, words)
            if cut and not settings.long_prompt:
                logger.warning(
                    "the prompt is too long; the model does not see its end: %r (long_prompt reads "
                    "all of it)",
                    cut,
                )
            if vocabulary is None:
                continue
            own = {part for word in words for part in unknown_words(word, ())}
            if strange := [w for w in unknown_words(prompt, vocabulary) if w not in own]:
                logger.warning("words that this model has never seen: %s", ", ".join(strange))

    def about(
        self, settings: Settings, prompt: str, seed: int, has_strength: bool = False
    ) -> dict[str, Any]:
        """Everything that decided about a picture."""
        about = dataclasses.asdict(settings)
        if not has_strength:
            del about["strength"]
        if settings.hires_scale == 1:
            about = {name: value for name, value in about.items() if "hires" not in name}
        merger = self.model.model.diffusion_model.tome
        unet = next(self.model.model.parameters())
        return {
            **about,
            "prompt": prompt,
            "seed": seed,
            "first_seed": settings.seed,
            "model": {
                "name": self.info.path.stem,
                "hash": self._hash,
                "family": self.info.family,
                "parameterization": self.model.parameterization,
                "ema": self.ema,
            },
            "device": unet.device.type,
            "dtype": str(unet.dtype).removeprefix("torch."),
            "attention": self.attention,
            "torch": torch.__version__,
            "version": __version__,
            "tome": dataclasses.asdict(merger.config),
            **self._added,
        }

    @contextmanager
    def _second_pass_tome(self) -> Iterator[None]:
        """Merge inside as the settings for the second pass say."""
        merger = self.model.model.diffusion_model.tome
        own = merger.config
        merger.configure(own.second_pass)
        try:
            yield
        finally:
            merger.configure(own)

    @functools.cached_property
    def _hash(self) -> str:
        """The web UIs' short hash of the checkpoint (its 64 KiB after the first MiB).

        Source: AUTOMATIC1111/stable-diffusion-webui, model_hash; of a folder, its largest file.
        """
        path = self.info.path
        if path.is_dir():
            path = max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        with path.open("rb") as file:
            if path.stat().st_size > 0x110000:
                file.seek(0x100000)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def _named(path: Path) -> dict[str, Any]:
    """A small file's name, and the first 12 digits of its SHA-256, as the web UIs have it."""
    return {"name": path.stem, "hash": hashlib.sha256(path.read_bytes()).hexdigest()[:12]}


def _read_embeddings(
    files: Sequence[str | Path], shapes: Mapping[str, tuple[int, ...]]
) -> list[Embedding]:
    """Textual-inversion files, no two of which claim a word."""
    embeddings = [read_embedding(file, shapes) for file in files]
    owner: dict[str, Path] = {}
    for one in embeddings:
        for word in one.words:
            if word.lower() in owner:
                raise InputError(f"{one.path} and {owner[word.lower()]} both stand for {word!r}")
            owner[word.lower()] = one.path
    return embeddings


def _report_tome(tally: Tally, config: ToMeConfig, where: str = "") -> None:
    """Say what merging did in all batches together."""
    if not config.is_off:
        logger.info("%s", tally.describe(config).replace("ToMe: ", f"ToMe: {where}", 1))
    for warning in tally.warnings(config):
        logger.warning("%s", where + warning)


def _pixels(picture: str | Path | Pixels) -> Pixels:
    return picture if isinstance(picture, np.ndarray) else images.load_rgb(picture)


def unknown_words(prompt: str, vocabulary: Container[str]) -> list[str]:
    """The words of a prompt, in lower case and once each, that are not in a vocabulary."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in vocabulary]
