"""Training by the clock: a stage takes the time that it is given, and is never lost."""

from __future__ import annotations

import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.errors import InputError
from ldm.training.callbacks import RisenLoss
from ldm.training.module import Training
from ldm.util import written_whole


def rate_factor(progress: float, decay: float, floor: float) -> float:
    """Factor on the learning rate: 1, and in the last part half a cosine down.

    Args:
        progress: share of the time that has passed.
        decay: length of the last part, as a share of the time.
        floor: factor at the end.
    """
    fallen = min(max(progress - (1 - decay), 0.0) / decay, 1.0) if decay else 0.0
    return floor + (1 - floor) * (1 + math.cos(math.pi * fallen)) / 2


def core_seconds(n_processes: int = 1) -> float:
    """Processor time of this process and others like it: seconds of all the machine's cores."""
    return time.process_time() * n_processes / (os.cpu_count() or 1)


class Clock(pl.callbacks.Checkpoint):
    """Sets the learning rate by the time spent, stops in time, and saves in between.

    The clock counts training alone and is kept in the checkpoint, so that a run may be stopped and
    resumed at any time, also with another amount of time in all. On a CPU it counts what this
    process had of the cores, so that a busy machine does not mean a worse model, only a later one.
    As a Checkpoint it comes after what else follows a step: the average is that of the weights.
    A run whose loss has risen far above what it was ends with an error, and is not saved.

    Args:
        seconds: of training, in all; None leaves learning rate and end to the run itself.
        this_call: seconds after which this process stops in any case, to be resumed later.
        warm_up: steps of a linear rise of the learning rate, at the beginning and once resumed.
        decay: share of the time at the end in which the learning rate falls.
        floor: factor on the learning rate at the end.
        save_every: seconds between checkpoints.
    """

    def __init__(
        self,
        seconds: float | None = None,
        this_call: float = math.inf,
        warm_up: int = 50,
        decay: float = 0.3,
        floor: float = 0.02,
        save_every: float = 150.0,
    ) -> None:
        self.seconds, self.this_call = seconds, this_call
        self.warm_up, self.decay, self.floor, self.save_every = warm_up, decay, floor, save_every
        self.began = time.monotonic()  # what is prepared before training counts for this call
        self.spent = 0.0
        self.is_over = False
        self.pictures = 0
        self.losses: dict[str, float] = {}
        self.rates: list[list[float]] = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"spent": self.spent, "pictures": self.pictures, "losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.spent = state_dict["spent"]
        self.pictures = state_dict["pictures"]
        self.losses = state_dict["losses"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the rates that are to be scaled."""
        assert isinstance(pl_module, Training)
        rate = pl_module.learning_rate
        self.rates = [[rate for _ in each.param_groups] for each in trainer.optimizers]
        self.first = trainer.global_step
        is_on_cpu = pl_module.device.type == "cpu"
        self.now = partial(core_seconds, trainer.world_size) if is_on_cpu else time.monotonic
        self.started = self.now()
        self.saved = time.monotonic()
        self.before = self.spent

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rate."""
        if self.seconds is None:
            return
        factor = rate_factor(self.spent / self.seconds, self.decay, self.floor)
        if self.warm_up:
            factor *= min((trainer.global_step - self.first + 1) / self.warm_up, 1.0)
        for optimizer, rates in zip(trainer.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count, average the losses, save and stop when it is time.

        Of several processes the first one's clock decides for all.

        Raises:
            InputError: the model has lost what it had learnt, see `RisenLoss`.
        """
        followed: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(one, RisenLoss) and one.has_risen for one in followed):
            raise InputError(
                f"{trainer.default_root_dir}: at step {trainer.global_step} the model has lost "
                "what it had learnt; delete this folder and try again, with a lower "
                "model.base_learning_rate if that does not help"
            )
        self.pictures += len(next(iter(batch.values()))) * trainer.world_size
        for name, value in trainer.logged_metrics.items():
            if name.startswith("train/") and torch.is_tensor(value):
                old = self.losses.get(name, float(value))
                self.losses[name] = 0.99 * old + 0.01 * float(value)
        now = time.monotonic()
        own = (
            self.before + self.now() - self.started,
            now - self.began >= self.this_call,
            now - self.saved >= self.save_every,
        )
        self.spent, has_ended, must_save = trainer.strategy.broadcast(own)
        self.is_over = self.seconds is not None and self.spent >= self.seconds
        trainer.should_stop = self.is_over or has_ended
        if must_save:
            self.save(trainer)
            self.saved = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the losses on pictures that are not trained on."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                self.losses[name] = float(value)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what has been learnt; a run that reached its own end is over as well."""
        self.is_over = self.is_over or (not trainer.should_stop and not trainer.interrupted)
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint, and beside it how far it is."""
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(path)
        if not trainer.is_global_zero:
            return
        progress = {
            "steps": trainer.global_step,
            "seconds": round(self.spent, 3),
            "pictures": self.pictures,
            "is_over": self.is_over,
            "losses": {k: round(v, 6) for k, v in self.losses.items()},
        }
        with written_whole(path.with_name("progress.json"), "w") as file:
            json.dump(progress, file, indent=2)
