"""What a training run needs around a model: data, saved configurations, logged pictures.

The classes carry the names that upstream's main.py gave them, so its YAML files keep working.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader, Dataset

from ldm.data.buckets import ResolutionBuckets
from ldm.images import make_grid, save_image, to_pixels
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
                self.datasets[split] = instantiate_from_config(config)

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


class SetupCallback(pl.Callback):
    """Write the run's configuration beside its checkpoints, once.

    Args:
        logdir: folder of the run.
        now: time stamp in the files' names.
        config: model and data sections; ``lightning_config`` the rest.
    """

    def __init__(self, logdir: Path, now: str, config: dict, lightning_config: dict) -> None:
        self.folder = Path(logdir) / "configs"
        self.files = {f"{now}-project.yaml": config, f"{now}-lightning.yaml": lightning_config}

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save both files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, config in self.files.items():
            OmegaConf.save(OmegaConf.create(config), self.folder / name)


class CUDACallback(pl.Callback):
    """Report time and peak memory of each epoch; on the CPU, of the process."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock: a resumed run goes on within an epoch, without that epoch's start."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock anew."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            torch.cuda.synchronize(pl_module.device)
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop it and say what it showed."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            peak = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        seconds = time.perf_counter() - self.start
        rank_zero_info(f"Epoch {trainer.current_epoch}: {seconds:.1f} s, peak {peak:.0f} MiB")


class ImageLogger(pl.Callback):
    """Save what ``pl_module.log_images`` draws, as ``images/{split}/{key}_gs-..._b-....png``.

    Args:
        batch_frequency: save at multiples of this many steps, and at powers of two before.
        max_images: pictures of a batch to draw.
        increase_log_steps: whether to save at the powers of two.
        log_images_kwargs: further arguments of ``log_images``.

    Source: CompVis main.py.
    """

    def __init__(
        self,
        batch_frequency: int = 750,
        max_images: int = 4,
        increase_log_steps: bool = True,
        log_images_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        powers = (2**i for i in range(20))
        self.early = {p for p in powers if p < batch_frequency} if increase_log_steps else set()
        self.kwargs = log_images_kwargs or {}

    @rank_zero_only
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Draw if it is time."""
        step = trainer.global_step
        if step % self.batch_frequency == 0 or step in self.early:
            self._save(trainer, pl_module, batch, batch_idx, "train")

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        if batch_idx == 0 and not trainer.sanity_checking:
            self._save(trainer, pl_module, batch, batch_idx, "val")

    def _save(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int, split: str
    ) -> None:
        log_images: Callable | None = getattr(module, "log_images", None)
        if log_images is None:
            return
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                drawn = log_images(batch, n_pictures=self.max_images, **self.kwargs)
        finally:
            module.train(was_training)
        folder = Path(trainer.default_root_dir) / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        for key, pictures in drawn.items():
            stamp = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{index:06}"
            grid = make_grid(to_pixels(pictures.float().cpu()), n_columns=4)
            save_image(grid, folder / f"{key}_{stamp}.png")
