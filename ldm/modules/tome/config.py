"""What the user asked for, checked once, at the boundary.

Pure Python, so that ``--help`` and configuration errors need no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from ldm.errors import InputError
from ldm.modules.tome.keys import AMOUNTS, KEYS, LARGEST, METHOD_KEYS, METHODS, METRICS, spelled_out

logger = logging.getLogger(__name__)

BY_STRIDE = ("downsample", "tiles")  # methods whose amount the stride sets
NO_AMOUNT = "ToMe merges nothing: no amount is given; set ratio, r, k, max_tokens or steps"
ROUNDING = 1e-4  # a ratio written with four digits may stand for a fraction such as 8/9


@dataclass(frozen=True)
class ToMeConfig:
    """A checked configuration of token merging; ``ToMeConfig()`` merges nothing.

    Build it with `from_mapping`. The fields are the keys of a YAML's ``tome_config``, explained in
    `KEYS`; ``rules`` and ``hires`` hold complete configurations.
    """

    method: str = "grid"
    ratio: float | str | None = None
    r: int | None = None
    k: int | str | None = None
    stride: tuple[int, int] = (2, 2)
    random: bool = False
    apply_to: tuple[str, ...] = ("attn",)
    metric: str = "logits"
    weighted: bool = True
    mean: str = "plain"
    protect: int = 0
    window: int | None = 3
    max_downsample: int = 1
    min_tokens: int = 0
    max_tokens: int | None = None
    similarity: float | None = None
    rules: tuple[ToMeConfig, ...] = ()
    steps: tuple[tuple[float, float], ...] = ()
    hires: ToMeConfig | None = None
    reuse_steps: int = 1
    reuse_layers: bool = False
    proportional: bool = True
    context: str = "full"
    seed: int = 0

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any] | None) -> ToMeConfig:
        """Check a mapping of keys, in this project's spelling or tomesd's.

        Raises:
            InputError: a key is unknown, a value cannot do what it says, or two keys set the
                amount; the message names the key, the value and the limit.
        """
        config = cls._checked(mapping)
        pairs = [*pairwise(config.rules), *pairwise(config.second_pass.rules)]
        hidden = [(b.min_tokens, a.min_tokens) for a, b in pairs if b.min_tokens >= a.min_tokens]
        for tokens in dict.fromkeys(hidden):
            logger.warning(
                "ToMe rules: the entry from %d tokens never acts after that from %d; begin with "
                "the most tokens",
                *tokens,
            )
        return config

    @classmethod
    def _checked(cls, mapping: Mapping[str, Any] | None) -> ToMeConfig:
        """What `from_mapping` gives, without a word of what never acts."""
        given = spelled_out(mapping or {})
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in KEYS:
                raise InputError(f"ToMe has no key {name!r}; the keys are {', '.join(KEYS)}")
            try:
                values[name] = KEYS[name].check(value)
            except ValueError as limit:
                raise InputError(f"ToMe {name}={value!r}: {limit}") from None
        if "method" not in values:
            values["method"] = "grid" if values.get("k") is None else "kth"
        _refuse_contradictions(values)
        values.setdefault("window", 3 if values["method"] == "grid" else None)
        _set_metric(values)
        rules = tuple(_rule(spelled_out(entry), given) for entry in values.pop("rules", ()))
        if values.get("hires") is not None:
            values["hires"] = _second_pass(values["hires"], given)
        return cls(**values, rules=rules)

    @property
    def second_pass(self) -> ToMeConfig:
        """The configuration of a second pass on the enlarged picture."""
        return self.hires or replace(self, hires=None)

    @property
    def is_off(self) -> bool:
        """Whether no block of any size would merge anything."""
        return not self._has_amount and all(rule.is_off for rule in self.rules)

    @property
    def changes_nothing(self) -> bool:
        """Whether pictures are those without it, also where there is a second pass."""
        passes = (self, self.second_pass)
        return all(one.is_off and one.context == "full" for one in passes)

    @property
    def _has_amount(self) -> bool:
        if self.method in BY_STRIDE:
            return self.stride != (1, 1) and 0 not in (self.ratio, self.r)
        if self.steps:
            return any(ratio > 0 for _, ratio in self.steps)
        return bool(self.ratio or self.r or self.max_tokens or self.k not in (None, 1))

    def for_tokens(self, n_tokens: int) -> ToMeConfig:
        """The configuration of a block of that many tokens: the first rule that fits, or this."""
        for rule in self.rules:
            if n_tokens >= rule.min_tokens:
                return rule
        return replace(self, rules=()) if self.rules else self

    def ratio_at(self, progress: float) -> float | str | None:
        """The ratio at a progress of 0 (pure noise) to 1 (picture), from ``steps`` if there."""
        if not self.steps:
            return self.ratio
        for (start, first), (end, second) in zip(self.steps, self.steps[1:], strict=False):
            if start <= progress < end:
                return first + (second - first) * (progress - start) / (end - start)
        return self.steps[0][1] if progress < self.steps[0][0] else self.steps[-1][1]

    @property
    def max_ratio(self) -> float:
        """The largest share of tokens that the method can remove from a large picture."""
        cell = self.stride[0] * self.stride[1]
        by_cell = self.method in ("grid", "downsample", "prune", "cover", "guided")
        return 1 - 1 / cell if by_cell else {"bipartite": 0.5}.get(self.method, 1.0)

    def removable(self, h: int, w: int) -> int:
        """How many of h * w tokens the method can remove."""
        n = h * w
        if self.method == "bipartite":
            return max(0, (n - self.protect) // 2)
        if self.method == "random":
            return n - 1
        if self.method == "kth":
            return n - max(1, n // self.group(n))
        if self.method in ("tiles", "cover"):
            tile = tile_side(h, self.stride[0]) * tile_side(w, self.stride[1])
            return n - (tile if self.method == "tiles" else n // tile)
        rows, columns = cells(h, w, self.stride)
        return n - rows * columns

    def group(self, n_tokens: int) -> int:
        """``k`` in numbers: one token of so many survives."""
        if isinstance(self.k, str):
            return max(1, n_tokens // int(self.k.removeprefix("tokens//")))
        return self.k or 1

    def removed(self, h: int, w: int, ratio: float | str | None = None) -> int:
        """How many of h * w tokens are removed, where ``ratio`` is the one in force, if any.

        It is what the amount's key asks for, or all that the method can remove if that is less.
        """
        n, limit = h * w, self.removable(h, w)
        if ratio is None:
            ratio = self.ratio
        if self.method in ("kth", *BY_STRIDE):
            return limit if self._has_amount else 0
        if isinstance(ratio, (int, float)):
            return min(limit, int(n * ratio + 1e-6))  # 0.29 of 100 tokens are 29
        if self.r is not None:
            return min(limit, self.r)
        if self.max_tokens is not None:
            return min(limit, max(0, n - self.max_tokens))
        return 0


def cells(h: int, w: int, stride: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of whole stride cells; at least one, however narrow the picture."""
    return h // min(stride[0], h), w // min(stride[1], w)


