"""Token merging on a command line: a flag for each key, over the preset of ``--tome-preset``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ldm.modules.tome.config import KEYS


def parse_flag(key: str, text: str) -> Any:
    """Read the text of a flag ``--tome-KEY`` as the value that a YAML file would hold.

    Lists are divided by spaces or commas (``2 2``, ``attn,mlp``), the points of ``steps`` are
    ``progress:ratio``, and the entries of ``rules`` are ``min_tokens:key=value,key=value``,
    divided by semicolons. The value is checked later, by `ToMeConfig.from_mapping`.
    """
    return _PARSERS.get(key, _literal)(text)


def _literal(text: str) -> Any:
    """A word of a flag as YAML would read it: null, true, false, a number, or the word."""
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _literals(text: str) -> list[Any]:
    return [_literal(word) for word in re.split(r"[\s,+x]+", text.strip())]


def _words(text: str) -> list[str]:
    return re.split(r"[\s,+]+", text.strip())


def _pairs(text: str) -> list[list[Any]]:
    """``0:0.6,0.7:0`` -> [[0, 0.6], [0.7, 0]]."""
    return [[_literal(word) for word in pair.split(":")] for pair in _words(text)]


def _assignments(text: str) -> dict[str, Any]:
    """``method=kth,k=8`` -> the keys of a mapping."""
    keys: dict[str, Any] = {}
    # A comma divides keys, and the values of a list: a word without = belongs to the latter.
    for assignment in filter(None, re.split(r",\s*(?=[\w-]+=)", text.strip())):
        key, _, value = assignment.partition("=")
        key = key.strip().replace("-", "_")
        keys[key] = parse_flag(key, value) if key in KEYS else _literal(value)
    return keys


def _entries(text: str) -> list[dict[str, Any]]:
    """``9216:method=kth,k=8;4096:k=4`` -> the entries of ``rules``."""
    entries = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        head, _, body = part.partition(":")
        entries.append({"min_tokens": _literal(head), **_assignments(body)})
    return entries


_PARSERS: dict[str, Callable[[str], Any]] = {
    "stride": _literals,
    "apply_to": _words,
    "rules": _entries,
    "steps": _pairs,
    "hires": _assignments,
}
