"""What accompanies each step of a training run, and what it notes down."""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from ldm.training.checkpoints import Diverged
from ldm.training.order import seed_all
from ldm.util import written_whole

logger = logging.getLogger(__name__)


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
            text = yaml.safe_dump(config, sort_keys=False)
            with written_whole(self.folder / name, "w") as file:
                file.write(text)


class Chance(pl.Callback):
    """Seed every generator before each step, by the number of its batch; see `ldm.training.order`.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """What this step draws depends on seed, process and batch alone."""
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        seed_all(self.seed, trainer.global_rank, number)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        *_: Any,
    ) -> None:
        """Losses of different epochs can be compared."""
        seed_all(self.seed, trainer.global_rank, batch_idx)


class FiniteLoss(pl.Callback):
    """Ends training at the first loss that is no number, before it reaches the weights."""

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Look at the loss.

        Raises:
            Diverged: it is not finite.
        """
        if not bool(torch.isfinite(loss)):
            raise Diverged(f"step {trainer.global_step + 1}: the loss is {loss.item()}")


class RisenLoss(pl.Callback):
    """Warns of a diffusion model whose loss is far above what it was, and stays there.

    A learning rate that is a little too high may do well for thousands of steps and then, within a
    few, undo all of them; the run goes on and nothing in it is wrong.

    Attributes:
        lowest: mean of ``loss_simple`` over WINDOW steps, the lowest so far.
        has_risen: whether the last such mean is far above.
    """

    WINDOW = 100  # steps
    FACTOR = 2.0

    def __init__(self) -> None:
        self.lowest = math.inf
        self._losses: list[Tensor] = []
        self.has_risen = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Look at the mean whenever there is a new one."""
        self._losses.append(trainer.callback_metrics["train/loss_simple"])
        if len(self._losses) < self.WINDOW:
            return
        mean = torch.stack(self._losses).mean().item()
        self._losses.clear()
        has_risen = mean > self.FACTOR * self.lowest
        if has_risen and not self.has_risen and trainer.is_global_zero:
            logger.warning(
                "step %d: the loss of the last %d steps is %.3g, and was %.3g: the model has lost "
                "what it had learnt; begin again with a lower model.base_learning_rate",
                *(trainer.global_step, self.WINDOW, mean, self.lowest),
            )
        self.has_risen = has_risen
        self.lowest = min(self.lowest, mean)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"lowest": self.lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.lowest = float(state_dict["lowest"])


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
            peak: int | None = torch.cuda.max_memory_allocated(pl_module.device)
        else:
            peak = peak_memory()
        seconds = time.perf_counter() - self.start
        memory = "" if peak is None else f", peak {peak / 2**20:.0f} MiB"
        if trainer.is_global_zero:
            logger.info("Epoch %d: %.1f s%s", trainer.current_epoch, seconds, memory)


def peak_memory() -> int | None:
    """Most bytes that this process has held; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes
