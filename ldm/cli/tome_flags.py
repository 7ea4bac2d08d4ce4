"""Token merging on a command line: a flag for each key, and how its text is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from ldm.cli.parser import Parser
from ldm.errors import InputError, shown
from ldm.modules.tome.keys import KEYS

LONGEST = 10_000  # characters of a value
# keys whose flags take several words, and what these are called
LIST_KEYS = {"stride": ("ROWS", "COLUMNS"), "apply_to": ("PLACE", "PLACE")}


def add_tome_flags(parser: Parser) -> None:
    """How tokens are merged: a flag for each key of the model's ``tome_config``."""
    group = parser.add_argument_group(
        "Token Merging", "A flag wins over the preset, the preset over the model's YAML."
    )
    for name, key in KEYS.items():
        options: dict[str, Any] = {"metavar": key.values}
        if key.values == "BOOL":
            options |= {"nargs": "?", "const": "true"}
        elif name in LIST_KEYS:
            options |= {"nargs": "+", "metavar": LIST_KEYS[name]}
        flag = "--tome-" + name.replace("_", "-")
        group.add_argument(flag, dest=f"tome_{name}", help=key.help, **options)
    group.add_argument(
        "--tome-preset", metavar="NAME", help="a file of configs/tome, or one of your own (.yaml)"
    )
    group.add_argument(
        "--no-tome", action="store_true", help="merge nothing, whatever the YAML says"
    )


def parse_flag(key: str, text: str) -> Any:
    """Read the text of a flag ``--tome-KEY`` as the value that a YAML file would hold.

    YAML's own spellings work for all keys. Beside them there are short ones: lists are divided by
    spaces or commas (``2 2``, ``attn,mlp``), the points of ``steps`` are ``progress:ratio``, and
    the entries of ``rules`` are ``min_tokens:key=value,key=value``, divided by semicolons. The
    value is checked later, by `ToMeConfig.from_mapping`.

    Raises:
        InputError: the text is too long, or is no YAML.
    """
    if len(text) > LONGEST:
        raise InputError(f"--tome-{key} {shown(text)}: longer than {LONGEST} characters")
    if text.lstrip().startswith(("[", "{")):
        return _yaml(text, f"--tome-{key.replace('_', '-')}")
    return _SHORT_FORMS.get(key, literal)(text)


def _yaml(text: str, flag: str) -> Any:
    if re.search(r"[&*!]", text):  # YAML's references and tags: nothing here needs one
        raise InputError(f"{flag} {shown(text)}: '&', '*' and '!' are not allowed")
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"{flag} {shown(text)}: not a list or mapping in YAML") from None


def literal(text: str) -> Any:
    """A word as YAML reads it: null, true, false, a number, or the word; ``none`` is null, too."""
    word = text.strip()
    if word.lower() == "none":
        return None
    if not re.fullmatch(r"[\w.+~-]+", word):
        return word
    if re.fullmatch(r"[+-]?\d{1,100}", word, re.ASCII):  # 010 is ten, which YAML takes for eight
        return int(word)
    try:
        value = yaml.safe_load(word)
    except (yaml.YAMLError, ValueError):
        return word
    if isinstance(value, str):
        try:
            return float(value)  # YAML takes 1e-3 for a word
        except ValueError:
            return value
    return value


def _literals(text: str) -> list[Any]:
    return [literal(word) for word in re.split(r"[\s,+x]+", text.strip())]


def _words(text: str) -> list[str]:
    return re.split(r"[\s,+]+", text.strip())


def _pairs(text: str) -> list[list[Any]]:
    """``0:0.6,0.7:0`` -> [[0, 0.6], [0.7, 0]]."""
    return [[literal(word) for word in pair.split(":")] for pair in _words(text)]


def _assignments(text: str) -> dict[str, Any]:
    """``method=kth,k=8`` -> the keys of a mapping."""
    keys: dict[str, Any] = {}
    # A comma divides keys, and the values of a list: a word without = belongs to the latter.
    for assignment in filter(None, re.split(r",\s*(?=[\w-]+=)", text.strip())):
        key, _, value = assignment.partition("=")
        key = key.strip().replace("-", "_")
        keys[key] = parse_flag(key, value) if key in KEYS else literal(value)
    return keys


def _entries(text: str) -> list[dict[str, Any]]:
    """``9216:method=kth,k=8;4096:k=4`` -> the entries of ``rules``."""
    entries = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        head, _, body = part.partition(":")
        entries.append({"min_tokens": literal(head), **_assignments(body)})
    return entries


_SHORT_FORMS: dict[str, Callable[[str], Any]] = {
    "stride": _literals,
    "apply_to": _words,
    "rules": _entries,
    "steps": _pairs,
    "hires": _assignments,
}
