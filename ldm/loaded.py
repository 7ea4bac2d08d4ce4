"""A checkpoint, loaded, and what is added to it."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from ldm import images
from ldm.addons import Tags, embeddings_in, lora_files, taken_loras
from ldm.checkpoint.controlnet import load_controlnet
from ldm.checkpoint.embedding import Embedding, EmbeddingFile, read_embeddings
from ldm.checkpoint.hashes import model_hash, named
from ldm.checkpoint.load import (
    CheckpointInfo,
    default_checkpoint,
    inspect_checkpoint,
    load_model,
    stored_shapes,
)
from ldm.checkpoint.lora import Lora, WeightChanges, read_lora
from ldm.config import AskedTome, model_tome
from ldm.control import Control
from ldm.device import choose_device, choose_dtype
from ldm.errors import InputError, memory_advice
from ldm.images import Picture, Pixels
from ldm.models.diffusion.captures import check_way, compile_model
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import set_attention_backend
from ldm.modules.tome import backend
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import TokenMerger

LESS_TO_LOAD = "try --dtype bfloat16 (on a GPU float16), or end other programs"

ModelT = TypeVar("ModelT", bound="LoadedModel")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Added:
    """What is added to a model's weights, words and layout. A run keeps what it began with.

    Attributes:
        loras: in the weights.
        embeddings: words with vectors of their own.
        control: a ControlNet.
        notes: what pictures remember of these, by kind.
    """

    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    control: Control | None = None
    notes: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)

    def changed(self, what: str, files: list[dict[str, Any]], **changes: Any) -> Added:
        """This, but for one kind, whose files are to be noted."""
        notes = {kind: noted for kind, noted in self.notes.items() if kind != what}
        return dataclasses.replace(self, notes=notes | ({what: files} if files else {}), **changes)

    def with_loras(self, loras: Sequence[Lora]) -> Added:
        """This, with other LoRAs."""
        files = [{**named(one.path), "weight": one.weight} for one in loras]
        return self.changed("loras", files, loras=tuple(loras))

    def with_embeddings(self, embeddings: Sequence[Embedding]) -> Added:
        """This, with other embeddings."""
        files = dict.fromkeys(one.path for one in embeddings)
        noted = [named(path) for path in files]
        return self.changed("embeddings", noted, embeddings=tuple(embeddings))

    def with_control(self, control: Control | None, path: str | Path | None) -> Added:
        """This, with another ControlNet."""
        files = []
        if control is not None and path is not None:
            how = {"strength": control.strength, "canny": control.finds_edges}
            files = [{**named(Path(path)), **how}]
        return self.changed("controlnets", files, control=control)


class LoadedModel:
    """A model, and what is added to it: merging, LoRAs, embeddings, a ControlNet.

    What is added holds for runs that begin from then on: a run that another thread has begun goes
    on with what it began with. So the model's weights may, between two pictures, be another run's.

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
        self._tome: tuple[AskedTome, ToMeConfig] | None = None  # the last that was settled
        self._hash = model_hash(info.path)
        self._weights = WeightChanges(model)
        self._added = Added()  # what the next run begins with
        self._applied = Added()  # what is in the weights now
        self._tagged: dict[Any, Lora] = {}  # what the prompts of the last run named
        self._lock = threading.RLock()

    @classmethod
    def from_checkpoint(
        cls: type[ModelT],
        path: str | Path | None = None,
        config: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        tome: AskedTome = None,
        attention: str = "sdpa",
        ema: bool = False,
        parameterization: str | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        embeddings: Sequence[EmbeddingFile] = (),
        vae: str | Path | None = None,
        compile: str = "auto",
        control: Mapping[str, Any] | None = None,
        prompts: Iterable[str] = (),
    ) -> ModelT:
        """Load a checkpoint.

        Args:
            path: ``.ckpt``, ``.safetensors``, or a folder of the latter; None: upstream's default
                path if there is a file, else the demo model.
            config: its YAML; None: recognised.
            device: auto, cpu, mps, cuda or cuda:N; or torch's.
            dtype: of the weights: auto, float32, bfloat16 or float16; or torch's.
            tome: Token Merging settings, over those of the YAML, or a preset's name; False: merge
                nothing.
            attention: sdpa or einsum.
            ema: use the averaged weights of a training checkpoint.
            parameterization: eps or v, where that cannot be recognised.
            loras: see set_loras.
            embeddings: see set_embeddings.
            vae: a file whose VAE takes the place of the checkpoint's; None: the one that lies
                beside it as NAME.vae.safetensors (.pt, .ckpt), if there is one.
            compile: auto, no, blocks or graph; see `ldm.models.diffusion.captures.compile_model`.
            control: arguments of set_control.
            prompts: that will be drawn; the LoRAs that they name are looked at before loading.

        Raises:
            InputError: something of this cannot be had; the message says what to do.
        """
        note = None
        if path is None:
            path, note = default_checkpoint()
        where = choose_device(device)
        backend.is_chosen(where)  # complains early
        kind = choose_dtype(dtype, where)
        check_way(compile, where)
        info = inspect_checkpoint(path, config, parameterization, ema, vae)
        merging = model_tome(info.config, tome)
        # These are looked at before loading, which takes a while.
        tags = {tag for prompt in prompts for tag in taken_loras(prompt)[1]}
        shapes = stored_shapes(path) if loras or embeddings or tags else {}
        for file, weight in lora_files(tuple(tags)):
            read_lora(file, weight, shapes)
        changes = [read_lora(file, weight, shapes) for file, weight in loras]
        vectors = read_embeddings(embeddings, shapes)
        guide = None if control is None else _read_control(info, kind, where, **control)
        logger.info("%s", note or info.summary())
        logger.info("Device: %s, %s", where, str(kind).removeprefix("torch."))
        with memory_advice(LESS_TO_LOAD):
            model = load_model(
                path, config, parameterization, ema, kind, where, merging, attention, vae, info
            )
        compile_model(model, compile, where)
        pipeline = cls(model, info, attention, ema)
        pipeline._tome = tome, merging
        added = Added().with_loras(changes).with_embeddings(vectors)
        if guide is not None and control is not None:
            added = added.with_control(guide, control["net"])
        pipeline._use(added)
        return pipeline

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: what is added lies in the weights.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a pipeline cannot be copied or pickled: load another one with from_checkpoint, or let "
            "threads share one, which take turns"
        )

    def set_tome(self, tome: AskedTome) -> None:
        """Change the Token Merging settings; see from_checkpoint.

        Raises:
            InputError: they cannot be used.
        """
        config = self.tome_config(tome)
        with self._lock:
            self._merger.configure(config)

    def tome_config(self, tome: AskedTome) -> ToMeConfig:
        """What Token Merging settings come to with this model; see from_checkpoint.

        Raises:
            InputError: they cannot be used.
        """
        settled = self._tome
        if settled is None or settled[0] != tome:
            settled = self._tome = tome, model_tome(self.info.config, tome)
        return settled[1]

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
        self._use(
            self._added.with_loras([read_lora(file, weight, shapes) for file, weight in loras])
        )

    def set_embeddings(self, embeddings: Sequence[EmbeddingFile]) -> None:
        """Let words in prompts stand for the vectors of files, instead of those set before.

        The words are each file's name and, if it has one, the word in it; or, for a file given
        with a word, that alone.

        Raises:
            InputError: a file cannot be used with this model; nothing has changed then.
        """
        self._use(self._added.with_embeddings(read_embeddings(embeddings, self._shapes())))

    def set_control(
        self,
        net: str | Path | None = None,
        picture: str | Path | Pixels | None = None,
        strength: float = 1.0,
        finds_edges: bool = False,
    ) -> None:
        """Let a ControlNet guide what is drawn, instead of the one set before; None: nothing does.

        Args:
            net: its file; see `load_controlnet`.
            picture: what it reads, as it was trained; a file, or pixels (H, W, 3).
            strength: factor on what it adds, 0 to 2.
            finds_edges: let it read the picture's Canny edges.

        Raises:
            InputError: one of these cannot be used; nothing has changed then.
        """
        made = None
        if net is not None and picture is not None:
            weight = next(self.model.model.parameters())
            made = _read_control(
                self.info, weight.dtype, weight.device, net, picture, strength, finds_edges
            )
        self._use(self._added.with_control(made, net))

    def _use(self, added: Added) -> None:
        """Let runs from now on begin with this."""
        with self._lock:
            before = self._added
            self._apply(added)
            self._added = added
        if added.loras is not before.loras:
            for lora in added.loras:
                logger.info("%s", lora.summary())
        if added.embeddings is not before.embeddings:
            for embedding in added.embeddings:
                logger.info("%s", embedding.summary())

    def _apply(self, added: Added) -> None:
        """Have this in the weights, instead of what is there; called by who has the model.

        Raises:
            InputError: weights would be no finite numbers; there are no LoRAs in them then.
        """
        before = self._applied
        if [*map(id, added.loras)] != [*map(id, before.loras)]:
            self._applied = before.with_loras(())  # should this fail
            self._weights.set(added.loras)
        if added.embeddings is not before.embeddings:
            words = {word: one.vectors for one in added.embeddings for word in one.words}
            self.model.cond_stage_model.set_words(words)
        if added.control is not None and added.control is not before.control:
            set_attention_backend(added.control.net, self.attention)
        self._applied = added

    def _named_by(self, prompts: Sequence[str], negative: str) -> dict[Tags, Added]:
        """What the tags of each prompt come to, over what is added already.

        The files are looked at; the words of ``models/embeddings`` in any of the texts belong to
        all.

        Raises:
            InputError: there is no LoRA of a name, or it cannot be used with this model.
        """
        base = self._with_words(self._added, [*prompts, negative])
        tagged = dict.fromkeys(taken_loras(prompt)[1] for prompt in prompts)
        shapes = self._shapes() if any(tagged) else {}
        read: dict[tuple[str, float], Lora] = {}
        known, self._tagged = self._tagged, {}
        for tag in dict.fromkeys(tag for tags in tagged for tag in tags):
            path, weight = lora_files((tag,))[0]
            key = path, path.stat().st_mtime_ns, weight
            if key not in known:
                known[key] = read_lora(path, weight, shapes)
                logger.info("%s", known[key].summary())
            read[tag] = self._tagged[key] = known[key]
        return {
            tags: base.with_loras([*base.loras, *(read[tag] for tag in tags)]) if tags else base
            for tags in tagged
        }

    def _with_words(self, added: Added, texts: Sequence[str]) -> Added:
        """Further embeddings, whose names are words of the texts; what does not fit is left out."""
        own = {word.lower() for one in added.embeddings for word in one.words}
        found: list[Embedding] = []
        for word, path in embeddings_in(texts).items():
            if word.lower() in own:
                continue
            try:
                found += read_embeddings([path], self._shapes())
            except InputError as error:
                logger.warning("%s in a prompt is read as words: %s", word, error)
        for one in found:
            logger.info("%s", one.summary())
        return added.with_embeddings([*added.embeddings, *found]) if found else added

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @property
    def _merger(self) -> TokenMerger:
        return self.model.model.diffusion_model.tome


def _read_control(
    info: CheckpointInfo,
    dtype: torch.dtype,
    device: torch.device,
    net: str | Path,
    picture: str | Path | Pixels,
    strength: float = 1.0,
    finds_edges: bool = False,
) -> Control:
    """See Pipeline.set_control."""
    unet = info.config["model"]["params"]["unet_config"]["params"]
    pixels = pixels_of(picture)
    return Control(load_controlnet(net, unet, dtype, device), pixels, strength, finds_edges)


def pixels_of(picture: str | Path | Pixels | Picture) -> Pixels:
    """The pixels of a picture, (H, W, 3), that may be a file.

    Raises:
        InputError: it cannot be read, or is an array or object of another kind.
    """
    if isinstance(picture, Picture):
        return picture.pixels
    if not isinstance(picture, np.ndarray):
        return images.load_rgb(images.as_path("picture", picture))
    if picture.dtype != np.uint8 or picture.shape[2:] != (3,) or not picture.size:
        raise InputError(
            f"picture: must be uint8 of shape (H, W, 3), not {picture.dtype} of {picture.shape}"
        )
    return picture
