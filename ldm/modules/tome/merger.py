"""The merger: what a sampling run keeps, decides and reports, for all blocks of one U-Net."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.tome import match, since, whole
from ldm.modules.tome.config import ToMeConfig, auto_ratio, cells, pays_from
from ldm.modules.tome.plan import NOTHING, BlockPlans, MergePlan

_STOCK = 64  # random draws that are copied to an accelerator at a time
SELF_PLACES = {"kv", "q", "attn"}  # what exists in self-attention only


class Decision:
    """What is merged in one block, and the plans, once they are made.

    Whoever comes later finds them there: the recomputation of gradient checkpointing, the next
    model calls with ``reuse_steps``, the next blocks with ``reuse_layers``.

    Attributes:
        config: the configuration in force, without rules.
        size: h, w of the block's tokens.
        removed: tokens to remove; 0 merges nothing.
        n_channels: channels of the block's tokens.
        draw: the random numbers of the plan, where the method has any.
        pays: whether merging is expected to save time here.
        is_guided: whether the batch has two halves whose difference guidance takes.
        planner: makes the plans; None: `merge.plan_block`.
        is_whole: tokens are matched in the accelerators' shape; see `whole`.
        plan, query_plan: the plan, and the one for queries; None until they are made.
    """

    def __init__(
        self,
        config: ToMeConfig,
        size: tuple[int, int],
        removed: int,
        n_channels: int = 1,
        draw: Tensor | None = None,
        pays: bool = True,
        is_guided: bool = False,
        planner: Planner | None = None,
        is_whole: bool = False,
    ) -> None:
        self.config = config
        self.size = size
        self.removed = removed
        self.n_channels = n_channels
        self.draw = draw
        self.pays = pays
        self.is_guided = is_guided
        self.planner = planner
        self.is_whole = is_whole
        self.plan: MergePlan | None = None
        self.query_plan: MergePlan | None = None

    @property
    def is_whole_block(self) -> bool:
        """Whether one merge and one unmerge enclose the block."""
        return self.removed > 0 and "block" in self.config.apply_to

    @property
    def is_whole_grid(self) -> bool:
        """Whether `whole` makes the plans."""
        return self.is_whole and self.config.method == "grid" and self.config.similarity is None

    @property
    def n_tokens(self) -> int:
        """Tokens before merging."""
        return self.size[0] * self.size[1]

    @property
    def n_kept(self) -> int:
        """Tokens after merging; what the plan says once it is made."""
        if self.plan is None:
            return self.n_tokens - self.removed
        return self.n_tokens if self.plan.is_identity else self.plan.n_kept

    @property
    def metrics(self) -> tuple[str, ...]:
        """What has to be compared for the plans; see `match.metric_of`."""
        if self.config.method in ("downsample", "tiles"):
            return ("hidden",)  # which costs nothing
        if self.config.metric != "logits":
            return (self.config.metric,)
        places = {*self.config.apply_to}
        queries = ("query_logits",) if places & {"q", "attn"} else ()
        return (*queries, "key_logits") if places & {"kv", "attn"} else queries

    @torch.no_grad()
    def metrics_of(
        self, attention: Any, norm: nn.Module, x: Tensor, normed: Tensor | None = None
    ) -> list[Tensor]:
        """What is compared in the block, one for each of ``metrics``.

        Args:
            attention: its attn1, with to_q, to_k and heads.
            norm: its norm1.
            x: (B, N, C) its input.
            normed: norm1 of it, if it is known.
        """
        if normed is None:
            normed = x if self.metrics == ("hidden",) else norm(x)
        find = whole.metrics_of if self.is_whole else match.metrics_of
        return find(attention, self.metrics, x, normed, self.size)

    @property
    def places(self) -> BlockPlans:
        """The plan for each place of the block; they have to be made before, if any is needed."""
        if self.removed == 0:
            return NOTHING
        assert self.plan is not None
        assert self.query_plan is not None
        config = self.config
        if config.method == "tiles":  # queries and keys are cut alike, and nothing is merged
            return BlockPlans.at(("attn",), self.plan, self.plan, False)
        return BlockPlans.at(config.apply_to, self.plan, self.query_plan, config.proportional)


Planner = Callable[[Decision, Sequence[Tensor]], tuple[MergePlan, MergePlan]]
"""(decision, its metrics) -> the plan, and the one for queries."""


class TokenMerger:
    """Decides what is merged in each block, and keeps what one sampling run needs.

    That is the private random generator, the progress, the plans that are kept for more than one
    block or call, and the counts for the report. A plain object, outside the module tree, so that
    no state dict sees it; blocks are told apart by the order in which they run.

    Attributes:
        config: what the user asked for.
        n_timesteps: T of the model, to which the timesteps of ``begin_call`` relate.
        is_guided: whether the rows of each call are two halves whose difference guidance takes.
        timestep: of the next call, if it is known without asking the device.
        planner: makes the plans instead of `merge.plan_block`, for those who measure.
        last_decisions: those of the last call, in the order of its blocks.
        observer: called with the number of the model call and its blocks after each call, for
            those who want to see the plans.
    """

    def __init__(self, config: ToMeConfig | None = None, n_timesteps: int = 1000) -> None:
        self.n_timesteps = n_timesteps
        self.is_guided = False
        self.timestep: float | None = None
        self._stock: dict[tuple[object, ...], list[Tensor]] = {}
        self.planner: Planner | None = None
        self.observer: Callable[[int, list[Decision]], None] | None = None
        self.configure(config or ToMeConfig())

    def configure(self, config: ToMeConfig) -> None:
        """Take another configuration, and begin a run with it."""
        self.config = config
        self.begin_run()

    def begin_run(self, seed: int | None = None) -> None:
        """Forget everything about earlier calls; ``seed`` replaces the configured one."""
        before = getattr(self, "_seed", None)
        self._seed = self.config.seed if seed is None else seed
        if self._seed != before:
            self._stock.clear()  # in training each batch has a seed of its own
        self._generator = torch.Generator().manual_seed(self._seed)
        self._used: dict[tuple[object, ...], int] = {}  # numbers taken from the stock
        self._call = -1
        self._progress = 0.0
        self._blocks: list[Decision] = []
        self._n_skipped = 0
        self._guidance: Tensor | None = None
        self.last_decisions: list[Decision] = []
        self._kept: dict[tuple[object, ...], tuple[int, Decision]] = {}
        self._tally = Tally()

    def begin_batch(self) -> None:
        """Keep no plan: what comes next, in training, is another batch."""
        self._kept = {}

    def begin_call(self, h: int, w: int, timesteps: Tensor) -> None:
        """Note that the U-Net is called.

        Args:
            h, w: size of the latents.
            timesteps: (B,) of the model, 0 to T - 1; where they differ their mean counts.
        """
        self._call += 1
        self._blocks = []
        self._n_skipped = 0
        if any(config.steps for config in (self.config, *self.config.rules)):
            t = float(timesteps.float().mean()) if self.timestep is None else self.timestep
            self._progress = 1 - t / self.n_timesteps
        self.timestep = None

    def skip(self, n_blocks: int) -> None:
        """Note that this call leaves out the next so many blocks; those after keep their places."""
        self._n_skipped += n_blocks

    def call_key(self) -> tuple[object, ...] | None:
        """What tells the merging of the next call from others', known before the call.

        None where two calls are never alike, because numbers are drawn for each, plans are kept,
        the pictures decide how much is merged, or somebody else makes the plans.
        """
        configs = (self.config, *self.config.rules)
        if self.planner is not None or self.config.reuse_steps > 1:
            return None
        if any(
            c.random or c.method in ("random", "guided") or c.similarity is not None
            for c in configs
        ):
            return None
        if not any(config.steps for config in configs):
            return (self.config, self.is_guided)
        if self.timestep is None:
            return None
        progress = 1 - self.timestep / self.n_timesteps
        return (self.config, self.is_guided, *(config.ratio_at(progress) for config in configs))

    def repeat_call(self, decisions: list[Decision]) -> None:
        """Note a call that is a replay of another, which merged after these decisions."""
        self._call += 1
        self.timestep = None
        self._blocks = list(decisions)
        self.end_call()

    def note_guidance(self, out: Tensor) -> None:
        """Keep how much guidance changes each place, for the next call's destinations.

        Args:
            out: (B, C, h, w) what the model predicts, without and with the prompt.
        """
        if self.is_guided and len(out) % 2 == 0 and self._is_drawn_by_guidance:
            before, after = out.detach().float().chunk(2)
            self._guidance = (after - before).norm(dim=1)

    @property
    def _is_drawn_by_guidance(self) -> bool:
        return any(config.method == "guided" for config in (self.config, *self.config.rules))

    def end_call(self) -> None:
        """Count what the call has merged, now that it is over."""
        self.last_decisions = self._blocks
        if self._blocks:
            self._tally.add_call(self._blocks)
            if self.observer is not None:
                self.observer(self._call, self._blocks)
            self._blocks = []

    def block(
        self, x: Tensor, size: tuple[int, int], downsample: int, has_self_attention: bool = True
    ) -> Decision:
        """Decide about the next block of the model.

        Args:
            x: (B, h * w, C) its input.
            size: h, w.
            downsample: by how much it is smaller than the latents, a side.
            has_self_attention: whether its attn1 has no context; else keys mean something else.
        """
        config = self.config.for_tokens(size[0] * size[1])
        is_half = x.dtype in (torch.float16, torch.bfloat16)
        pays_at = pays_from(x.device.type, is_half)
        removed = self._removed(config, size, downsample, pays_at)
        if not has_self_attention and (
            {*config.apply_to} <= SELF_PLACES or "keys" in config.metric
        ):
            removed = 0
        place = x.shape[2] if config.reuse_layers else len(self._blocks) + self._n_skipped
        key = (place, len(x), size, x.device, config)
        block = self._kept_block(key, config.reuse_steps) if removed else None
        if block is None:
            draw = self._draw(config, size, x.device) if removed else None
            if config.method == "guided" and draw is not None and self._guidance is not None:
                n_destinations = size[0] * size[1] - config.removable(*size)
                draw = since.favoured(draw, self._guidance, size, n_destinations, len(x))
            pays = size[0] * size[1] >= pays_at
            is_guided = self.is_guided and len(x) % 2 == 0
            block = Decision(
                config,
                size,
                removed,
                x.shape[2],
                draw,
                pays,
                is_guided,
                self.planner,
                whole.is_chosen(x.device),
            )
            self._kept[key] = (self._call, block)
        if self._call >= 0:
            self._blocks.append(block)
        return block

    @property
    def tally(self) -> Tally:
        """What was merged since the run began, counted."""
        return self._tally

    def report(self) -> str:
        """One line that begins ``ToMe:`` and says what was merged since the run began."""
        return self.tally.describe(self.config)

    def saved_work(self) -> float:
        """Share of the work of self-attention that was saved since the run began, 0 to 1."""
        return self._tally.saved_work

    def warnings(self) -> list[str]:
        """What the user should know: nothing was merged, or where merging does not pay."""
        return self.tally.warnings(self.config)

    def _removed(
        self, config: ToMeConfig, size: tuple[int, int], downsample: int, pays_at: int
    ) -> int:
        """How many tokens to remove from a block of that size."""
        n = size[0] * size[1]
        if downsample > config.max_downsample or n < config.min_tokens:
            return 0
        ratio = config.ratio_at(self._progress)
        if ratio == "auto":
            self._tally.note = f"auto merges from {pays_at} tokens here"
            ratio = auto_ratio(config) if n >= pays_at else 0.0
        return config.removed(*size, ratio)

    def _kept_block(self, key: tuple[object, ...], reuse_steps: int) -> Decision | None:
        """The block's plan from an earlier call, or another block's, if it may still be used."""
        born, block = self._kept.get(key, (0, None))
        is_fresh = self._call >= 0 and self._call - born < reuse_steps
        return block if is_fresh else None

    def _draw(
        self, config: ToMeConfig, size: tuple[int, int], device: torch.device
    ) -> Tensor | None:
        """Random numbers for one plan, drawn on the processor.

        For an accelerator they are drawn and copied many at a time, and kept for the next runs, so
        that hardly any step has to wait for them.
        """
        if config.method not in ("random", "guided") and not config.random:
            return None
        if device.type == "cpu" or config.method == "tiles":  # the latter's decide about shapes
            return _drawn(config, size, 1, self._generator)[0]
        key = (config.method, config.stride, size, device, self._seed)
        number = self._used[key] = self._used.get(key, -1) + 1
        stock = self._stock.setdefault(key, [])
        if number == len(stock) * _STOCK:
            seed = hash((self._seed, number)) if number else self._seed
            generator = torch.Generator().manual_seed(seed)
            stock.append(_drawn(config, size, _STOCK, generator).to(device))
        return stock[number // _STOCK][number % _STOCK]


def _drawn(config: ToMeConfig, size: tuple[int, int], n: int, generator: torch.Generator) -> Tensor:
    """Random numbers for n plans, (n, 1, N) or (n, rows, columns)."""
    if config.method in ("random", "guided"):
        shape = (n, 1, size[0] * size[1])
        return torch.rand(shape, generator=generator, dtype=torch.float32)
    if config.method == "tiles":
        return torch.randint(2, (n, 2), generator=generator)
    if config.method == "prune":
        shape = (n, 1, size[0] * size[1])
        return torch.randn(shape, generator=generator, dtype=torch.float32)
    n_choices = min(config.stride[0], size[0]) * min(config.stride[1], size[1])
    return torch.randint(n_choices, (n, *cells(*size, config.stride)), generator=generator)


# --- the report -----------------------------------------------------------------------------------


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
    """

    def __init__(self) -> None:
        self.note = ""
        self._n_calls = 0
        self._n_blocks = 0  # of all calls together
        self._work = 0.0  # of self-attention, as it would be without merging
        self._work_left = 0.0
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
            self._work += n * n * block.n_channels
            self._work_left += n_queries * n_keys * block.n_channels
            if kept < n:
                self._add_merged(block)

    def add(self, other: Tally) -> None:
        """Count what another tally has counted."""
        self.note = other.note or self.note
        self._n_calls += other._n_calls
        self._n_blocks += other._n_blocks
        self._work += other._work
        self._work_left += other._work_left
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
        return 1 - self._work_left / self._work if self._work else 0.0

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
            return ["ToMe merges nothing: no amount is given; set ratio, r, k or max_tokens"]
        if not self._n_calls:
            return []
        if not self._levels:
            return [
                "ToMe merged nothing: no block of this model, at this size, is within "
                "max_downsample and min_tokens or has tokens to spare"
            ]
        slow = [n for n, level in self._levels.items() if not level.pays]
        if not slow:
            return []
        counts = " and ".join(map(str, sorted(slow)))
        return [
            f"ToMe: merging of {counts} tokens is likely to take longer than it saves here; "
            "ratio: auto leaves such blocks alone"
        ]


def describe(config: ToMeConfig) -> str:
    """A configuration in a few words."""
    if config.rules:
        return "; ".join(f"from {rule.min_tokens} tokens {describe(rule)}" for rule in config.rules)
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
