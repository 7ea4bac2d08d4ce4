"""Textual inversion: vectors that a word in a prompt stands for.

Source: Gal et al. 2022 (arXiv 2208.01618); the files are its authors', the web UIs' and diffusers'.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.files import read_content
from ldm.checkpoint.keys import TEXT_ENCODER, Shape
from ldm.checkpoint.pickles import StoredParameters
from ldm.errors import InputError

MAX_VECTORS = 75  # tokens of a prompt
_NAMELESS = ("*", "emb_params")  # what files call their vectors that do not name a word


@dataclass(frozen=True)
class Embedding:
    """The vectors of a file, (n, C), and the words that stand for them in a prompt."""

    path: Path
    words: tuple[str, ...]
    vectors: Tensor

    def summary(self) -> str:
        """One line for the user."""
        words = " or ".join(repr(word) for word in self.words)
        return f"Embedding {self.path.name}: {len(self.vectors)} vectors; write {words} in a prompt"


def read_embedding(path: str | os.PathLike[str], shapes: Mapping[str, Shape]) -> Embedding:
    """Read a textual-inversion file.

    The file's name stands for its vectors and, if there is one in it, the word it was trained as.

    Args:
        path: ``.safetensors``, ``.pt`` or ``.bin``.
        shapes: of the model's tensors.

    Raises:
        InputError: it is something else, or was made for another text encoder.
    """
    path = Path(path)
    word, vectors = _named_vectors(read_content(path), path)
    vectors = vectors.detach().float()
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    table = "token_embedding.weight"
    width = next(
        s[1] for n, s in shapes.items() if n.startswith(TEXT_ENCODER) and n.endswith(table)
    )
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise InputError(
            f"{path} has vectors of {tuple(vectors.shape)}, but the text encoder's have {width} "
            "numbers: it was made for another model"
        )
    if not 1 <= len(vectors) <= MAX_VECTORS:
        raise InputError(f"{path} has {len(vectors)} vectors: allowed are 1 to {MAX_VECTORS}")
    if not torch.isfinite(vectors).all():
        raise InputError(f"{path} is damaged: it has values that are not numbers")
    words = [path.stem, *([] if word in _NAMELESS else [word])]
    return Embedding(path, tuple(dict.fromkeys(words)), vectors)


def read_embeddings(
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


def _named_vectors(content: Mapping[str, Any], path: Path) -> tuple[str, Tensor]:
    """The only vectors of a file, and what it calls them."""
    if "clip_g" in content:
        raise InputError(f"{path} is an embedding for SDXL; supported are Stable Diffusion 1 and 2")
    found = content.get("string_to_param", content)
    if isinstance(found, StoredParameters):
        found = found.parameters
    tensors = {}
    if isinstance(found, Mapping):
        tensors = {str(n): t for n, t in found.items() if isinstance(t, Tensor)}
    if len(tensors) != 1:
        raise InputError(
            f"{path} is no textual-inversion embedding: it has {len(tensors)} tensors, not one"
        )
    return next(iter(tensors.items()))