def tile_side(side: int, least: int, option: int = 0) -> int:
    """The rows or columns of a tile: those numbers from ``least`` on that divide the side.

    Args:
        side: tokens of the picture.
        least: at least so many; the side itself where it is smaller.
        option: 0 the smallest of them, 1 the next one, if there is one.
    """
    fits = [n for n in range(min(least, side), side + 1) if side % n == 0]
    return fits[min(option, len(fits) - 1)]


def overlay(base: Mapping[str, Any] | None, override: Mapping[str, Any] | None) -> dict[str, Any]:
    """Lay one mapping of keys over another: a flag over a preset, a preset over a YAML.

    A key that sets the amount replaces whichever key set it below, another method drops the
    keys below that mean nothing to it, and what is overridden is so in the rules below as well:
    none acts on fewer tokens than ``min_tokens``, and an amount of 0 leaves none of them.
    What is said of the second pass (``hires``) stands, and is laid over in the same way.

    Raises:
        InputError: an amount would do nothing in one of these rules.
    """
    below, above = spelled_out(base or {}), spelled_out(override or {})
    drops = set(above)
    if drops & {*AMOUNTS, "rules"}:
        drops |= {*AMOUNTS, "rules"} if "rules" in above else set(AMOUNTS)
    method = above.get("method")
    if method is not None and method != below.get("method", "grid"):
        drops |= {key for key, methods in METHOD_KEYS.items() if method not in methods}
    amount = next((key for key in AMOUNTS if above.get(key) not in (None, ())), None)
    if amount is not None and above[amount] == 0:
        drops.add("rules")
    kept = {key: value for key, value in below.items() if key not in drops}
    if isinstance(kept.get("rules"), (list, tuple)):
        kept["rules"] = list(_overlaid_rules(kept["rules"], above, drops, amount))
    if isinstance(below.get("hires"), Mapping) and isinstance(above.get("hires"), Mapping):
        above["hires"] = overlay(below["hires"], above["hires"])
    return {**kept, **above}


