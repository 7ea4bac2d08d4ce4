"""Where a model computes, and in which type."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch

from ldm.errors import InputError

# What Linux calls the instructions of processors that multiply bfloat16 matrices natively.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; for ``auto`` a GPU if there is one.

    Raises:
        InputError: this machine, or this build of torch, does not have it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda"):
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= n_devices:
            raise InputError(f"device {name}: torch sees {n_devices} CUDA devices; try cpu")
    elif name == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps: torch sees no Apple GPU; try cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name; for ``auto`` one that the device computes fast in.

    ``auto`` is a static rule: float16 on CUDA, bfloat16 on processors that have instructions for
    it, float32 elsewhere.

    Raises:
        InputError: the device cannot compute in it.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "float16"
        else:
            is_fast = device.type == "cpu" and BFLOAT16_FLAGS & _processor_flags()
            name = "bfloat16" if is_fast else "float32"
    if name == "float16" and device.type == "cpu":
        raise InputError("dtype float16 is for GPUs; on the cpu use bfloat16 or float32")
    return getattr(torch, name)


def release_memory() -> None:
    """Give what was freed back to the system, where the C library keeps it (glibc does)."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _processor_flags() -> set[str]:
    """The instruction sets that Linux lists for the first processor; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    match = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(match[1].split()) if match else set()
