"""Token merging in a U-Net: one object that its transformer blocks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.modules.tome.auto import auto_ratio, pays_from
from ldm.modules.tome.block import BlockMerge
from ldm.modules.tome.config import ToMeConfig, cells
from ldm.modules.tome.report import Tally

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
        observer: called with the number of the model call and its blocks after each call, for
            those who want to see the plans.
    """

    def __init__(self, config: ToMeConfig | None = None, n_timesteps: int = 1000) -> None:
        self.n_timesteps = n_timesteps
        self.is_guided = False
        self.observer: Callable[[int, list[BlockMerge]], None] | None = None
        self.configure(config or ToMeConfig())

    def configure(self, config: ToMeConfig) -> None:
        """Take another configuration, and begin a run with it."""
        self.config = config
        self.begin_run()

    def begin_run(self, seed: int | None = None) -> None:
        """Forget everything about earlier calls; ``seed`` replaces the configured one."""
        self._generator = torch.Generator().manual_seed(self.config.seed if seed is None else seed)
        self._call = -1
        self._progress = 0.0
        self._blocks: list[BlockMerge] = []
        self._kept: dict[tuple[object, ...], tuple[int, BlockMerge]] = {}
        self._tally = Tally()

    def begin_call(self, h: int, w: int, timesteps: Tensor) -> None:
        """Note that the U-Net is called.

        Args:
            h, w: size of the latents.
            timesteps: (B,) of the model, 0 to T - 1; where they differ their mean counts.
        """
        self._end_call()
        self._call += 1
        if any(config.steps for config in (self.config, *self.config.rules)):
            self._progress = 1 - float(timesteps.float().mean()) / self.n_timesteps

    def block(
        self, x: Tensor, size: tuple[int, int], downsample: int, has_self_attention: bool = True
    ) -> BlockMerge:
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
        place = x.shape[2] if config.reuse_layers else len(self._blocks)
        key = (place, len(x), size, x.device, config)
        block = self._kept_block(key, config.reuse_steps) if removed else None
        if block is None:
            draw = self._draw(config, size) if removed else None
            pays = size[0] * size[1] >= pays_at
            is_guided = self.is_guided and len(x) % 2 == 0
            block = BlockMerge(config, size, removed, x.shape[2], draw, pays, is_guided)
            self._kept[key] = (self._call, block)
        if self._call >= 0:
            self._blocks.append(block)
        return block

    @property
    def tally(self) -> Tally:
        """What was merged since the run began, counted."""
        self._end_call()
        return self._tally

    def report(self) -> str:
        """One line that begins ``ToMe:`` and says what was merged since the run began."""
        return self.tally.describe(self.config)

    def saved_work(self) -> float:
        """Share of the work of self-attention that was saved since the run began, 0 to 1."""
        self._end_call()
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

    def _kept_block(self, key: tuple[object, ...], reuse_steps: int) -> BlockMerge | None:
        """The block's plan from an earlier call, or another block's, if it may still be used."""
        born, block = self._kept.get(key, (0, None))
        is_fresh = self._call >= 0 and self._call - born < reuse_steps
        return block if is_fresh else None

    def _draw(self, config: ToMeConfig, size: tuple[int, int]) -> Tensor | None:
        """Random numbers for one plan, drawn on the CPU so that every device sees the same."""
        if config.method == "random":
            return torch.rand(1, size[0] * size[1], generator=self._generator)
        if config.method == "grid" and config.random:
            n_choices = min(config.stride[0], size[0]) * min(config.stride[1], size[1])
            shape = cells(*size, config.stride)
            return torch.randint(n_choices, shape, generator=self._generator)
        return None

    def _end_call(self) -> None:
        """Count the call that has ended, if one has."""
        if self._blocks:
            self._tally.add_call(self._blocks)
            if self.observer is not None:
                self.observer(self._call, self._blocks)
            self._blocks = []
