"""Text and JSON that come from outside: bounded, checked, and nothing but data.

Files of prompts and captions, lines of jobs, the metadata of pictures, ``about.json`` and the
answers of a network are read here. All errors name the file, and the line where there is one.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import stat
from pathlib import Path
from typing import Any

from ldm.errors import InputError, shown

MAX_BYTES = 64 * 2**20  # of a file
MAX_CHARACTERS = 2**20  # of one string, or one line of JSON
MAX_DEPTH = 32  # lists and mappings inside each other
MAX_VALUES = 100_000  # in one JSON text
MAX_NUMBER = 10**300  # where a whole number stands for any
_LINE_END = re.compile(r"\r\n|\n|\r")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_KINDS: dict[type, str] = {
    dict: "an object {...}",
    list: "a list [...]",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def read_text(path: str | Path, limit: int = MAX_BYTES) -> str:
    """The text of a file, UTF-8 with or without a mark (BOM) at its beginning.

    Args:
        path: a regular file; pipes and devices, which may never end, are refused.
        limit: the most bytes that it may have.

    Raises:
        InputError: the file cannot be read, is too large, or is not text in UTF-8.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            kind = "a folder" if Path(path).is_dir() else "a pipe or a device"
            raise InputError(f"{path}: cannot be read (it is {kind}, not a file)")
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason})") from None
    return decode_text(data, str(path), limit)


def decode_text(data: bytes, where: str, limit: int = MAX_BYTES) -> str:
    """Bytes as text; see `read_text`.

    Args:
        data: what was read.
        where: the file's name, for messages.
        limit: the most bytes that there may be.

    Raises:
        InputError: there are too many, or they are not text in UTF-8.
    """
    if len(data) > limit:
        raise InputError(f"{where}: larger than {limit} bytes, which is the limit for text")
    if data.startswith(_UTF16):
        raise InputError(f"{where}: this is UTF-16, not a text file in UTF-8; save it as UTF-8")
    while data.startswith(codecs.BOM_UTF8):  # two, where a program wrote it before the first
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(_LINE_END.split(data[: error.start].decode("utf-8")))
        raise InputError(
            f"{where}, line {line}: not a text file in UTF-8 (Latin-1, perhaps); save it as UTF-8"
        ) from None
    if "\0" in text:
        line = len(_LINE_END.split(text[: text.index("\0")]))
        raise InputError(f"{where}, line {line}: not a text file in UTF-8; it has zero bytes")
    return text


def split_lines(text: str) -> list[str]:
    """The lines of a text; nothing but a newline (``\\n``, ``\\r\\n``, ``\\r``) ends one.

    ``str.splitlines`` would also take form feeds and U+2028, which are part of a text here. A mark
    (BOM) that begins a line is where files were put together, and no part of it.
    """
    lines = [line.lstrip("\ufeff") for line in _LINE_END.split(text)]
    return lines[:-1] if lines[-1] == "" else lines


def check_text(text: str, where: str, limit: int = MAX_CHARACTERS) -> str:
    """The text, if it can be stored: neither too long nor with halves of characters in it.

    Raises:
        InputError: it cannot.
    """
    if len(text) > limit:
        raise InputError(f"{where}: {len(text)} characters, and {limit} is the limit")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start + 1} is no text in UTF-8 (a lone surrogate, "
            f"U+{ord(text[error.start]):04X})"
        ) from None
    if "\0" in text:
        raise InputError(f"{where}: character {text.index(chr(0)) + 1} is a zero byte")
    return text


def parse_json(text: str, where: str, kind: type = dict) -> Any:
    """JSON with finite numbers, bounded depth and size, no name twice and only whole characters.

    Args:
        text: the JSON.
        where: the file and the line, for messages.
        kind: what it must be: dict, list, str, int, float or bool.

    Raises:
        InputError: it is not; the message says why.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"{where}: {len(text)} characters of JSON, and {MAX_CHARACTERS} is the limit"
        )
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
            object_pairs_hook=_no_name_twice,
        )
    except RecursionError:
        raise InputError(f"{where}: JSON nested deeper than {MAX_DEPTH}, the limit") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not a JSON object ({error})") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    _check_values(value, where)
    return check_kind(value, kind, where)


def read_json(path: str | Path, limit: int = MAX_CHARACTERS) -> dict[str, Any]:
    """The JSON object of a file; see `read_text` and `parse_json`."""
    return parse_json(read_text(path, limit), str(path))


def check_kind(value: Any, kind: type, where: str) -> Any:
    """The value, if it is of a kind; a whole number is also a number, true and false are none.

    Raises:
        InputError: it is of another kind.
    """
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, int) and not is_bool:
        if abs(value) > MAX_NUMBER:
            raise InputError(f"{where}: the number {shown(value)} is too large")
        return float(value)
    if not isinstance(value, kind) or (is_bool and kind is not bool):
        raise InputError(f"{where}: must be {_KINDS[kind]}, not {shown(value)}")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the number {text[:24]} is too large")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:24]} is too large")
    return number


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number that can be used")


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found


def _check_values(value: Any, where: str) -> None:
    """Bounded depth and number of values, and whole characters in every string."""
    n_values = 0
    level = [value]
    for _ in range(MAX_DEPTH):
        n_values += len(level)
        if n_values > MAX_VALUES:
            raise InputError(f"{where}: more than {MAX_VALUES} values, which is the limit")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str):
                check_text(one, where)
        if not below:
            return
        level = below
    raise InputError(f"{where}: JSON nested deeper than {MAX_DEPTH}, the limit")
