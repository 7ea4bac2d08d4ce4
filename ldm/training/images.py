"""Pictures that show how a training run goes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from ldm.errors import InputError
from ldm.images import make_grid, save_image, to_pixels

logger = logging.getLogger(__name__)
INERT = {  # of upstream's log_images
    *("inpaint", "n_row", "plot_conditionings", "plot_denoise_rows", "plot_diffusion_rows"),
    *("plot_progressive_rows", "quantize_denoised", "return_keys", "split"),
}


class ImageLogger(pl.Callback):
    """Save what ``pl_module.log_images`` draws, as ``images/{split}/{key}_gs-..._b-....png``.

    Args:
        batch_frequency: save at multiples of this many steps, and at powers of two before.
        max_images: pictures of a batch to draw, at most.
        clamp: without meaning here: pixels are always cut to what a PNG can hold.
        increase_log_steps: whether to save at the powers of two.
        rescale: the pictures are in [-1, 1]; else in [0, 1].
        disabled: save nothing.
        log_on_batch_idx: count batches within the epoch in place of steps.
        log_first_step: save at the first step too.
        log_all_val: save every validation batch, not just the first.
        log_images_kwargs: further arguments of ``log_images``, such as ``N`` or ``ddim_steps``;
            upstream's further kinds of pictures, such as ``plot_diffusion_rows``, are left out.

    Source: CompVis main.py.
    """

    def __init__(
        self,
        batch_frequency: int = 750,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_all_val: bool = False,
        log_images_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if batch_frequency < 1 or max_images < 1:
            raise InputError(
                f"ImageLogger: batch_frequency {batch_frequency} and max_images {max_images} must "
                "be at least 1 (disabled: true logs no pictures)"
            )
        self.batch_frequency = batch_frequency
        self.rescale = rescale
        self.disabled = disabled
        self.log_on_batch_idx = log_on_batch_idx
        self.log_all_val = log_all_val
        powers = (2**i for i in range(20))
        self.early = {p for p in powers if p < batch_frequency} if increase_log_steps else set()
        if log_first_step:
            self.early.add(1)
        given = log_images_kwargs or {}
        for name in INERT & given.keys():
            if given[name]:
                logger.info("log_images_kwargs.%s has no meaning here and is left out", name)
        self.kwargs = {name: value for name, value in given.items() if name not in INERT}
        self.kwargs["N"] = min(max_images, self.kwargs.get("N", max_images))
        self.last_step = 0

    @rank_zero_only
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Draw if it is time; once a step, however many batches it has."""
        is_same_step = trainer.global_step == self.last_step
        self.last_step = trainer.global_step
        if is_same_step and not self.log_on_batch_idx:
            return
        count = batch_idx + 1 if self.log_on_batch_idx else trainer.global_step
        if count % self.batch_frequency == 0 or count in self.early:
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
        """Draw the first batch, or every one."""
        if (batch_idx == 0 or self.log_all_val) and not trainer.sanity_checking:
            self._save(trainer, pl_module, batch, batch_idx, "val")

    def _save(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int, split: str
    ) -> None:
        log_images: Callable | None = getattr(module, "log_images", None)
        if log_images is None or self.disabled:
            return
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                drawn = log_images(batch, **self.kwargs)
        finally:
            for part, was_training in modes.items():
                part.training = was_training
        folder = Path(trainer.default_root_dir) / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        for key, pictures in drawn.items():
            stamp = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{index:06}"
            pixels = pictures.float().cpu()
            grid = make_grid(to_pixels(pixels if self.rescale else 2 * pixels - 1), n_columns=4)
            save_image(grid, folder / f"{key}_{stamp}.png")
