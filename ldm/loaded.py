"""A checkpoint, loaded, and what is added to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ldm import images
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
from ldm.config import TomeKeys, model_tome
from ldm.control import Control
from ldm.device import choose_device, choose_dtype
from ldm.errors import memory_advice
from ldm.images import Pixels
from ldm.models.diffusion.captures import check_way, compile_model
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import set_attention_backend
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import TokenMerger

LESS_TO_LOAD = "try --dtype bfloat16 (on a GPU float16), or end other programs"

ModelT = TypeVar("ModelT", bound="LoadedModel")

logger = logging.getLogger(__name__)


class LoadedModel:
    """A model, and what is added to it: merging, LoRAs, embeddings, a ControlNet.

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
        self._hash = model_hash(info.path)
        self._weights = WeightChanges(model)
        self._added: dict[str, list[dict[str, Any]]] = {}  # noted in the pictures, likewise
        self._lock = threading.RLock()
        self._control: Control | None = None

    @classmethod
    def from_checkpoint(
        cls: type[ModelT],
        path: str | Path | None = None,
        config: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        tome: TomeKeys = None,
        attention: str = "sdpa",
        ema: bool = False,
        parameterization: str | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        embeddings: Sequence[EmbeddingFile] = (),
        vae: str | Path | None = None,
        compile: str = "auto",
        control: Mapping[str, Any] | None = None,
    ) -> ModelT:
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
            vae: a file whose VAE takes the place of the checkpoint's; None: the one that lies
                beside it as NAME.vae.safetensors (.pt, .ckpt), if there is one.
            compile: auto, no, blocks or graph; see `ldm.models.diffusion.captures.compile_model`.
            control: arguments of set_control.

        Raises:
            InputError: something of this cannot be had; the message says what to do.
        """
        note = None
        if path is None:
            path, note = default_checkpoint()
        where = choose_device(device)
        kind = choose_dtype(dtype, where)
        check_way(compile, where)
        info = inspect_checkpoint(path, config, parameterization, ema, vae)
        merging = model_tome(info.config, tome)
        # These are looked at before loading, which takes a while.
        shapes = stored_shapes(path) if loras or embeddings else {}
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
        if changes:
            pipeline._use_loras(changes)
        if vectors:
            pipeline._use_embeddings(vectors)
        if guide is not None and control is not None:
            pipeline._use_control(guide, control["net"])
        return pipeline

    def set_tome(self, tome: ToMeConfig | TomeKeys) -> None:
        """Change the Token Merging settings.

        Args:
            tome: what `tome_config` gave, or what it takes.

        Raises:
            InputError: they cannot be used.
        """
        config = tome if isinstance(tome, ToMeConfig) else self.tome_config(tome)
        with self._lock:
            self._merger.configure(config)

    def tome_config(self, tome: TomeKeys) -> ToMeConfig:
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
        self._use_loras([read_lora(file, weight, shapes) for file, weight in loras])

    def set_embeddings(self, embeddings: Sequence[EmbeddingFile]) -> None:
        """Let words in prompts stand for the vectors of files, instead of those set before.

        The words are each file's name and, if it has one, the word in it; or, for a file given
        with a word, that alone.

        Raises:
            InputError: a file cannot be used with this model; nothing has changed then.
        """
        self._use_embeddings(read_embeddings(embeddings, self._shapes()))

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
        self._use_control(made, net)

    def _use_control(self, control: Control | None, path: str | Path | None) -> None:
        if control is not None:
            set_attention_backend(control.net, self.attention)
        with self._lock:
            self._control = control
            files = [] if control is None or path is None else [named(Path(path))]
            self._note("controlnets", files)

    def _use_loras(self, loras: Sequence[Lora]) -> None:
        with self._lock:
            self._weights.set(loras)
            self._note("loras", [{**named(one.path), "weight": one.weight} for one in loras])
        for one in loras:
            logger.info("%s", one.summary())

    def _use_embeddings(self, embeddings: list[Embedding]) -> None:
        words = {word: one.vectors for one in embeddings for word in one.words}
        with self._lock:
            self.model.cond_stage_model.set_words(words)
            files = dict.fromkeys(one.path for one in embeddings)
            self._note("embeddings", [named(path) for path in files])
        for one in embeddings:
            logger.info("%s", one.summary())

    def _note(self, what: str, files: list[dict[str, Any]]) -> None:
        self._added.pop(what, None)
        if files:
            self._added[what] = files

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


def pixels_of(picture: str | Path | Pixels) -> Pixels:
    """The pixels of a picture, (H, W, 3), that may be a file."""
    return picture if isinstance(picture, np.ndarray) else images.load_rgb(picture)
