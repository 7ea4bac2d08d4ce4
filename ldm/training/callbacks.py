"""What a training run notes down: its configuration, and each epoch's time and memory."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only


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
            (self.folder / name).write_text(text, encoding="utf-8")


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
        rank_zero_info(f"Epoch {trainer.current_epoch}: {seconds:.1f} s{memory}")


def peak_memory() -> int | None:
    """Most bytes that this process has held; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes
