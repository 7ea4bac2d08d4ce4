"""Calls of a U-Net that are captured once and then replayed: on a card, a step in one launch.

A call is captured where one like it has been made before in the same sampling run: of the same
shapes, with the same context and the same merging. The first one is made as ever, and brings into
being whatever is kept from call to call. Captures hold memory, so they end with the run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.modules.attention import compile_blocks, remembered
from ldm.modules.tome.decision import Decision

WAYS = ("auto", "no", "blocks", "graph")

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a piece of work; returns what does it again, and its result, always the same tensor."""


@dataclass
class _Recorded:
    """One call: its inputs and output, always the same tensors, and what it merges and reads."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], None]
    decisions: list[Decision]
    read: list[tuple[Tensor, Tensor]]


class Captures:
    """A U-Net whose calls are replayed where they can be.

    Args:
        unet: a UNetModel.
        capture: how work is recorded.
    """

    def __init__(self, unet: Any, capture: Capture | None = None) -> None:
        self.unet = unet
        self.capture = capture or CudaGraphs()
        self._seen: dict[object, Tensor | None] = {}  # the contexts live as long as their keys
        self._recorded: dict[object, _Recorded] = {}

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """As UNetModel."""
        merging = self.unet.tome.call_key()
        is_other = self.unet.reuse.every > 1 or self.unet.control is not None
        if merging is None or torch.is_grad_enabled() or is_other:
            return self.unet(x, t, context, y)
        inputs = (x, t) if y is None else (x, t, y)
        shapes = tuple((one.shape, one.dtype, one.device) for one in inputs)
        key = (shapes, id(context), y is None, merging)
        recorded = self._recorded.get(key)
        if recorded is None and key not in self._seen:
            self._seen[key] = context
            return self.unet(x, t, context, y)
        if recorded is None:
            recorded = self._recorded[key] = self._record(inputs, context)
        else:
            self.unet.tome.repeat_call(recorded.decisions)
        for own, given in zip(recorded.inputs, inputs, strict=True):
            own.copy_(given)
        recorded.replay()
        return recorded.output.clone()

    def _record(self, inputs: tuple[Tensor, ...], context: Tensor | None) -> _Recorded:
        own = tuple(one.clone() for one in inputs)
        y = own[2] if len(own) > 2 else None
        with torch.cuda.device_of(own[0]):  # else graphs are captured, empty, on another one
            replay, output = self.capture(lambda: self.unet(own[0], own[1], context, y))
        return _Recorded(own, output, replay, self.unet.tome.last_decisions, remembered(self.unet))

    def clear(self) -> None:
        """Forget all calls, and give their memory back."""
        if not self._seen:
            return
        self._seen, self._recorded = {}, {}
        self.unet.tome.begin_batch()  # plans are in the memory of the graphs that made them
        release = getattr(self.capture, "release", None)
        if release is not None:
            release()


_ALONE = threading.Lock()  # of the graphs of a process one is captured at a time


@lru_cache(maxsize=64)
def _stream(device: int) -> torch.cuda.Stream:
    """Where graphs are captured: always the same, as libraries keep room for each stream."""
    return torch.cuda.Stream(device)


class CudaGraphs:
    """Records work on the current device as CUDA graphs, which share their memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record one piece of work."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = _stream(torch.cuda.current_device())
        where: dict[str, Any] = {"pool": self._pool, "stream": stream}
        where["capture_error_mode"] = "thread_local"  # others may use the device meanwhile
        # The stream twice: torch does not leave it where a capture fails.
        with _ALONE, torch.cuda.stream(stream), torch.cuda.graph(graph, **where):
            output = work()
        return graph.replay, output

    def release(self) -> None:
        """Give the memory of all graphs back, which are over by now."""
        self._pool = None
        with _ALONE:
            torch.cuda.empty_cache()


def check_way(way: str, device: torch.device) -> None:
    """Refuse a way to compute that there is not, or not on this device.

    Raises:
        InputError: so it is.
    """
    if way not in WAYS:
        raise InputError(f"compile {way!r} is not one of {', '.join(WAYS)}")
    if way == "graph" and device.type != "cuda":
        raise InputError(f"compile graph: there are no CUDA graphs on {device.type}; leave it out")


def compile_model(model: Any, way: str, device: torch.device) -> None:
    """Let a LatentDiffusion compute in another way.

    Args:
        model: its ``model`` is the wrapper of the U-Net.
        way: ``no``; ``blocks``: each transformer block is compiled; ``graph``: calls of the U-Net
            are CUDA graphs; ``auto``: graph on CUDA, no elsewhere.
        device: where it computes.

    Raises:
        InputError: see check_way.
    """
    check_way(way, device)
    if way == "blocks":
        compile_blocks(model.model.diffusion_model)
    if way == "graph" or (way == "auto" and device.type == "cuda"):
        model.model.captures = Captures(model.model.diffusion_model)
