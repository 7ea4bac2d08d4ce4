"""The data of a training run."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ldm.errors import InputError
from ldm.training.order import EpochBatches, SeededItems, dealt_out, shuffled
from ldm.util import instantiate_from_config

SPLITS = ("train", "validation", "test", "predict")


class WrappedDataset(Dataset):
    """A sequence of items as a data set; upstream's name.

    Args:
        dataset: anything with a length and items by number.
    """

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        """Number of items."""
        return len(self.data)

    def __getitem__(self, number: int) -> Any:
        """One item."""
        return self.data[number]


class DataModuleFromConfig(pl.LightningDataModule):
    """Data loaders from the ``target``/``params`` of their data sets.

    Training batches follow from the run's seed and their number: a run that is resumed goes on
    with the batch after its last one.

    Args:
        batch_size: pictures per step and process.
        train: configuration of the data set, or None, as ``validation``, ``test``, ``predict``.
        num_workers: loader processes (default: twice the batch size, at most the machine's cores).
        num_val_workers: those of all sets but ``train`` (default: as many).
        shuffle_val_dataloader: shuffle the validation pictures.
        shuffle_test_loader: shuffle the test pictures.
        wrap: without meaning here, as ``use_worker_init_fn``: any data set will do.

    Attributes:
        seed: of the run; the training script sets it.

    Source: CompVis main.py.
    """

    seed = 0

    def __init__(
        self,
        batch_size: int,
        train: dict[str, Any] | None = None,
        validation: dict[str, Any] | None = None,
        test: dict[str, Any] | None = None,
        predict: dict[str, Any] | None = None,
        num_workers: int | None = None,
        num_val_workers: int | None = None,
        shuffle_val_dataloader: bool = False,
        shuffle_test_loader: bool = False,
        wrap: bool = False,
        use_worker_init_fn: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        limit = os.cpu_count() or 1
        self.num_workers = min(2 * batch_size, limit) if num_workers is None else num_workers
        self.num_val_workers = self.num_workers if num_val_workers is None else num_val_workers
        self.is_shuffled = {"validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self.configs = dict(zip(SPLITS, (train, validation, test, predict), strict=True))
        self.datasets: dict[str, Any] = {}
        for split, config in self.configs.items():
            if config is None:  # Lightning takes an overridden loader as a promise
                name = {"validation": "val"}.get(split, split)
                setattr(self, f"{name}_dataloader", _no_loader)

    def prepare_data(self) -> None:
        """Build every data set once, so that what it caches is on disk before workers start."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets that are configured.

        Raises:
            InputError: the training set has fewer pictures than a batch.
        """
        for split, config in self.configs.items():
            if config is None or split in self.datasets:
                continue
            dataset = self.datasets[split] = instantiate_from_config(config, Dataset)
            if split == "train" and not _is_stream(dataset) and len(dataset) < self.batch_size:
                raise InputError(
                    f"data.params.batch_size {self.batch_size}: the training set has "
                    f"{len(dataset)} pictures, so give at most that"
                )

    @property
    def has_order(self) -> bool:
        """Whether the training batches follow from seed and number; those of a stream do not."""
        return not _is_stream(self.datasets["train"])

    def train_dataloader(self) -> DataLoader:
        """Training pictures, shuffled; full batches only."""
        dataset = self.datasets["train"]
        if _is_stream(dataset):
            return self._loader(dataset, self.num_workers, batch_size=self.batch_size)
        draw_buckets = getattr(dataset, "draw_batches", None)
        rank, n_ranks = self._place()
        draw: Callable[[], list[list[int]]] = (
            partial(shuffled, len(dataset), self.batch_size)
            if draw_buckets is None
            else partial(draw_buckets, n_ranks)
        )
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        batches = EpochBatches(draw, self.seed, self._n_done, rank, n_ranks, limit)
        items = SeededItems(dataset, self.seed)
        return self._loader(items, self.num_workers, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        """Validation pictures."""
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader:
        """Test pictures."""
        return self._in_order("test")

    def predict_dataloader(self) -> DataLoader:
        """Pictures to predict."""
        return self._in_order("predict")

    def _in_order(self, split: str) -> DataLoader:
        """Pictures in their order, or in one random order: the same at every reading."""
        dataset = self.datasets[split]
        if _is_stream(dataset):
            return self._loader(dataset, self.num_val_workers, batch_size=self.batch_size)
        items = SeededItems(dataset, self.seed)
        rank, n_ranks = self._place()
        draw_buckets = getattr(dataset, "draw_batches", None)
        if draw_buckets is not None:
            draw: Any = partial(draw_buckets, n_ranks)
            batches = EpochBatches(draw, self.seed, lambda: 0, rank, n_ranks)
            return self._loader(items, self.num_val_workers, batch_sampler=batches)
        if split == "predict":  # Lightning takes no batches of others there
            own: Any = DistributedSampler(items, n_ranks, rank, shuffle=False)
            size = self.batch_size
            return self._loader(items, self.num_val_workers, batch_size=size, sampler=own)
        order = torch.arange(len(items))
        if self.is_shuffled[split]:
            order = torch.randperm(len(items), generator=torch.Generator().manual_seed(self.seed))
        dealt = dealt_out(order, self.batch_size, rank, n_ranks)
        return self._loader(items, self.num_val_workers, batch_sampler=dealt)

    def _loader(self, dataset: Any, n_workers: int, **order: Any) -> DataLoader:
        return DataLoader(
            dataset,
            num_workers=n_workers,
            persistent_workers=n_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # so that no other is drawn from
            **order,
        )

    def _n_done(self) -> int:
        """Training batches that the run has had, in this process."""
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.ready

    def _place(self) -> tuple[int, int]:
        """Rank of this process, and how many there are."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def _is_stream(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset)


def _no_loader() -> list:
    return []
