"""Textual inversion: vectors that a word in a prompt stands for.

Source: Gal et al. 2022 (arXiv 2208.01618); the files are its authors', the web UIs' and diffusers'.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ldm.checkpoint.files import FLOATS, kind_of, read_content
from ldm.checkpoint.keys import TEXT_ENCODER, TOKENS, Shape
from ldm.checkpoint.pickles import StoredParameters
from ldm.errors import InputError, escaped, shown
from ldm.text import decode_text, parse_json

EmbeddingFile: TypeAlias = str | os.PathLike[str] | tuple[str | os.PathLike[str], str]
"""A file, or a file and the word that is to stand for it."""

MAX_VECTORS = 75  # tokens of a prompt
MAX_WORDS = 1000  # in one file
MAX_WORD = 100  # characters
# What files call their vectors that do not name a word; emp_params is OneTrainer's spelling.
_NAMELESS = ("*", "emb_params", "emp_params", "clip_l", "text_encoders_0")
_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK = b"sd-ti-embedding\0"
_MAX_PICTURE = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Embedding:
    """Vectors of a file, (n, C), and the words that stand for them in a prompt."""

    path: Path
    words: tuple[str, ...]
    vectors: Tensor

    def summary(self) -> str:
        """One line for the user."""
        words = " or ".join(shown(word) for word in self.words)
        return f"Embedding {self.path.name}: {len(self.vectors)} vectors; write {words} in a prompt"


def read_embedding(
    path: str | os.PathLike[str], shapes: Mapping[str, Shape], word: str | None = None
) -> list[Embedding]:
    """Read a textual-inversion file.

    The file's name stands for its vectors and, if there is one in it, the word it was trained as.
    Where there are several, each has its own word.

    Args:
        path: ``.safetensors``, ``.pt`` or ``.bin``, or a web UI's picture, ``.png``.
        shapes: of the model's tensors.
        word: which stands for the vectors instead; of a file with several, the one to take.

    Raises:
        InputError: it is something else, or was made for another text encoder.
    """
    path = Path(path)
    found = _named_vectors(path)
    if word is not None and len(found) > 1:
        if word not in found:
            known = escaped(", ".join(found), 300)
            raise InputError(f"{path} has no vectors for {shown(word)}, but for {known}")
        found = {word: found[word]}
    width = next(
        s[1]
        for n, s in shapes.items()
        if n.startswith(TEXT_ENCODER) and n.endswith(TOKENS) and len(s) == 2
    )
    embeddings = []
    for own, tensor in found.items():
        words = [word] if word is not None else [] if own in _NAMELESS else [own]
        if word is None and len(found) == 1:
            words = [path.stem, *words]
        fit = [one for one in words if 0 < len(one.strip()) <= MAX_WORD and one.isprintable()]
        vectors = _checked(tensor, width, path)
        embeddings.append(Embedding(path, tuple(dict.fromkeys(fit or [path.stem])), vectors))
    return embeddings


def read_embeddings(
    files: Sequence[EmbeddingFile], shapes: Mapping[str, tuple[int, ...]]
) -> list[Embedding]:
    """Textual-inversion files, no two of which claim a word.

    Raises:
        InputError: two do, or one cannot be used.
    """
    embeddings = []
    for file in files:
        path, word = file if isinstance(file, tuple) else (file, None)
        embeddings += read_embedding(path, shapes, word)
    owner: dict[str, Path] = {}
    for one in embeddings:
        for word in one.words:
            if word.lower() in owner:
                raise InputError(
                    f"{one.path} and {owner[word.lower()]} both stand for {shown(word)}; give one "
                    "another word: --embedding FILE:WORD"
                )
            owner[word.lower()] = one.path
    return embeddings


def _checked(vectors: Tensor, width: int, path: Path) -> Tensor:
    """Vectors (n, width) in float32."""
    shape = (1, *vectors.shape) if vectors.ndim == 1 else tuple(vectors.shape)
    if kind_of(vectors) not in FLOATS:
        raise InputError(f"{path} has vectors of {kind_of(vectors)}, not of floating-point numbers")
    if len(shape) != 2 or shape[1] != width:
        raise InputError(
            f"{path} has vectors of {tuple(vectors.shape)}, but the text encoder's have {width} "
            "numbers: it was made for another model"
        )
    if not 1 <= shape[0] <= MAX_VECTORS:
        raise InputError(f"{path} has {shape[0]} vectors: allowed are 1 to {MAX_VECTORS}")
    vectors = vectors.detach().float().reshape(shape)
    if not torch.isfinite(vectors).all():
        raise InputError(f"{path} is damaged: it has values that are not numbers")
    return vectors


def _named_vectors(path: Path) -> dict[str, Tensor]:
    """What a file calls its vectors -> these."""
    content = _picture_content(path) or read_content(path)
    if "clip_g" in content:
        raise InputError(f"{path} is an embedding for SDXL; supported are Stable Diffusion 1 and 2")
    found = content.get("string_to_param", content)
    if isinstance(found, StoredParameters):
        found = found.parameters
    tensors = {}
    if isinstance(found, Mapping) and len(found) <= MAX_WORDS:
        tensors = {str(n): t for n, t in found.items() if isinstance(t, Tensor)}
    if behind := [f"{name}_out" for name in _NAMELESS if f"{name}_out" in tensors]:
        raise InputError(
            f"{path} has vectors that are added behind the text encoder ({behind[0]}, of "
            "OneTrainer), which is not included; take one that was trained without them"
        )
    if len({tensor.shape[-1:] for tensor in tensors.values()}) != 1:
        raise InputError(
            f"{path} is no textual-inversion embedding: it has {len(tensors)} tensors, not one, or "
            "one for each of several words"
        )
    return tensors


def _picture_content(path: Path) -> Mapping[str, Any] | None:
    """What a web UI wrote into a picture; None for other files.

    Source: AUTOMATIC1111/stable-diffusion-webui, image_embedding.py: a text chunk, JSON in base64.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        if file.read(len(_PNG)) != _PNG:
            return None
        data = file.read(_MAX_PICTURE)
    position = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + size]
        if kind == b"tEXt" and body.startswith(_CHUNK):
            return _decoded(body[len(_CHUNK) :], f"{path}: sd-ti-embedding")
        position += size + 12
    raise InputError(
        f"{path} is a picture without an embedding in it (no sd-ti-embedding chunk); one that is "
        "hidden in the pixels alone is not read: take the .pt that it was made of"
    )


def _decoded(text: bytes, where: str) -> Mapping[str, Any]:
    try:
        content = parse_json(decode_text(base64.b64decode(text, validate=True), where), where)
    except binascii.Error as error:
        raise InputError(f"{where} is damaged: {error}") from error
    stored = content.get("string_to_param")
    if not isinstance(stored, dict):
        raise InputError(f"{where} has no string_to_param")
    return {"string_to_param": {name: _tensor(one, where) for name, one in stored.items()}}


def _tensor(stored: Any, where: str) -> Tensor:
    rows = stored.get("TORCHTENSOR") if isinstance(stored, dict) else None
    try:
        tensor = torch.tensor(rows, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where} holds no table of numbers") from error
    if math.prod(tensor.shape) == 0:
        raise InputError(f"{where} holds no numbers")
    return tensor
