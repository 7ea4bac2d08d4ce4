"""A model in training: its loss, its optimiser and its pictures, as Lightning calls for them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.lr_scheduler import Schedule
from ldm.util import instantiate_from_config

RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""What optimisers and their schedules store of the learning rate, by parameter group."""


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
    n_gathered = 1
    clip: tuple[float | None, str | None] = (None, None)

    def __init__(self, model: nn.Module, learning_rate: float = 1e-4) -> None:
        super().__init__()
        self.net = model
        self.learning_rate = learning_rate

    def take_over(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The trainer's settings, without those that a model with steps of its own heeds itself.

        With several optimisers Lightning neither gathers gradients of several batches nor clips
        them; `step` does.

        Args:
            settings: of the trainer.

        Raises:
            InputError: the precision needs a scaler, which is Lightning's alone.
        """
        if self.automatic_optimization:
            return settings
        if settings.get("precision") == "16-mixed":
            raise InputError(
                "lightning.trainer.precision 16-mixed: two optimisers need bf16-mixed or 32-true"
            )
        rest = dict(settings)
        self.n_gathered = rest.pop("accumulate_grad_batches", 1)
        self.clip = rest.pop("gradient_clip_val", None), rest.pop("gradient_clip_algorithm", None)
        return rest

    def step(self, optimizer: Any, loss: Tensor, batch_idx: int, counts: bool = True) -> None:
        """One batch's part of an optimiser's step, for models with several optimisers.

        Args:
            optimizer: Lightning's.
            loss: of this batch.
            batch_idx: within the epoch; the step is done after every ``n_gathered`` batches.
            counts: whether it is a step of the run.
        """
        if batch_idx % self.n_gathered == 0:
            optimizer.zero_grad()
        self.manual_backward(loss / self.n_gathered)
        if (batch_idx + 1) % self.n_gathered and not self.trainer.is_last_batch:
            return
        value, algorithm = self.clip
        if value:
            self.clip_gradients(optimizer, value, algorithm or "norm")
        (optimizer if counts else optimizer.optimizer).step()

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the rate, see `on_load_checkpoint`."""
        checkpoint["learning_rate"] = self.learning_rate

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the rate of now, where optimisers and schedules have stored another."""
        factor = self.learning_rate / checkpoint.get("learning_rate", self.learning_rate)
        for optimizer in checkpoint["optimizer_states"]:
            for group in optimizer["param_groups"]:
                group.update({name: factor * group[name] for name in RATES if name in group})
        for schedule in checkpoint["lr_schedulers"]:
            for name in ("base_lrs", "_last_lr"):
                if name in schedule:
                    schedule[name] = [factor * rate for rate in schedule[name]]

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
        """Log terms as ``{split}/{name}``: each step's, or the epoch's mean over all processes."""
        size = next(len(value) for value in batch.values() if isinstance(value, Tensor | list))
        named = {f"{split}/{name}": value for name, value in terms.items()}
        is_training = split == "train"
        self.log_dict(
            named,
            prog_bar=True,
            batch_size=size,
            on_step=is_training,
            on_epoch=not is_training,
            sync_dist=not is_training,
        )

    def configure_optimizers(self) -> Any:
        """The optimiser, with the schedule if there is one."""
        expected = self.trainer.estimated_stepping_batches  # infinite for a run without an end
        n_steps = int(min(expected, sys.maxsize))
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
        schedule = instantiate_from_config(config, Schedule).schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
