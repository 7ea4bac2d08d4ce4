"""Checkpoints of a run: written whole or not at all, and found again."""

from __future__ import annotations

import logging
import pickle
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from ldm.checkpoint.keys import SCHEDULE
from ldm.errors import InputError, escaped
from ldm.util import written_whole

STEP_FOLDER = "trainstep_checkpoints"
"""Where upstream's metrics_over_trainsteps_checkpoint keeps weights, beside a run's checkpoints."""
SAVED = "saved_at"
"""Entry of a checkpoint: when it was written, in seconds since 1970."""

logger = logging.getLogger(__name__)


class Diverged(InputError):
    """A loss or a weight is no number any more."""

    exit_code = 1


class WholeCheckpoints(CheckpointIO):
    """Writes a checkpoint beside its place, waits until it is on the disk, then renames it.

    Weights that are no numbers are not written, so that they never replace good ones.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            Diverged: a weight is no number.
            InputError: the folder cannot be written to, or the disk is full.
        """
        name = first_not_finite(checkpoint["state_dict"])
        if name is not None:
            step = checkpoint["global_step"]
            raise Diverged(f"after step {step} the weights {name} are no numbers")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as file:
            torch.save({**checkpoint, SAVED: time.time()}, file)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, without executing pickled code.

        Raises:
            InputError: it is damaged, or no checkpoint of a training run.
        """
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, if it is there."""
        Path(path).unlink(missing_ok=True)


class RunCheckpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint for a run that may be stopped within an epoch and go on there."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of an epoch, not where the last step of the run cuts it short."""
        if trainer.is_last_batch:
            super().on_train_epoch_end(trainer, pl_module)


def first_not_finite(state: Mapping[str, Any]) -> str | None:
    """Name of the first weight with a value that is no finite number; None without.

    A schedule that ends in noise alone has 1 / alpha_bar without end, as it should.
    """
    for name, value in state.items():
        if name in SCHEDULE:
            continue
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        if is_float and not bool(torch.isfinite(value).all()):
            return name
    return None


def read_checkpoint(path: Path, is_glance: bool = False) -> dict[str, Any]:
    """A checkpoint of a training run, on the CPU.

    Args:
        path: its file.
        is_glance: leave the tensors on the disk.

    Raises:
        InputError: it is damaged, or no checkpoint of a training run.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_glance)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {escaped(path)}") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = escaped(str(error).partition("\n")[0])
        raise InputError(f"{escaped(path)} is damaged, or no checkpoint ({reason})") from None
    needed = {"state_dict", "global_step", "loops", "optimizer_states"}
    if not isinstance(content, dict) or needed - content.keys():
        raise InputError(
            f"{escaped(path)} is no checkpoint that training can go on from; to start with its "
            "weights, use --finetune_from"
        )
    step = content["global_step"]
    if not isinstance(step, int) or step < 0:
        raise InputError(f"{escaped(path)} is damaged (its global_step is no number)")
    return content


def check_whole(path: Path) -> None:
    """Compare a checkpoint's bytes with their check sums.

    Raises:
        InputError: they differ.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{escaped(path)} is damaged ({escaped(error)})") from None
    if bad is not None:
        raise InputError(f"{escaped(path)} is damaged (in {escaped(bad)})")


def newest_checkpoint(folder: Path) -> tuple[Path, int]:
    """The whole checkpoint of a run that was written last, and its step.

    That need not be the highest one: the run may have gone on from an earlier one since. Of those
    of older versions, which do not say when they were written, the highest step counts. Damaged
    ones are passed over with a line.

    Args:
        folder: of the run.

    Raises:
        InputError: there is none.
    """
    found = []
    for path in sorted((folder / "checkpoints").rglob("*.ckpt")):
        if path.parent.name == STEP_FOLDER:
            continue
        try:
            content = read_checkpoint(path, is_glance=True)
        except InputError as error:
            logger.warning("%s; passed over", error)
            continue
        step, saved = content["global_step"], content.get(SAVED)
        known = saved if isinstance(saved, float) else 0.0
        found.append((known, step, path.stat().st_mtime, path))
    for _, step, _, path in sorted(found, reverse=True):
        try:
            check_whole(path)
        except InputError as error:
            logger.warning("%s; passed over", error)
            continue
        return path, step
    place = escaped(folder / "checkpoints")
    raise InputError(f"--resume {escaped(folder)}: there is no whole checkpoint in {place}")
