"""Where a model computes, and in which type."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ldm.errors import InputError, NotFinite, escaped

# What Linux calls the instructions of processors that multiply bfloat16 matrices natively.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt's names in glibc's malloc.h


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name, or that device; for ``auto`` a GPU if there is one.

    Raises:
        InputError: there is none of that name, or this machine, or this build of torch, does not
            have it.
    """
    name = str(name)
    if not re.fullmatch(r"auto|cpu(:0)?|mps(:0)?|cuda(:\d{1,3})?", name, re.ASCII):
        raise InputError(f"device {escaped(name)}: allowed is auto, cpu, mps, cuda or cuda:NUMBER")
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda"):
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= n_devices:
            raise InputError(f"device {name}: torch sees {n_devices} CUDA devices; try cpu")
    elif name.startswith("mps") and not torch.backends.mps.is_available():
        raise InputError("device mps: torch sees no Apple GPU; try cpu")
    return torch.device(name)


def choose_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The type of that name, or that type; for ``auto`` one that the device computes fast in.

    ``auto`` is a static rule: float16 on CUDA, bfloat16 on processors that have instructions for
    it, float32 elsewhere.

    Raises:
        InputError: there is none of that name, or the device cannot compute in it.
    """
    name = str(name).removeprefix("torch.")
    if name == "auto":
        if device.type == "cuda":
            name = "float16"
        else:
            is_fast = device.type == "cpu" and BFLOAT16_FLAGS & {*processor_says("flags").split()}
            name = "bfloat16" if is_fast else "float32"
    if name == "float16" and device.type == "cpu":
        raise InputError("dtype float16 is for GPUs; on the cpu use bfloat16 or float32")
    if name not in TYPES:
        raise InputError(f"dtype {escaped(name)}: allowed is auto, {', '.join(TYPES)}")
    return TYPES[name]


def memory_format(dtype: torch.dtype, device: torch.device) -> torch.memory_format:
    """The layout in which convolutions of the U-Net are fastest: mostly, channels last."""
    is_slower = device.type == "mps" or (device.type != "cpu" and dtype == torch.float32)
    return torch.contiguous_format if is_slower else torch.channels_last


@contextmanager
def reused_memory(device: torch.device | None = None) -> Iterator[None]:
    """Let the C library keep what is freed, for what is allocated next.

    glibc asks the system for each large block anew, and a step of a U-Net touches all of its
    blocks for the first time again. At the end everything is given back, and the C library
    allocates as it did before.

    Args:
        device: where the model computes; on others than the processor (None) nothing is changed.
    """
    if not _has_glibc() or (device is not None and device.type != "cpu"):
        yield
        return
    before = _allocation()
    _tune(_REUSING)
    try:
        yield
    finally:
        _tune(before)
        if before != _REUSING:
            release_memory()


@contextmanager
def returned_memory() -> Iterator[None]:
    """Undo `reused_memory` within its context for a while: allocate as the C library does."""
    if not _has_glibc():
        yield
        return
    before = _allocation()
    _tune(_USUAL)
    release_memory()
    try:
        yield
    finally:
        _tune(before)


_Allocation = tuple[int, int]
"""How many blocks the system may be asked for, and from how much on the heap is trimmed, bytes."""

_REUSING: _Allocation = (0, 2**31 - 1)
_USUAL: _Allocation = (65536, 128 * 1024)  # glibc's own
_PROBE = 2**28  # bytes


def _tune(allocation: _Allocation) -> None:
    tune = ctypes.CDLL(None).mallopt
    for name, value in zip((_MMAP_MAX, _TRIM_THRESHOLD), allocation, strict=True):
        tune(name, value)


def _allocation() -> _Allocation:
    """How the C library allocates now.

    It does not tell, but a large block that nobody touches shows whether it comes from the system,
    and else whether the heap is trimmed when it is freed. Values are those of the environment, or
    glibc's own.
    """
    library = ctypes.CDLL(None)
    mapped, trimmed = _allocation_of_environment()
    if not hasattr(library, "mallinfo2"):
        return mapped, trimmed
    library.mallinfo2.restype = _MallocInfo
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    before = library.mallinfo2()
    block = library.malloc(_PROBE)
    is_mapped = library.mallinfo2().hblks > before.hblks
    library.free(block)
    if is_mapped:
        return mapped or _USUAL[0], trimmed
    is_trimmed = library.mallinfo2().arena < before.arena + _PROBE // 2
    return 0, trimmed if is_trimmed else _REUSING[1]


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _allocation_of_environment() -> _Allocation:
    """What the environment sets, glibc's own values elsewhere."""
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    found = dict(part.split("=", 1) for part in tunables if "=" in part)
    texts = (
        os.environ.get("MALLOC_MMAP_MAX_", found.get("glibc.malloc.mmap_max", "")),
        os.environ.get("MALLOC_TRIM_THRESHOLD_", found.get("glibc.malloc.trim_threshold", "")),
    )
    mapped, trimmed = (
        min(int(text), 2**31 - 1) if text.isascii() and text.isdigit() else usual
        for text, usual in zip(texts, _USUAL, strict=True)
    )
    return mapped, trimmed


