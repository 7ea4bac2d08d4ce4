"""Pictures of several sizes in one training run; a batch holds one size."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset

from ldm.errors import InputError
from ldm.util import instantiate_from_config


class ResolutionBuckets(ConcatDataset):
    """Data sets of one picture size each, read batch by batch in random order.

    Args:
        buckets: `target`/`params` of each data set.
        batch_sizes: pictures per batch of each; in place of the data module's batch size.

    Raises:
        InputError: not one batch size for each data set, or a data set smaller than its batch.
    """

    def __init__(self, buckets: list[dict[str, Any]], batch_sizes: list[int]) -> None:
        if len(buckets) != len(batch_sizes):
            raise InputError(
                f"batch_sizes {list(batch_sizes)}: give one for each of the {len(buckets)} buckets"
            )
        super().__init__([instantiate_from_config(bucket, Dataset) for bucket in buckets])
        lengths = [len(dataset) for dataset in self.datasets]  # type: ignore[arg-type]
        for length, size in zip(lengths, batch_sizes, strict=True):
            if not 1 <= size <= length:
                raise InputError(f"batch size {size}: its bucket has {length} pictures")
        self.lengths, self.batch_sizes = lengths, batch_sizes

    def draw_batches(self, n_processes: int = 1) -> list[list[int]]:
        """Indices of an epoch's batches: all full ones of all buckets.

        They are drawn from torch's global generator, as a shuffling loader does, in an order in
        which processes that take turns have equal work.

        Args:
            n_processes: so many batches in a row are of one bucket, but for those left over.
        """
        groups: list[list[list[int]]] = []
        rest: list[list[int]] = []
        start = 0
        for length, size in zip(self.lengths, self.batch_sizes, strict=True):
            order = (start + torch.randperm(length)).tolist()
            batches = [order[i : i + size] for i in range(0, length - size + 1, size)]
            whole = len(batches) - len(batches) % n_processes
            groups += [batches[i : i + n_processes] for i in range(0, whole, n_processes)]
            rest += batches[whole:]
            start += length
        drawn = [batch for i in torch.randperm(len(groups)).tolist() for batch in groups[i]]
        return drawn + [rest[i] for i in torch.randperm(len(rest)).tolist()]
