"""The data of a training run."""

from __future__ import annotations

import os
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset

from ldm.data.buckets import ResolutionBuckets
from ldm.util import instantiate_from_config


class DataModuleFromConfig(pl.LightningDataModule):
    """Data loaders from the ``target``/``params`` of their data sets.

    Args:
        batch_size: pictures per step and process.
        train, validation, test, predict: configuration of each data set, or None.
        num_workers: loader processes (default: twice the batch size, at most the machine's cores).
        shuffle_val_dataloader: shuffle the validation pictures.

    Source: CompVis main.py. Its ``wrap``, ``shuffle_test_loader`` and ``use_worker_init_fn`` serve
    kinds of data that are not supported here.
    """

    def __init__(
        self,
        batch_size: int,
        train: dict[str, Any] | None = None,
        validation: dict[str, Any] | None = None,
        test: dict[str, Any] | None = None,
        predict: dict[str, Any] | None = None,
        num_workers: int | None = None,
        shuffle_val_dataloader: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        limit = os.cpu_count() or 1
        self.num_workers = min(2 * batch_size, limit) if num_workers is None else num_workers
        self.shuffle_validation = shuffle_val_dataloader
        self.configs = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.datasets: dict[str, Dataset] = {}
        for split in ("train", "validation", "test", "predict"):
            if self.configs[split] is None:  # Lightning takes an overridden loader as a promise
                name = {"validation": "val"}.get(split, split)
                setattr(self, f"{name}_dataloader", _no_loader)

    def prepare_data(self) -> None:
        """Build every data set once, so that what it caches is on disk before workers start."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets that are configured."""
        for split, config in self.configs.items():
            if config is not None and split not in self.datasets:
                self.datasets[split] = instantiate_from_config(config, Dataset)

    def _loader(self, split: str, shuffle: bool) -> DataLoader:
        dataset = self.datasets[split]
        workers: dict[str, Any] = {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
        }
        if isinstance(dataset, ResolutionBuckets):
            return DataLoader(dataset, batch_sampler=dataset.batch_sampler, **workers)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=split == "train",
            **workers,
        )

    def train_dataloader(self) -> DataLoader:
        """Training pictures, shuffled."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation pictures."""
        return self._loader("validation", shuffle=self.shuffle_validation)

    def test_dataloader(self) -> DataLoader:
        """Test pictures."""
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> DataLoader:
        """Pictures to predict."""
        return self._loader("predict", shuffle=False)


def _no_loader() -> list:
    return []
