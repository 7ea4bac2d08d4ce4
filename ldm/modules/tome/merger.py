"""The merger: what a sampling run keeps, decides and reports, for all blocks of one U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ldm.modules.tome import backend, since
from ldm.modules.tome.config import ToMeConfig, auto_ratio, cells, pays_from
from ldm.modules.tome.decision import Decision, Planner
from ldm.modules.tome.tally import Tally

_STOCK = 64  # random draws that are copied to an accelerator at a time
SELF_PLACES = {"kv", "q", "attn"}  # what exists in self-attention only


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

    @contextmanager
    def planned_by(self, planner: Planner, config: ToMeConfig | None = None) -> Iterator[None]:
        """Let another planner make the plans, and another configuration hold, for a while."""
        before = self.planner, self.config
        self.planner = planner
        if config is not None:
            self.configure(config)
        try:
            yield
        finally:
            self.planner = before[0]
            if config is not None:
                self.configure(before[1])

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
        self.last_decisions = []

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
        the pictures decide how much is merged, or somebody else makes the plans or sees them.
        """
        configs = (self.config, *self.config.rules)
        if self.planner is not None or self.observer is not None or self.config.reuse_steps > 1:
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
        removed = self._removed(config, size, downsample, pays_at) if len(x) else 0
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
                backend.is_chosen(x.device),
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
            self._tally.has_declined |= n < pays_at
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
    # types and places of their own, whatever the defaults are
    kind: dict[str, Any] = {"generator": generator, "device": "cpu"}
    if config.method in ("random", "guided"):
        return torch.rand((n, 1, size[0] * size[1]), dtype=torch.float32, **kind)
    if config.method == "tiles":
        return torch.randint(2, (n, 2), **kind)
    if config.method == "prune":
        return torch.randn((n, 1, size[0] * size[1]), dtype=torch.float32, **kind)
    n_choices = min(config.stride[0], size[0]) * min(config.stride[1], size[1])
    return torch.randint(n_choices, (n, *cells(*size, config.stride)), **kind)
