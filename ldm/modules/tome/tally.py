"""What was merged, counted, and said in a line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ldm.modules.tome.config import NO_AMOUNT, ToMeConfig
from ldm.modules.tome.decision import Decision


@dataclass
class _Level:
    """The merged blocks of one number of tokens."""

    n_blocks: int = 0
    kept: set[int] = field(default_factory=set)
    missed: set[str] = field(default_factory=set)
    pays: bool = True

    def add(self, other: _Level) -> None:
        self.n_blocks += other.n_blocks
        self.kept |= other.kept
        self.missed |= other.missed
        self.pays &= other.pays

    def describe(self, n_tokens: int) -> str:
        kept = "-".join(str(n) for n in sorted({min(self.kept), max(self.kept)}))
        missed = f" ({', '.join(sorted(self.missed))})" if self.missed else ""
        return f"{n_tokens} -> {kept} tokens{missed}"


class Tally:
    """Counts over the blocks and model calls of a run, or of several.

    Attributes:
        note: a remark for the report.
        has_declined: ``ratio: auto`` has left a block alone.
    """

    def __init__(self) -> None:
        self.note = ""
        self.has_declined = False
        self._n_calls = 0
        self._n_blocks = 0  # of all calls together
        self.work = 0.0  # of self-attention, as it would be without merging
        self.work_left = 0.0
        self._levels: dict[int, _Level] = {}  # by number of tokens

    def add_call(self, blocks: list[Decision]) -> None:
        """Count the blocks of one model call."""
        self._n_calls += 1
        self._n_blocks += len(blocks)
        for block in blocks:
            n, kept, places = block.n_tokens, block.n_kept, {*block.config.apply_to}
            n_queries = kept if places & {"q", "attn", "block"} else n
            if block.config.method == "tiles":  # all of them, each in its tile
                n_queries = n
            n_keys = kept if places & {"kv", "attn", "block"} else n
            self.work += n * n * block.n_channels
            self.work_left += n_queries * n_keys * block.n_channels
            if kept < n:
                self._add_merged(block)

    def add(self, other: Tally) -> None:
        """Count what another tally has counted."""
        self.note = other.note or self.note
        self.has_declined |= other.has_declined
        self._n_calls += other._n_calls
        self._n_blocks += other._n_blocks
        self.work += other.work
        self.work_left += other.work_left
        for n_tokens, level in other._levels.items():
            self._levels.setdefault(n_tokens, _Level()).add(level)

    def _add_merged(self, block: Decision) -> None:
        level = self._levels.setdefault(block.n_tokens, _Level())
        level.n_blocks += 1
        level.kept.add(block.n_kept)
        level.pays &= block.pays
        r, max_tokens = block.config.r, block.config.max_tokens
        if r is not None and block.removed < r:
            level.missed.add(f"no more can go than {block.removed} of r={r}")
        if max_tokens is not None and block.n_tokens - block.removed > max_tokens:
            level.missed.add(f"no more can go than {block.removed}")

    @property
    def saved_work(self) -> float:
        """Share of the work of self-attention that merging saved, 0 to 1."""
        return 1 - self.work_left / self.work if self.work else 0.0

    def describe(self, config: ToMeConfig) -> str:
        """The line that begins ``ToMe:``."""
        if config.is_off:
            return "ToMe: off"
        note = f" ({self.note})" if self.note else ""
        if not self._levels:
            return f"ToMe: {describe(config)}{note}: nothing merged"
        levels = [level.describe(n) for n, level in sorted(self._levels.items(), reverse=True)]
        n_merged = sum(level.n_blocks for level in self._levels.values())
        return (
            f"ToMe: {describe(config)}{note}: {', '.join(levels)} in "
            f"{n_merged / self._n_calls:.3g} of {self._n_blocks / self._n_calls:.3g} blocks, "
            f"{self.saved_work:.0%} of the self-attention work saved"
        )

    def warnings(self, config: ToMeConfig) -> list[str]:
        """Where nothing was merged though something was asked for, and where it does not pay."""
        if config.is_off:
            is_default = config == ToMeConfig(
                seed=config.seed, context=config.context, hires=config.hires
            )
            is_zero = config.ratio == 0 or config.r == 0 or bool(config.steps)
            if is_default or is_zero:
                return []
            return [NO_AMOUNT]
        if not self._n_calls:
            return []
        if not self._levels:  # of auto the report has said it
            return [] if self.has_declined else [f"ToMe merged nothing: {_why_nothing(config)}"]
        slow = [n for n, level in self._levels.items() if not level.pays]
        if not slow:
            return []
        counts = " and ".join(map(str, sorted(slow)))
        return [
            f"ToMe: merging of {counts} tokens is likely to take longer than it saves here; "
            "ratio: auto leaves such blocks alone"
        ]


def _why_nothing(config: ToMeConfig) -> str:
    """Which keys may have left every block alone."""
    reasons = [
        "no block of this model, at this size, is within max_downsample and min_tokens or has "
        "tokens to spare"
    ]
    if config.steps:
        reasons.append("the ratio of steps is 0 in this part of the run")
    asked = [c.similarity for c in (config, *config.rules) if c.similarity is not None]
    if asked:
        reasons.append(f"no tokens are as similar as {min(asked):g}")
    return ", or ".join(reasons)


def describe(config: ToMeConfig) -> str:
    """A configuration in a few words."""
    if config.rules:
        parts = [f"from {rule.min_tokens} tokens {describe(rule)}" for rule in config.rules]
        beside = replace(config, rules=())
        return "; ".join(parts if beside.is_off else [*parts, f"else {describe(beside)}"])
    words = [config.method]
    if config.method not in ("bipartite", "kth", "random"):
        words.append("x".join(map(str, config.stride)))
    for key in ("ratio", "r", "k", "max_tokens", "similarity", "window"):
        value = getattr(config, key)
        if value is not None:
            words.append(f"{key}={value}")
    if config.steps:
        words.append("ratio=" + ",".join(f"{p:g}:{ratio:g}" for p, ratio in config.steps))
    return " ".join(words) + " on " + "+".join(config.apply_to)
