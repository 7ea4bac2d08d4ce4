"""The keys of token merging: what each may be, what it means, and how others spell it.

Pure Python, so that ``--help`` and configuration errors need no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.errors import InputError

METHODS = ("bipartite", "kth", "random", "grid", "downsample", "tiles", "prune", "cover", "guided")
PLACES = ("kv", "q", "attn", "crossattn", "mlp", "block")
METRICS = ("hidden", "normed", "keys", "keys_mean", "logits")
# The keys that say how much is removed: one of them at a time (for downsample, the stride).
AMOUNTS = ("ratio", "r", "k", "max_tokens", "steps")
# Keys that mean something to some methods only.
METHOD_KEYS = {
    **dict.fromkeys(
        ("ratio", "r", "max_tokens", "steps"),
        ("bipartite", "random", "grid", "prune", "cover", "guided"),
    ),
    "k": ("kth",),
    "stride": ("grid", "downsample", "tiles", "prune", "cover", "guided"),
    "random": ("grid", "tiles", "prune"),
    "window": ("grid",),
    "protect": ("bipartite",),
    "metric": ("bipartite", "kth", "random", "grid", "prune", "cover", "guided"),
    "similarity": ("bipartite", "kth", "random", "grid"),
    "mean": ("bipartite", "kth", "random", "grid", "guided"),
}
_TOMESD_PLACES = {"merge_attn": "attn", "merge_crossattn": "crossattn", "merge_mlp": "mlp"}
LARGEST = 2**31 - 1


# --- the keys ------------------------------------------------------------------------------------


def _one_of(*allowed: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value not in allowed:
            raise ValueError(f"must be one of {', '.join(map(str, allowed))}")
        return value

    return check


def _integer(low: int, also_none: bool = False) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value is None and also_none:
            return None
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not low <= value <= LARGEST:
            raise ValueError(f"must be a whole number of at least {low}, and at most {LARGEST}")
        return value

    return check


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _is_list(value: Any) -> bool:
    """Whether it is a list of whatever library, as that of OmegaConf."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _ratio(value: Any) -> float | str | None:
    if value is None or value == "auto":
        return value
    if not _is_number(value, 0, 1) or value == 1:
        raise ValueError("must be auto or a number from 0 to below 1")
    return float(value)


def _k(value: Any) -> int | str | None:
    if isinstance(value, str):
        if not re.fullmatch(r"tokens//[1-9]\d{0,8}", value, re.ASCII):
            raise ValueError("must be a whole number of at least 1, or tokens//N")
        return value
    return _integer(1, also_none=True)(value)


def _stride(value: Any) -> tuple[int, int]:
    if not _is_list(value) or len(value) != 2:
        raise ValueError("must be two whole numbers, [rows, columns]")
    return _integer(1)(value[0]), _integer(1)(value[1])


def _apply_to(value: Any) -> tuple[str, ...]:
    places = (value,) if isinstance(value, str) else value
    is_some = _is_list(places) and len(places) > 0
    if not is_some or any(place not in PLACES for place in places):
        raise ValueError(f"must be one or more of {', '.join(PLACES)}")
    if "block" in places and len(places) > 1:
        raise ValueError("block wraps the whole block, so it stands alone")
    return tuple(places)


def _window(value: Any) -> int | None:
    if _integer(1, also_none=True)(value) is not None and value % 2 == 0:
        raise ValueError("must be an odd number of cells, or null for no limit")
    return value


def _similarity(value: Any) -> float | None:
    if value is not None and not _is_number(value, -1, 1):
        raise ValueError("is a cosine, from -1 to 1")
    return None if value is None else float(value)


def _metric(value: Any) -> str | None:
    return None if value is None else _one_of(*METRICS)(value)


def _rules(value: Any) -> tuple[Mapping[str, Any], ...]:
    entries = () if value is None else value
    if not _is_list(entries) or any(not isinstance(e, Mapping) for e in entries):
        raise ValueError("must be a list of mappings, each with min_tokens")
    return tuple(entries)


def _keys(value: Any) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError("must be a mapping of other keys")
    return value


def _steps(value: Any) -> tuple[tuple[float, float], ...]:
    points = () if value is None else value
    if not _is_list(points) or any(not _is_list(p) or len(p) != 2 for p in points):
        raise ValueError("must be a list of [progress, ratio]")
    progress = [point[0] for point in points]
    if any(not _is_number(p, 0, 1) for p in progress) or progress != sorted(set(progress)):
        raise ValueError("progress must rise from 0 to 1")
    if any(not _is_number(ratio, 0, 1) or ratio == 1 for _, ratio in points):
        raise ValueError("each ratio must be a number from 0 to below 1")
    return tuple((float(p), float(ratio)) for p, ratio in points)


@dataclass(frozen=True)
class Key:
    """One key: what its value may be, and what it means."""

    check: Callable[[Any], Any]
    values: str
    help: str
    in_rules: bool = True


KEYS: dict[str, Key] = {
    "method": Key(_one_of(*METHODS), "|".join(METHODS), "how destinations are chosen"),
    "ratio": Key(_ratio, "RATIO|auto", "share of tokens removed; 0 is off"),
    "r": Key(_integer(0, also_none=True), "N", "number of tokens removed, instead of a ratio"),
    "k": Key(_k, "K|tokens//N", "kth: one token in k survives"),
    "stride": Key(
        _stride, "ROWS COLUMNS", "grid, downsample, prune: size of a cell; tiles, cover: of a tile"
    ),
    "random": Key(
        _boolean,
        "BOOL",
        "grid: a random destination in each cell; tiles: of random size; prune: a little noise",
    ),
    "apply_to": Key(
        _apply_to,
        "PLACE,...",
        f"where tokens are merged: {', '.join(PLACES[:-1])}, or block alone",
    ),
    "metric": Key(_metric, "|".join(METRICS), "what is compared to find similar tokens"),
    "weighted": Key(
        _boolean, "BOOL", "kv by logits: in a group's mean, count tokens by the attention they get"
    ),
    "mean": Key(
        _one_of("plain", "norm"), "plain|norm", "norm: a mean as long as its tokens on average"
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
        in_rules=False,
    ),
    "steps": Key(_steps, "PROGRESS:RATIO,...", "ratio over progress, 0 to 1", in_rules=False),
    "hires": Key(
        _keys,
        "KEY=VALUE,...",
        "other keys for the second pass of --hires_scale",
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


def spelled_out(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Translate tomesd's spellings; anything else is passed on."""
    if not isinstance(mapping, Mapping):
        raise InputError(f"ToMe takes a mapping of keys, not {mapping!r}")
    given = dict(mapping)
    translated: dict[str, Any] = {}
    if "sx" in given or "sy" in given:
        translated["stride"] = [given.pop("sy", 2), given.pop("sx", 2)]
    if "use_rand" in given:
        translated["random"] = given.pop("use_rand")
    if any(key in given for key in _TOMESD_PLACES):
        wanted = {key: given.pop(key, key == "merge_attn") for key in _TOMESD_PLACES}
        unclear = [key for key, on in wanted.items() if not isinstance(on, bool)]
        if unclear:
            raise InputError(f"ToMe {unclear[0]}={wanted[unclear[0]]!r}: must be true or false")
        translated["apply_to"] = [_TOMESD_PLACES[key] for key, on in wanted.items() if on]
    twice = sorted(set(translated) & set(given))
    if twice:
        raise InputError(f"ToMe {twice[0]}={given[twice[0]]!r} is also set in tomesd's spelling")
    return {**given, **translated}
