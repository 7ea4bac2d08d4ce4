"""The largest amount of memory in use during some work."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.device import release_memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what the kernel takes as: let the peak begin at what is in use now


@dataclass
class Peak:
    """The result of `peak_memory`.

    Attributes:
        mib: MiB; None where the system does not tell.
    """

    mib: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of the memory in use during the context, weights included.

    On CUDA that is what torch allocated, on MPS what its driver holds at the end. On the CPU it is
    the process's anonymous memory (not the mapped files), which Linux alone tells.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.mib = torch.cuda.max_memory_allocated(device) / 2**20
    elif device.type == "mps":
        torch.mps.empty_cache()
        yield peak
        peak.mib = torch.mps.driver_allocated_memory() / 2**20
    else:
        can_tell = _reset_peak()
        yield peak
        peak.mib = _anonymous_peak() if can_tell else None


def _reset_peak() -> bool:
    """Forget the process's peak so far; False where that is impossible."""
    if not sys.platform.startswith("linux"):
        return False
    release_memory()  # what earlier work left in the allocator is no part of this one
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _anonymous_peak() -> float:
    """MiB of the largest resident size, less what is mapped from files now."""
    entries = dict(re.findall(r"^(\w+):\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE))
    return (int(entries["VmHWM"]) - int(entries["RssFile"]) - int(entries["RssShmem"])) / 1024
