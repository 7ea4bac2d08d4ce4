"""Several processes that share work, started by ``torchrun``.

Importing this takes no torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

from ldm.errors import InputError, shown

T = TypeVar("T")

# Processes wait for the slowest one before results are put together.
TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Process:
    """This process among those that share the work.

    Attributes:
        rank: its number.
        n_processes: how many there are, on all machines.
        local_rank: its number on this machine.
    """

    rank: int = 0
    n_processes: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Process:
        """What ``torchrun`` says; a single process without it.

        Raises:
            InputError: what is there instead cannot be used.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if any(name not in os.environ for name in names):
            return cls()
        texts = [os.environ[name] for name in names]
        if not all(text.isdecimal() and len(text) < 10 for text in texts):
            told = ", ".join(f"{name}={shown(os.environ[name])}" for name in names)
            raise InputError(f"{told}: these come from torchrun, and have to be whole numbers")
        process = cls(*map(int, texts))
        if process.rank >= process.n_processes:
            raise InputError(f"RANK={process.rank}: there are WORLD_SIZE={process.n_processes}")
        return process

    @property
    def is_first(self) -> bool:
        """Whether this one does what is done once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the work."""
        return items[self.rank :: self.n_processes]

    def after(self, n_items: int) -> Process:
        """This process where so many items were shared before, for `share` alone."""
        return replace(self, rank=(self.rank - n_items) % self.n_processes)

    def share_numbers(self, sizes: Sequence[int]) -> list[int]:
        """Numbers of the things in this process's part, where `share` divides groups of them."""
        ends = list(itertools.accumulate(sizes))
        groups = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        return [number for group in self.share(groups) for number in group]

    def device(self, name: str) -> str:
        """The device of that name; of several GPUs the one that is this process's."""
        if self.n_processes == 1 or name not in ("auto", "cuda"):
            return name
        import torch

        if not torch.cuda.is_available():
            return name
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be connected with the others as long as the context lasts."""
        if self.n_processes == 1:
            yield
            return
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=TIMEOUT)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Wait until all have come here; needs `joined`."""
        if self.n_processes > 1:
            import torch.distributed as dist

            dist.barrier()

    def gathered(self, mine: T) -> list[T]:
        """What each process has, in the order of their ranks; needs `joined`."""
        if self.n_processes == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Any] = [None] * self.n_processes
        dist.all_gather_object(found, mine)
        return found


ALONE = Process()
