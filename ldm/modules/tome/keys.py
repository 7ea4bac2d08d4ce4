"""The keys of token merging: what each may be, how a flag spells it, and what it means."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

METHODS = ("bipartite", "kth", "random", "grid", "downsample")
PLACES = ("kv", "q", "attn", "crossattn", "mlp", "block")
METRICS = ("hidden", "normed", "keys", "keys_mean", "logits")

# --- the values of each key ---------------------------------------------------------------------


def _one_of(*allowed: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value not in allowed or isinstance(value, bool):
            raise ValueError(f"must be one of {', '.join(map(str, allowed))}")
        return value

    return check


def _integer(low: int, also_none: bool = False) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value is None and also_none:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"must be a whole number of at least {low}")
        return value

    return check


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError("must be a number")
    return float(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _ratio(value: Any) -> float | str | None:
    if value is None or value == "auto":
        return value
    if isinstance(value, str) or not 0 <= _number(value) < 1:
        raise ValueError("must be auto or a number from 0 to below 1")
    return float(value)


def _k(value: Any) -> int | str | None:
    if isinstance(value, str):
        if not re.fullmatch(r"tokens//[1-9]\d*", value):
            raise ValueError("must be a whole number of at least 1, or tokens//N")
        return value
    return _integer(1, also_none=True)(value)


def _stride(value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("must be two whole numbers, [rows, columns]")
    return _integer(1)(value[0]), _integer(1)(value[1])


def _apply_to(value: Any) -> tuple[str, ...]:
    places = (value,) if isinstance(value, str) else tuple(value or ())
    if not places or any(place not in PLACES for place in places):
        raise ValueError(f"must be one or more of {', '.join(PLACES)}")
    if "block" in places and len(places) > 1:
        raise ValueError("block wraps the whole block, so it stands alone")
    return places


def _window(value: Any) -> int | None:
    if _integer(1, also_none=True)(value) is not None and value % 2 == 0:
        raise ValueError("must be an odd number of cells, or null for no limit")
    return value


def _similarity(value: Any) -> float | None:
    if value is not None and not -1 <= _number(value) <= 1:
        raise ValueError("is a cosine, from -1 to 1")
    return None if value is None else float(value)


def _metric(value: Any) -> str | None:
    return None if value is None else _one_of(*METRICS)(value)


def _rules(value: Any) -> tuple[Mapping[str, Any], ...]:
    entries = value or ()
    if not isinstance(entries, (list, tuple)) or any(not isinstance(e, Mapping) for e in entries):
        raise ValueError("must be a list of mappings, each with min_tokens")
    return tuple(entries)


def _keys(value: Any) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError("must be a mapping of other keys")
    return value


def _steps(value: Any) -> tuple[tuple[float, float], ...]:
    points = value or ()
    is_list = isinstance(points, (list, tuple))
    if not is_list or any(not isinstance(p, (list, tuple)) or len(p) != 2 for p in points):
        raise ValueError("must be a list of [progress, ratio]")
    points = tuple((_number(progress), _number(ratio)) for progress, ratio in points)
    progress = [point[0] for point in points]
    if any(not 0 <= p <= 1 for p in progress) or progress != sorted(set(progress)):
        raise ValueError("progress must rise from 0 to 1")
    if any(not 0 <= ratio < 1 for _, ratio in points):
        raise ValueError("each ratio must be a number from 0 to below 1")
    return points


# --- the text of each key, as a flag has it -----------------------------------------------------


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


def parse_flag(key: str, text: str) -> Any:
    """Read the text of a flag ``--tome-KEY`` as the value that a YAML file would hold.

    Lists are divided by spaces or commas (``2 2``, ``attn,mlp``), the points of ``steps`` are
    ``progress:ratio``, and the entries of ``rules`` are ``min_tokens:key=value,key=value``,
    divided by semicolons. The value is checked later, by `ToMeConfig.from_mapping`.
    """
    return KEYS[key].parse(text)


@dataclass(frozen=True)
class Key:
    """One key: what its value may be, how a flag spells it, and what it means."""

    check: Callable[[Any], Any]
    values: str
    help: str
    parse: Callable[[str], Any] = _literal
    in_rules: bool = True


KEYS: dict[str, Key] = {
    "method": Key(_one_of(*METHODS), "|".join(METHODS), "how destinations are chosen"),
    "ratio": Key(_ratio, "RATIO|auto", "share of tokens removed; 0 is off"),
    "r": Key(_integer(0, also_none=True), "N", "number of tokens removed, instead of a ratio"),
    "k": Key(_k, "K|tokens//N", "kth: one token in k survives"),
    "stride": Key(_stride, "ROWS COLUMNS", "grid, downsample: size of a cell", _literals),
    "random": Key(_boolean, "BOOL", "grid: a random destination in each cell"),
    "apply_to": Key(
        _apply_to,
        "PLACE,...",
        f"where tokens are merged: {', '.join(PLACES[:-1])}, or block alone",
        _words,
    ),
    "metric": Key(_metric, "|".join(METRICS), "what is compared to find similar tokens"),
    "weighted": Key(
        _boolean, "BOOL", "kv by logits: in a group's mean, count tokens by the attention they get"
    ),
    "protect": Key(_one_of(0, 1, 2), "0|1|2", "bipartite: first tokens never merged away"),
    "window": Key(_window, "CELLS|none", "grid: match only within so many cells a side (odd)"),
    "max_downsample": Key(_one_of(1, 2, 4, 8), "1|2|4|8", "act at up to this downsampling"),
    "min_tokens": Key(_integer(0), "N", "leave blocks with fewer tokens alone"),
    "max_tokens": Key(
        _integer(1, also_none=True), "N", "keep at most so many tokens, instead of a ratio"
    ),
    "similarity": Key(_similarity, "COSINE|none", "merge only pairs at least this similar"),
    "rules": Key(
        _rules,
        "N:KEY=VALUE,...;...",
        "other keys by number of tokens: the first entry that fits wins",
        _entries,
        in_rules=False,
    ),
    "steps": Key(
        _steps, "PROGRESS:RATIO,...", "ratio over progress, 0 to 1", _pairs, in_rules=False
    ),
    "hires": Key(
        _keys,
        "KEY=VALUE,...",
        "other keys for the second pass of --hires_scale",
        _assignments,
        in_rules=False,
    ),
    "reuse_steps": Key(_integer(1), "N", "keep a plan for so many model calls", in_rules=False),
    "reuse_layers": Key(
        _boolean, "BOOL", "share a plan among the blocks of a resolution", in_rules=False
    ),
    "proportional": Key(
        _boolean, "BOOL", "count a merged token as many in attention", in_rules=False
    ),
    "context": Key(
        _one_of("full", "trim"), "full|trim", "trim: drop the prompt's padding", in_rules=False
    ),
    "seed": Key(_integer(0), "N", "seed of the merging's own generator", in_rules=False),
}
