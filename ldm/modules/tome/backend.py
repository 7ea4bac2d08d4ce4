"""Which shape of matching runs: pieces for processors, whole operators, or Triton's kernels."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError, shown
from ldm.modules.tome.config import ToMeConfig

WIDEST = 15  # cells a side of the widest window that the kernels look through

logger = logging.getLogger(__name__)


def is_chosen(device: torch.device) -> bool:
    """Whether tokens on a device are matched in this shape.

    Raises:
        InputError: the environment asks for what is not there.
    """
    way = os.environ.get("TOME_MATCHING", "")
    if way not in ("", "whole"):
        _refuse_or_pass(way, device.type, os.environ.get("TRITON_INTERPRET") == "1")
    return device.type != "cpu" or way != ""


@lru_cache(maxsize=8)
def _refuse_or_pass(way: str, device_type: str, is_interpreted: bool) -> None:
    if way != "triton":
        raise InputError(f"TOME_MATCHING={shown(way)}: allowed is whole or triton; or unset it")
    if find_spec("triton") is None:
        raise InputError("TOME_MATCHING=triton: there is no package triton here; unset it")
    if device_type not in ("cuda", "meta") and not (device_type == "cpu" and is_interpreted):
        raise InputError(f"TOME_MATCHING=triton: for CUDA, not for {device_type}; unset it")


def takes_kernels(config: ToMeConfig) -> bool:
    """Whether `kernels` can make the plans of a configuration."""
    is_grid = config.method == "grid" and config.similarity is None
    return is_grid and not config.is_off and (config.window or WIDEST + 1) <= WIDEST


def say_what_is_left(config: ToMeConfig) -> None:
    """Where the kernels are asked for and cannot do what is asked of them, say so once."""
    is_asked_for = os.environ.get("TOME_MATCHING") == "triton"
    if is_asked_for and not torch.compiler.is_compiling() and not takes_kernels(config):
        _say(config.method, config.window, config.similarity)


@lru_cache(maxsize=64)
def _say(method: str, window: int | None, similarity: float | None) -> None:
    logger.warning(
        "TOME_MATCHING=triton is for method grid with a window of up to %d cells and without "
        "similarity; PyTorch's operators do what has method %s, window %s, similarity %s",
        *(WIDEST, method, window, similarity),
    )


def kernels_for(metric: Tensor, window: int | None) -> Any:
    """The module `kernels` where it is asked for and can match this; else None."""
    if os.environ.get("TOME_MATCHING") != "triton" or torch.compiler.is_compiling():
        return None  # the compiler fuses in its own way
    if window is None or window > WIDEST or metric.dtype == torch.float64:
        return None
    from ldm.modules.tome import kernels  # takes triton

    return kernels
