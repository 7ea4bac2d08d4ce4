"""Pictures that show how a training run goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from ldm.images import make_grid, save_image, to_pixels


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
                drawn = log_images(batch, N=self.max_images, **self.kwargs)
        finally:
            module.train(was_training)
        folder = Path(trainer.default_root_dir) / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        for key, pictures in drawn.items():
            stamp = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{index:06}"
            grid = make_grid(to_pixels(pictures.float().cpu()), n_columns=4)
            save_image(grid, folder / f"{key}_{stamp}.png")
