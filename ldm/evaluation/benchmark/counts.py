"""Operators that a step dispatches: on an accelerator each is about one launch.

They are counted on tensors without content, so on any machine and at once. Views do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.evaluation.benchmark.unets import (
    context_width,
    transformer_blocks,
    unet_without_weights,
)
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import TokenMerger

_VIEWS = {"_unsafe_view", "lift_fresh"}  # what returns a view without saying so
_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Operators(TorchDispatchMode):
    """Counts what is dispatched while it is on, but for views and for room without content.

    Attributes:
        names: of the operators, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do and count one operator."""
        name = func.overloadpacket.__name__
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and name not in _VIEWS | _EMPTY:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class _FusedAttention(TorchFunctionMode):
    """Lets attention be one operator, as it is on a card, where tensors have no content."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.operators = operators

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.operators.names.append("scaled_dot_product_attention")
        q, _, v = args[:3]
        # As the fused kernels lay it out: the channels of all heads of a token are neighbours.
        return q.new_empty(*q.shape[:1], *q.shape[2:0:-1], v.shape[3]).transpose(1, 2)


def count(work: Callable[[], Any]) -> list[str]:
    """The operators that a piece of work dispatches."""
    operators = Operators()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_FusedAttention(operators))
        stack.enter_context(operators)
        work()
    return operators.names


def count_block(config: ToMeConfig, side: int) -> int:
    """Operators in a transformer block of SD 1.5 with side * side tokens, in float16."""
    with torch.device("meta"):
        block = BasicTransformerBlock(320, 8, 40, context_dim=768)
        x, context = torch.empty(2, side * side, 320), torch.empty(2, 77, 768)
    block, merger = block.half().eval(), TokenMerger(config)
    merger.is_guided = True
    x, context = x.half(), context.half()

    def work() -> Any:
        merger.begin_call(side, side, torch.tensor([500, 500]))
        return block(x, context, merger.block(x, (side, side), 1))

    count(work)  # what is kept is made
    return len(count(work))


def count_step(unet: UNetModel, config: ToMeConfig, side: int) -> int:
    """Operators in a step of a U-Net on meta, with latents of side * side."""
    unet.tome.configure(config)
    unet.tome.is_guided = True
    work = _step(unet, side)
    count(work)
    n = len(count(work))
    unet.tome.configure(ToMeConfig())
    return n


def _step(unet: UNetModel, side: int) -> Callable[[], Tensor]:
    dtype, width = unet.dtype, context_width(unet)
    x = torch.empty(2, unet.in_channels, side, side, dtype=dtype, device="meta")
    t = torch.full((2,), 500, device="meta")
    context = torch.empty(2, 77, width, dtype=dtype, device="meta")
    return lambda: unet(x, t, context)


def table(
    model: Mapping[str, Any], settings: Mapping[str, ToMeConfig], sides: tuple[int, ...] = (64, 128)
) -> str:
    """Operators of each setting, in a block and in a step, as a Markdown table.

    Args:
        model: the configuration of one.
        settings: by their names.
        sides: of the latents.
    """
    unet = unet_without_weights(model).half()
    off = ToMeConfig()
    heads = [f"block of {side * side} tokens | step at {8 * side}" for side in sides]
    lines = [
        f"| setting | {' | '.join(heads)} |",
        "|---" * (1 + 2 * len(sides)) + "|",
    ]
    plain = {side: (count_block(off, side), count_step(unet, off, side)) for side in sides}
    lines.append(_line("no merging", [plain[side] for side in sides]))
    for name, config in settings.items():
        more = [
            (count_block(config, s) - plain[s][0], count_step(unet, config, s) - plain[s][1])
            for s in sides
        ]
        lines.append(_line(name, [plain[side] for side in sides], more))
    if find_spec("tomesd") is not None:
        n_merged = len(transformer_blocks(unet, downsample=1))
        steps = [_tomesd_step(unet, side) - plain[side][1] for side in sides]
        more = [(step // n_merged, step) for step in steps]
        name = "the tomesd package, ratio 0.5"
        lines.append(_line(name, [plain[side] for side in sides], more))
    return "\n".join(lines)


def _line(
    name: str, plain: list[tuple[int, int]], more: list[tuple[int, int]] | None = None
) -> str:
    cells = []
    for i, counts in enumerate(plain):
        for j, n in enumerate(counts):
            cells.append(f"{n}" if more is None else f"{n + more[i][j]} ({more[i][j]:+})")
    return f"| {name} | {' | '.join(cells)} |"


def _tomesd_step(unet: UNetModel, side: int) -> int:
    import tomesd

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.diffusion_model = unet
    tomesd.apply_patch(model, ratio=0.5)
    try:
        work = _step(unet, side)
        count(work)
        return len(count(work))
    finally:
        tomesd.remove_patch(model)