def _overlaid_rules(
    rules: Iterable[Any], above: Mapping[str, Any], drops: Set[str], amount: str | None
) -> Iterator[dict[str, Any]]:
    """The entries of rules that lie below other keys; see `overlay`."""
    least = above.get("min_tokens")
    before = None
    for entry in map(spelled_out, rules):
        kept = {k: v for k, v in entry.items() if k == "min_tokens" or k not in drops}
        own = kept.get("min_tokens")
        if amount is not None and kept.get("method") in BY_STRIDE:
            raise InputError(
                f"ToMe {amount}={above[amount]!r} means nothing to method {kept['method']}, which "
                f"the rules below have from {own!r} tokens; give a method or rules, too"
            )
        if isinstance(least, int) and isinstance(own, int) and own < least:
            kept["min_tokens"] = least
            if before == least:
                continue  # the one before it always fits
        before = kept.get("min_tokens")
        yield kept


@dataclass(frozen=True)
class ToMeWish:
    """What is asked for as long as nobody knows the model, whose own keys lie below.

    Attributes:
        keys: flags over the preset.
        is_off: merge nothing, whatever lies below.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    is_off: bool = False

    def over(self, own: Mapping[str, Any] | None) -> ToMeConfig:
        """The configuration that this comes to with a model's own keys.

        Raises:
            InputError: as `ToMeConfig.from_mapping`.
        """
        if self.is_off:
            return ToMeConfig()
        found = ToMeConfig.from_mapping(overlay(own, self.keys))
        # of other settings the run's report says it
        if self.keys and replace(found, seed=0) == ToMeConfig():
            logger.warning(NO_AMOUNT)
        return found


def refuse_contradictions(mapping: Mapping[str, Any]) -> None:
    """Raise InputError where keys cannot go together, whatever they are laid over."""
    below: list[dict[str, Any]] = [{}, *({"metric": metric} for metric in METRICS)]
    below += [{"method": method} for method in METHODS]
    below += [{"stride": [LARGEST, 1]}, {"apply_to": "kv"}]
    errors = []
    for base in below:
        try:
            ToMeConfig._checked(overlay(base, mapping))
        except InputError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def _refuse_contradictions(values: dict[str, Any]) -> None:
    """Raise InputError where checked values cannot go together."""
    method = values["method"]
    amounts = [key for key in AMOUNTS if values.get(key) not in (None, ())]
    if len(amounts) > 1:
        pairs = " and ".join(f"{key}={values[key]!r}" for key in amounts)
        raise InputError(f"ToMe {pairs}: both set the amount; give one of {', '.join(AMOUNTS)}")
    for key, methods in METHOD_KEYS.items():
        if values.get(key) not in (None, False, 0, (), "plain") and method not in methods:
            raise InputError(
                f"ToMe {key}={values[key]!r} means nothing for method {method}; "
                f"it belongs to {' and '.join(methods)}"
            )
    ratios = [ratio for _, ratio in values.get("steps") or ()]
    if isinstance(values.get("ratio"), float):
        ratios.append(values["ratio"])
    stride = values.get("stride", (2, 2))
    limit = ToMeConfig(method=method, stride=stride).max_ratio
    by_stride = f" with stride {list(stride)}" if method in METHOD_KEYS["stride"] else ""
    for ratio in ratios:
        if ratio > limit + ROUNDING:
            raise InputError(
                f"ToMe ratio={ratio:g}: method {method}{by_stride} can remove at most {limit:g} of "
                "the tokens"
            )


def _set_metric(values: dict[str, Any]) -> None:
    """Choose the metric where none is given; raise InputError where values do not go with it."""
    places = {*values.get("apply_to", ("attn",))}
    is_attention = places <= {"kv", "q", "attn"}
    if values.get("metric") is None:
        is_ours = is_attention and values["method"] == "grid" and values.get("similarity") is None
        published = "keys" if places == {"kv"} else "hidden"
        values["metric"] = "logits" if is_ours else published
    by_logits = values["metric"] == "logits"
    if values["method"] == "tiles" and places != {"attn"}:
        raise InputError(
            f"ToMe apply_to={list(values['apply_to'])}: method tiles cuts queries, keys and values "
            "of self-attention alike; leave apply_to out"
        )
    if by_logits and not is_attention:
        raise InputError(
            f"ToMe metric='logits' is for kv, q and attn alone, not for "
            f"apply_to={list(values['apply_to'])}; hidden is for all"
        )
    if by_logits and values["method"] in ("prune", "cover"):
        raise InputError(
            f"ToMe metric='logits' compares distances, but method {values['method']} compares "
            "cosines; set metric to hidden, normed, keys or keys_mean"
        )
    if by_logits and values.get("similarity") is not None:
        raise InputError(
            f"ToMe similarity={values['similarity']!r} is a cosine, but metric logits compares "
            "distances; set metric to hidden, normed, keys or keys_mean"
        )
    if values.get("weighted") and not by_logits:
        raise InputError(f"ToMe weighted=True needs metric logits, not {values['metric']}")
    values.setdefault("weighted", by_logits)


def _rule(entry: Mapping[str, Any], base: Mapping[str, Any]) -> ToMeConfig:
    """The complete configuration of one entry of ``rules``: its keys over those beside it."""
    unruly = [key for key in entry if key not in KEYS or not KEYS[key].in_rules]
    if unruly:
        raise InputError(f"ToMe rules: an entry cannot set {unruly[0]!r}")
    if "min_tokens" not in entry:
        raise InputError(f"ToMe rules: the entry {dict(entry)!r} has no min_tokens")
    beside = {key: value for key, value in base.items() if key not in ("rules", "hires")}
    where = f"ToMe rules: the entry from {entry['min_tokens']!r} tokens"
    own = [key for key in AMOUNTS if entry.get(key) is not None]
    if not own and entry.get("method") in BY_STRIDE:
        own = ["method"]
    if own and beside.get("steps"):
        raise InputError(
            f"{where} sets {own[0]}={entry[own[0]]!r}, so the 'steps' beside it would do nothing "
            "there; leave one of them out"
        )
    # Where nothing else is said, min_tokens alone decides where a rule acts.
    keys = {"max_downsample": 8, **overlay(beside, entry)}
    config = ToMeConfig._checked(keys)
    lost = [key for key in AMOUNTS if beside.get(key) and keys.get(key) is None]
    if lost and not own and not config._has_amount:
        raise InputError(
            f"{where} has method {config.method}, to which {lost[0]}={beside[lost[0]]!r} means "
            f"nothing; give the entry another method or an amount of its own"
        )
    return config


def _second_pass(entry: Mapping[str, Any], base: Mapping[str, Any]) -> ToMeConfig:
    """The complete configuration of ``hires``: its keys over those beside it."""
    if "hires" in entry:
        raise InputError("ToMe hires: it cannot hold another 'hires'")
    beside = {key: value for key, value in base.items() if key != "hires"}
    return ToMeConfig._checked(overlay(beside, entry))


# --- ratio: auto --------------------------------------------------------------------------------

# From how many tokens on merging pays for its matching, by device and by whether types are half.
# On a fast device attention is so cheap that few tokens are not worth any further operation.
PAYS_FROM = {
    ("cpu", False): 1024,
    ("cpu", True): 1024,
    ("cuda", False): 4096,
    ("cuda", True): 16384,
    ("mps", False): 4096,
    ("mps", True): 4096,
}


def pays_from(device_type: str, is_half: bool) -> int:
    """The number of tokens from which merging is expected to save time."""
    return PAYS_FROM.get((device_type, is_half), 16384)


def auto_ratio(config: ToMeConfig) -> float:
    """The ratio that ``auto`` stands for in a block where merging pays.

    Keys and values may be reduced as far as the grid goes; where queries are merged too, half of
    the tokens is as far as pictures stay close to unmerged ones.
    """
    is_kv_grid = config.apply_to == ("kv",) and config.method == "grid"
    return config.max_ratio if is_kv_grid else min(config.max_ratio, 0.5)
