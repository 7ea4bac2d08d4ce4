"""Signals in training: it saves first, and says how to go on."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from ldm.cli.program import ENDS

logger = logging.getLogger(__name__)
SAVE = getattr(signal, "SIGUSR1", None)  # a cluster's warning before it ends a job; Unix has it
TOGETHER = 3.0  # seconds in which signals are one: a terminal's reaches launcher and processes


class Stopped(BaseException):
    """Training ends because of a signal.

    Args:
        number: of the signal.
        saved: the step that was saved because of it; None where nothing was.
    """

    def __init__(self, number: int, saved: int | None = None) -> None:
        super().__init__(number, saved)
        self.number = number
        self.saved = saved


class StopSafely(pl.callbacks.Checkpoint):
    """Save and stop at the end of the step in which a signal to stop comes; SIGUSR1 only saves.

    Before the first step, and at a second signal some seconds later, training stops at once.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_training = self.has_begun = False
        self.handlers: dict[int, Any] = {}
        self.stop: int | None = None
        self.stop_time = 0.0
        self.saved: int | None = None
        self.must_save = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside; afterwards as before."""
        self.handlers = {number: self._on_stop for number in (signal.SIGINT, *ENDS)}
        if SAVE is not None:
            self.handlers[SAVE] = self._on_save
        before = {number: signal.getsignal(number) for number in self.handlers}
        for number in ENDS:
            if before[number] is signal.SIG_IGN:  # nohup
                del self.handlers[number]
        try:
            self._listen()
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stop is not None and now - self.stop_time < TOGETHER:
            return
        if not self.is_training or self.stop is not None:
            raise Stopped(number)
        self.stop, self.stop_time = number, now
        logger.info("Stopping: this step is finished and saved first.")

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.must_save = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on there is something to save; Lightning's own handlers give way."""
        self.is_training = self.has_begun = True
        self._listen()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All is saved."""
        self.is_training = False

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save, and stop if that was wanted; never between the batches of one step."""
        n_gathered = max(trainer.accumulate_grad_batches, getattr(pl_module, "n_gathered", 1))
        if (batch_idx + 1) % n_gathered and not trainer.is_last_batch:
            return
        stops = self._agreed(trainer, self.stop is not None)
        if stops or self._agreed(trainer, self.must_save):
            trainer.save_checkpoint(self.path)
            logger.info("Saved step %d in %s", trainer.global_step, self.path)
            self.must_save = False
        if stops:
            self.stop, self.saved = self.stop or signal.SIGTERM, trainer.global_step
        elif self._is_last(trainer) and not self._is_saved(trainer):
            trainer.save_checkpoint(self.path)

    def _leave(self) -> None:
        """Stop, now that the step is in the metrics too."""
        if self.stop is not None and self.saved is not None:
            raise Stopped(self.stop, self.saved)

    def on_train_batch_start(self, *_: Any) -> None:
        """The next step does not begin."""
        self._leave()

    def on_validation_start(self, *_: Any) -> None:
        """Nor does validation."""
        self._leave()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Nor does the next epoch."""
        self._leave()

    @staticmethod
    def _is_last(trainer: pl.Trainer) -> bool:
        if 0 < trainer.max_steps <= trainer.global_step:
            return True
        has_end = trainer.max_epochs is not None and trainer.max_epochs > 0
        is_end = has_end and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        return is_end and trainer.is_last_batch

    def _is_saved(self, trainer: pl.Trainer) -> bool:
        others = (c for c in trainer.checkpoint_callbacks if c is not self)
        return any(getattr(c, "_last_global_step_saved", 0) == trainer.global_step for c in others)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Stop; the step before is saved."""
        if self.is_training and self._agreed(trainer, self.stop is not None):
            trainer.save_checkpoint(self.path)
            raise Stopped(self.stop or signal.SIGTERM, trainer.global_step)

    @staticmethod
    def _agreed(trainer: pl.Trainer, wanted: bool) -> bool:
        """Whether any process wants it: saving is the work of all."""
        if trainer.world_size == 1:
            return wanted
        return trainer.strategy.reduce_boolean_decision(wanted, all=False)
