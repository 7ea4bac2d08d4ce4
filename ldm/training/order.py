"""Data and chance that a run meets again: both follow from its seed and the number of the batch.

So a run that was stopped goes on as if it had not been: nothing about them is in its checkpoints.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

MAX_SEED = 2**32 - 1  # numpy's


def seed_all(*numbers: int) -> None:
    """Set the global generators of Python, numpy and torch, on every device, by some numbers >= 0.

    Other numbers give independent streams, however near they are.
    """
    first, second, third = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(first))
    np.random.seed(int(second))  # noqa: NPY002 - what data sets of others draw from
    torch.manual_seed(int(third))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Set the global generators for a while; those of devices are left alone."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - see seed_all
    with torch.random.fork_rng(devices=[]):
        first, second, third = np.random.SeedSequence(numbers).generate_state(3)
        random.seed(int(first))
        np.random.seed(int(second))  # noqa: NPY002 - see seed_all
        torch.default_generator.manual_seed(int(third))
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002 - see seed_all


class SeededItems(Dataset):
    """A data set whose item is the same whenever and wherever it is read in an epoch.

    Args:
        dataset: anything with ``len`` and ``[index]``; what it draws from the global generators
            depends on seed, epoch and index alone.
        seed: of the run.

    A key is (epoch, index), or an index, which stands for epoch 0.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        """How many items there are."""
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> Any:
        """The item of a key."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with seeded(self.seed, epoch, index):
            return self.dataset[index]


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of keys for `SeededItems`, from where the run stands to the end of the epoch.

    Args:
        draw: draws an epoch's batches of indices from torch's global generator; always as many.
        seed: of the run.
        n_done: how many batches the run has had.
        rank: of this process; of every ``n_ranks`` batches it takes one.
        n_ranks: how many processes there are.
        limit: how many of an epoch's batches the run takes, or which share of them: Lightning's
            ``limit_train_batches``.
    """

    def __init__(
        self,
        draw: Callable[[], list[list[int]]],
        seed: int,
        n_done: Callable[[], int],
        rank: int = 0,
        n_ranks: int = 1,
        limit: float = 1.0,
    ) -> None:
        self.draw = draw
        self.seed = seed
        self.n_done = n_done
        self.rank = rank
        self.n_ranks = n_ranks
        self.limit = limit
        self.length = len(self._batches(0))

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.length

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The rest of the epoch."""
        n, limit = self.length, self.limit
        taken = min(n, limit) if isinstance(limit, int) else int(n * limit)
        epoch, n_done = divmod(self.n_done(), max(taken, 1))
        for batch in self._batches(epoch)[n_done:]:
            yield [(epoch, index) for index in batch]

    def _batches(self, epoch: int) -> list[list[int]]:
        with seeded(self.seed, epoch):
            batches = self.draw()
        whole = len(batches) - len(batches) % self.n_ranks
        return batches[self.rank : whole : self.n_ranks]


def shuffled(n_items: int, batch_size: int) -> list[list[int]]:
    """All full batches of so many items in random order."""
    order = torch.randperm(n_items).tolist()
    return [order[i : i + batch_size] for i in range(0, n_items - batch_size + 1, batch_size)]


def dealt_out(order: Tensor, batch_size: int, rank: int, n_ranks: int) -> list[list[int]]:
    """A process's batches of items that are measured: each item counts once among all processes.

    All have as many batches, since they wait for each other; so the last ones of several processes
    may be smaller, or have one item more. Of fewer items than processes each reads all.

    Args:
        order: the items' numbers, (n,).
        batch_size: items in a batch.
        rank: of this process.
        n_ranks: how many processes there are.
    """
    if len(order) < n_ranks:
        rank, n_ranks = 0, 1
    rounds, rest = divmod(len(order), batch_size * n_ranks)
    if rest < n_ranks and rounds:
        rounds, rest = rounds - 1, rest + batch_size * n_ranks
    full, last = order[: len(order) - rest], order[len(order) - rest :]
    batches = [*full.view(-1, batch_size), *last.tensor_split(n_ranks)]
    return [batch.tolist() for batch in batches[rank::n_ranks]]