def release_memory() -> None:
    """Give what was freed back to the system, where the C library keeps it (glibc does)."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"


FIRST_STAGE = "the first stage"
"""What `Attempt` calls that part of a model."""


class Attempt:
    """An attempt to compute, and where the result has NaN or infinities, another one in float32.

        attempt = Attempt("the U-Net", unet)
        while True:
            result = ...
            if attempt.succeeds(result):
                return result

    Args:
        stage: what the user is told of.
        module: what computes; becomes float32.
    """

    def __init__(self, stage: str, module: nn.Module) -> None:
        self.stage, self.module = stage, module
        self.device = next(module.parameters()).device
        self.states = random_states(self.device)

    def succeeds(self, result: Tensor) -> bool:
        """Whether all is finite; else the module is float32 now, and random numbers begin anew.

        Raises:
            NotFinite: it was float32 already.
        """
        if torch.isfinite(result).all():
            return True
        kind = next(self.module.parameters()).dtype
        if kind == torch.float32:
            raise NotFinite(self.stage)
        logger.warning(
            "%s gives values that are not numbers in %s; using float32", self.stage, kind
        )
        self.module.float()
        restore_random_states(self.device, self.states)
        return False


RandomStates: TypeAlias = "tuple[Tensor, Tensor | None]"
"""Of torch's global generators, on the CPU and on a device."""


def random_states(device: torch.device) -> RandomStates:
    """What `restore_random_states` takes."""
    own = None
    if device.type != "cpu":
        own = torch.get_device_module(device).get_rng_state(*_which(device))
    return torch.get_rng_state(), own


def restore_random_states(device: torch.device, states: RandomStates) -> None:
    """Go on with random numbers as from that moment."""
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.get_device_module(device).set_rng_state(states[1], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """The device as an argument: without, it is the process's current one, which is the first."""
    return () if device.type == "mps" else (device,)  # there is one, and older torch takes none


class NoiseStream:
    """One stream of random numbers from torch's global generators, whoever else draws from them.

    A context that may be entered again and again: it starts from the seed, and then goes on where
    it was left. Streams of other threads wait meanwhile: the generators are those of all.
    """

    _turn = threading.RLock()

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self._states: RandomStates | None = None

    def __enter__(self) -> None:
        """Go on."""
        self._turn.acquire()
        try:
            if self._states is None:
                torch.manual_seed(self.seed)
            else:
                restore_random_states(self.device, self._states)
        except BaseException:
            self._turn.release()
            raise

    def __exit__(self, *error: object) -> None:
        """Remember where it is left."""
        try:
            self._states = random_states(self.device)
        finally:
            self._turn.release()


def processor_says(name: str) -> str:
    """What Linux notes of the first processor under a name, such as ``flags``; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1] if match else ""
