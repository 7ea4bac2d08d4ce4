"""A model in training: its loss, its optimiser and its pictures, as Lightning calls for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.util import instantiate_from_config


class Training(pl.LightningModule):
    """A model with ``terms(batch, split)`` and ``optimizer(learning_rate, n_steps)``.

    The first gives the terms of a batch's loss, of which ``loss`` is minimised and all are logged
    as ``{split}/{name}``; the second an optimiser, or a pair of it and a schedule of its rate for
    each step. Models with other habits have a class derived from this one. State-dict names are
    the model's own.

    Args:
        model: to be trained.
        learning_rate: of the optimiser.
    """

    net: Any

    def __init__(self, model: nn.Module, learning_rate: float = 1e-4) -> None:
        super().__init__()
        self.net = model
        self.learning_rate = learning_rate

    @property
    def monitor(self) -> str | None:
        """Name of the logged value by which checkpoints are kept."""
        return getattr(self.net, "monitor", None)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's own."""
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Into the model."""
        return self.net.load_state_dict(state_dict, strict, assign)

    def terms(self, batch: dict[str, Any], split: str, index: int) -> dict[str, Tensor]:
        """Terms of the loss of a batch of ``train``, ``val`` or ``test``."""
        return self.net.terms(batch, split)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Loss of one batch."""
        terms = self.terms(batch, "train", batch_idx)
        self.log_terms(terms, "train", batch)
        return terms["loss"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss of one batch."""
        self.log_terms(self.terms(batch, "val", batch_idx), "val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss of one batch."""
        self.log_terms(self.terms(batch, "test", batch_idx), "test", batch)

    def log_terms(self, terms: Mapping[str, Tensor], split: str, batch: dict[str, Any]) -> None:
        """Log terms as ``{split}/{name}``: each step's in training, else the epoch's mean."""
        size = next(len(value) for value in batch.values() if isinstance(value, Tensor | list))
        named = {f"{split}/{name}": value for name, value in terms.items()}
        is_training = split == "train"
        self.log_dict(
            named, prog_bar=True, batch_size=size, on_step=is_training, on_epoch=not is_training
        )

    def configure_optimizers(self) -> Any:
        """The optimiser, with the schedule if there is one."""
        n_steps = int(self.trainer.estimated_stepping_batches)
        found = self.net.optimizer(self.learning_rate, n_steps)
        if isinstance(found, torch.optim.Optimizer):
            return found
        optimizer, schedule = found
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def scheduled(self, optimizer: torch.optim.Optimizer) -> Any:
        """An optimiser with the schedule of the model's ``scheduler_config``, if it has one."""
        config = self.net.scheduler_config
        if config is None:
            return optimizer
        schedule = instantiate_from_config(config).schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
