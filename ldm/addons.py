"""Files of ``models/`` that are added to a model by name, and the words of a prompt that name them.

A prompt names a LoRA by ``<lora:NAME:WEIGHT>``, and an embedding by its name alone. A name is one
of those that the folders offer, never a path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from ldm.config import shipped
from ldm.errors import InputError, shown

SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
KINDS = ("lora", "embeddings", "vae", "controlnet")  # folders below models/
MOST_WEIGHT = 10.0  # of a LoRA in a prompt, either way
_TAG = re.compile(r"<(\w+):([^<>]*)>")

Tags: TypeAlias = tuple[tuple[str, float], ...]
"""Names and weights of LoRAs."""


def folders() -> list[Path]:
    """Where models are looked for: in the working folder and in the project."""
    return list(dict.fromkeys([Path("models").resolve(), shipped("models").resolve()]))


def files_below(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files of weights in a folder, by their names; none is opened."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def named(paths: Iterable[Path], below: Sequence[Path]) -> dict[str, Path]:
    """Paths by their names, each file once, at its first place.

    A name is the path from one of the folders on, elsewhere the file's own; the whole path where
    that is taken.
    """
    once: dict[Path, Path] = {}
    for path in paths:
        once.setdefault(path.resolve(), path)
    found: dict[str, Path] = {}
    for real, path in once.items():
        inside = [folder for folder in below if folder in real.parents]
        name = str(real.relative_to(inside[0])) if inside else path.name
        found[str(path) if name in found else name] = path
    return found


def find_addons(kind: str) -> dict[str, Path]:
    """The files of ``models/KIND`` by the names to show, which have no ending.

    Of two files that differ in their ending the last by name has that name, the others keep theirs.

    Args:
        kind: ``lora``, ``embeddings``, ``vae`` or ``controlnet``.
    """
    below = [folder / kind for folder in folders()]
    files = [path for folder in below for path in files_below(folder)]
    if kind == "embeddings":  # pictures may hold some, or be the preview of the file of their name
        files = [path for folder in below for path in files_below(folder, (".png",))] + files
    found: dict[str, Path] = {}
    for name, path in named(files, below).items():
        short = name.removesuffix(path.suffix)
        before = found.get(short)
        if before is not None and before.suffix.lower() != ".png":
            found[short + before.suffix] = before
        found[short] = path
    return found


def offered(kind: str, name: object) -> Path:
    """One of them, by its name.

    Raises:
        InputError: there is none of that name.
    """
    files = find_addons(kind)
    if not isinstance(name, str) or name not in files:
        have = ", ".join(files) or "none yet"
        raise InputError(f"{kind} {shown(name)}: not in models/{kind}, where there are: {have}")
    return files[name]


# --- in a prompt --------------------------------------------------------------------------------


def taken_loras(prompt: str) -> tuple[str, Tags]:
    """A prompt without its ``<lora:NAME:WEIGHT>``, and what these name; the weight is 1 if unsaid.

    Raises:
        InputError: a weight is no number, or a tag is of another kind.
    """
    if "<" not in prompt:
        return prompt, ()
    return without_tags(prompt), tuple(_read(*match.groups()) for match in _TAG.finditer(prompt))


def without_tags(prompt: str) -> str:
    """A prompt without anything in the form of a tag."""
    return _TAG.sub("", prompt)


def _read(kind: str, text: str) -> tuple[str, float]:
    tag = shown(f"<{kind}:{text}>")
    name, *weights = (part.strip() for part in text.split(":"))
    if kind.lower() not in ("lora", "lyco") or len(weights) > 1:
        raise InputError(f"{tag} in a prompt: only <lora:NAME:WEIGHT> is known")
    try:
        weight = float(weights[0]) if weights else 1.0
    except ValueError:
        weight = math.nan
    if not abs(weight) <= MOST_WEIGHT:
        raise InputError(f"{tag} in a prompt: the weight is not a number from -10 to 10")
    return name, weight


def lora_files(tags: Iterable[tuple[str, float]]) -> list[tuple[Path, float]]:
    """The files of ``models/lora`` that tags name, and their weights.

    Raises:
        InputError: there is none of that name.
    """
    return [(offered("lora", name), weight) for name, weight in tags]


def usable_tags(prompt: str) -> tuple[str, list[str]]:
    """A prompt without the tags that cannot be used here, and what is wrong with each."""
    left_out: list[str] = []

    def kept(tag: re.Match[str]) -> str:
        try:
            lora_files([_read(*tag.groups())])
        except InputError as error:
            left_out.append(str(error))
            return ""
        return tag[0]

    return _TAG.sub(kept, prompt), left_out


def embedding_words() -> dict[str, Path]:
    """The words that the files of ``models/embeddings`` stand for: their names without folders."""
    found: dict[str, Path] = {}
    for path in find_addons("embeddings").values():
        found.setdefault(path.stem, path)
    return found


def embeddings_in(texts: Iterable[str]) -> dict[str, Path]:
    """Which of them are words of a text, in any case of letters."""
    files = embedding_words()
    longest_first = sorted(map(re.escape, files), key=len, reverse=True)
    words = re.compile(rf"(?<!\w)({'|'.join(longest_first)})(?!\w)", re.IGNORECASE)
    said = {word.lower() for text in texts for word in words.findall(text)} if files else ()
    return {word: path for word, path in files.items() if word.lower() in said}
