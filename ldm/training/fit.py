"""One training run, from a configuration to its last checkpoint."""

from __future__ import annotations

import argparse
import datetime
import logging
import math
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from ldm.cli.program import word_and_code
from ldm.device import reused_memory
from ldm.errors import InputError, OutOfMemory, escaped, is_out_of_memory, shown
from ldm.training.callbacks import Chance, CUDACallback, FiniteLoss, SetupCallback
from ldm.training.check import check_arguments, check_object, known, pairs
from ldm.training.checkpoints import (
    STEP_FOLDER,
    Diverged,
    RunCheckpoints,
    WholeCheckpoints,
    check_whole,
    newest_checkpoint,
    read_checkpoint,
)
from ldm.training.data import DataModuleFromConfig
from ldm.training.images import ImageLogger
from ldm.training.module import Training
from ldm.training.order import seed_all
from ldm.training.stop import Stopped, StopSafely
from ldm.training.trainer import LESS_TO_TRAIN, trainer_settings
from ldm.training.trial import blamed_on, logged_names
from ldm.training.wrap import in_training
from ldm.util import cannot_write, disk_fault, instantiate_from_config, locked

logger = logging.getLogger(__name__)
# Lightning's advice that does not hold here
_NO_NEWS = (
    "You're resuming from a checkpoint that ended",
    "Checkpoint directory .* exists",
    "Be aware that when using `ckpt_path`",
    ".* does not have many workers",
    "The number of training batches",
    "Found .* in eval mode at the start of training",
    "You defined a `validation_step` but have no",
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "Using ModelCheckpoint with manual optimization",
    "Total length of `list` across ranks is zero",  # without validation
    "Grad strides do not match bucket view strides",  # of 1x1 convolutions
)
STEP_WEIGHTS = "metrics_over_trainsteps_checkpoint"
# What a YAML may leave out of upstream's callbacks.
USUAL_CALLBACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "learning_rate_logger": ("main.LearningRateMonitor", {"logging_interval": "step"}),
    "cuda_callback": ("main.CUDACallback", {}),
    "image_logger": ("main.ImageLogger", {}),
    STEP_WEIGHTS: (
        "pytorch_lightning.callbacks.ModelCheckpoint",
        {
            "filename": "{epoch:06}-{step:09}",
            "save_top_k": -1,
            "every_n_train_steps": 10_000,
            "save_weights_only": True,
        },
    ),
}
OWN_CALLBACKS = {"learning_rate_logger": LearningRateMonitor, "cuda_callback": CUDACallback}


def _quiet() -> None:
    """Keep Lightning's advice, which does not hold here, from the user."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in _NO_NEWS:
        warnings.filterwarnings("ignore", message)


def fit(
    config: dict[str, Any], options: argparse.Namespace, folder: Path, checkpoint: Path | None
) -> None:
    """Build model, data and trainer, try them, and train.

    Args:
        config: checked by `check_sections`.
        options: of the command line.
        folder: of the run; a new run makes it.
        checkpoint: to go on from; None takes the newest of a run that is resumed.

    Raises:
        InputError: something of the configuration cannot be; then there is no folder.
        Diverged: a loss is no number.
    """
    lightning = {key: value or {} for key, value in (config["lightning"] or {}).items()}
    finds_unused = bool(lightning.get("find_unused_parameters"))
    settings = trainer_settings(lightning["trainer"], torch.cuda.device_count, finds_unused)
    check_object(config["model"], "model", nn.Module)
    check_object(config["data"], "data", pl.LightningDataModule)
    if lightning.get("logger"):
        name = escaped(lightning["logger"].get("target"))
        logger.info("lightning.logger %s has no meaning here: metrics are in metrics.csv", name)
    callbacks = _callbacks(lightning.get("callbacks", {}))
    kept = _checkpointing(lightning.get("modelcheckpoint", {}))
    resumed = _resumed(options, folder, checkpoint)
    if resumed is not None and 0 < settings.get("max_steps", -1) <= resumed[1]:
        limit = settings["max_steps"]
        print(f"This run has done {resumed[1]} steps of {limit}; give --max_steps more.")
        return

    seed = config["seed"]
    seed_all(seed)
    with blamed_on("model"):
        model = instantiate_from_config(_start(config["model"], resumed is None), nn.Module)
        training: Any = in_training(model)
        n_gathered = settings.get("accumulate_grad_batches", 1)
        if isinstance(training, Training):
            settings = training.take_over(settings)
    with blamed_on("data"):
        data = instantiate_from_config(config["data"], pl.LightningDataModule)
        if isinstance(data, DataModuleFromConfig):
            data.seed = seed
            data.setup()
            if "train" not in data.datasets:
                raise InputError("data.params.train is missing: there is nothing to train on")
    if resumed is not None and not (isinstance(data, DataModuleFromConfig) and data.has_order):
        logger.warning(
            "the training data are a stream, or of a module of their own, which keeps no place: "
            "this run may read them from the beginning again"
        )
    monitor = kept.get("monitor", getattr(training, "monitor", None))
    if isinstance(training, Training) and isinstance(data, DataModuleFromConfig):
        names = logged_names(training, data, seed)
        monitor = _known_monitor(monitor, names, has_validation="validation" in data.datasets)
        _check_pictures(training, callbacks)
        _check_monitors(callbacks, names)
    if monitor is not None:
        kept = {"save_top_k": 1, **kept, "monitor": monitor}

    with _run_folder(folder, is_new=resumed is None) as folder:
        by_step = callbacks.get(STEP_WEIGHTS)
        if isinstance(by_step, ModelCheckpoint) and by_step.dirpath is None:
            by_step.dirpath = str(folder / "checkpoints" / STEP_FOLDER)
        stop = StopSafely(folder / "checkpoints" / "last.ckpt")
        trainer = _trainer(settings, folder, callbacks, kept, stop, config, lightning)
        n_batches = n_gathered * trainer.world_size
        rate = learning_rate(config, n_batches if options.scale_lr else None)
        training.learning_rate = rate
        print(f"Learning rate: {rate:.2e}. Run: {folder}")
        if resumed is not None:
            print(f"Going on from {resumed[0]}, step {resumed[1]}.")
        memory = reused_memory(trainer.strategy.root_device)
        with _said(trainer, folder, stop), stop.listening(), memory:
            trainer.fit(training, data, ckpt_path=None if resumed is None else str(resumed[0]))
            has_test = isinstance(data, DataModuleFromConfig) and data.configs["test"] is not None
            if has_test and not options.no_test:
                trainer.test(training, data)
        print(f"Done: step {trainer.global_step}, in {folder / 'checkpoints'}")


# --- before the run ---------------------------------------------------------------------------


def _callbacks(config: Any) -> dict[str, pl.Callback]:
    """The callbacks of a configuration by their names, and those that a run always has."""
    known(config, list(config) if isinstance(config, Mapping) else [], "lightning.callbacks")
    made = {name: _callback(name, entry) for name, entry in config.items()}
    for name, kind in OWN_CALLBACKS.items():
        if not any(isinstance(callback, kind) for callback in made.values()):
            made[name] = _callback(name, {})
    return made


def _callback(name: str, entry: Any) -> pl.Callback:
    """One callback; what upstream's of that name have is filled in."""
    place = f"lightning.callbacks.{escaped(name)}"
    if name in USUAL_CALLBACKS:
        target, usual = USUAL_CALLBACKS[name]
        entry = {"target": target, **pairs(entry, place)}
        if entry["target"] == target:
            entry["params"] = {**usual, **pairs(entry.get("params"), f"{place}.params")}
    check_object(entry, place, pl.Callback)
    with blamed_on(place):
        return instantiate_from_config(entry, pl.Callback)


def _checkpointing(config: Any) -> dict[str, Any]:
    """Arguments of ModelCheckpoint."""
    known(config, ("target", "params"), "lightning.modelcheckpoint")
    params = dict(pairs(config.get("params"), "lightning.modelcheckpoint.params"))
    if "period" in params:
        params["every_n_epochs"] = params.pop("period")
    for name in ("dirpath", "enable_version_counter"):
        if name in params:
            raise InputError(
                f"lightning.modelcheckpoint.params.{name}: leave it out, checkpoints are kept in "
                "the run's folder"
            )
    check_arguments(ModelCheckpoint, params, "lightning.modelcheckpoint.params")
    if "/" in str(params.get("filename", "")) or ".." in str(params.get("filename", "")):
        raise InputError(
            f"lightning.modelcheckpoint.params.filename {shown(params['filename'])}: must be a "
            "name, without folders"
        )
    kept = {"filename": "{epoch:06}-{step:09}", "save_last": True, **params}
    with blamed_on("lightning.modelcheckpoint"):
        ModelCheckpoint(**kept)
    return kept


def _resumed(
    options: argparse.Namespace, folder: Path, checkpoint: Path | None
) -> tuple[Path, int] | None:
    if not options.resume:
        return None
    if checkpoint is None:
        return newest_checkpoint(folder)
    check_whole(checkpoint)
    return checkpoint, read_checkpoint(checkpoint, is_glance=True)["global_step"]


def _start(config: dict[str, Any], is_new: bool) -> dict[str, Any]:
    """The model's configuration; a run that goes on has the weights that it began with in it."""
    params = pairs(config.get("params"), "model.params")
    kept = {key: value for key, value in params.items() if is_new or key != "ckpt_path"}
    return {**config, "params": kept}


def _known_monitor(monitor: str | None, names: set[str], has_validation: bool) -> str | None:
    """The value by which checkpoints are kept, if it will be logged."""
    if monitor is None or monitor in names:
        return monitor
    if monitor.startswith("val/") and not has_validation:
        logger.info(
            "There are no validation data, so %s is not known: the newest checkpoint is kept.",
            escaped(monitor),
        )
        return None
    raise InputError(f"monitor {shown(monitor)}: choose from {', '.join(sorted(names))}, or null")


def _check_monitors(callbacks: Mapping[str, pl.Callback], names: set[str]) -> None:
    for name, callback in callbacks.items():
        watched = getattr(callback, "monitor", None)
        if watched is not None and watched not in names:
            raise InputError(
                f"lightning.callbacks.{escaped(name)}.params.monitor {shown(watched)}: choose "
                f"from {', '.join(sorted(names))}"
            )


def _check_pictures(training: Any, callbacks: Mapping[str, pl.Callback]) -> None:
    for name, callback in callbacks.items():
        if isinstance(callback, ImageLogger) and hasattr(training, "log_images"):
            place = f"lightning.callbacks.{escaped(name)}.params.log_images_kwargs"
            steps, most = (
                callback.kwargs.get("ddim_steps", 1),
                getattr(training.net, "num_timesteps", 1),
            )
            if isinstance(steps, int) and not 1 <= steps <= most:
                raise InputError(f"{place}.ddim_steps {steps}: allowed is 1 to {most}")
            check_arguments(training.log_images, {"batch": {}, **callback.kwargs}, place)


def learning_rate(config: dict[str, Any], n_batches: int | None) -> float:
    """The base rate, multiplied as upstream does by the pictures of a step.

    Args:
        config: with ``model`` and ``data``.
        n_batches: of a step; None leaves the rate as it is.

    Raises:
        InputError: it is no rate.
    """
    base = config["model"].get("base_learning_rate", 1e-4)
    if isinstance(base, bool) or not isinstance(base, int | float):
        raise InputError(f"model.base_learning_rate {shown(base)}: must be a number")
    batch_size = pairs(config["data"].get("params"), "data.params").get("batch_size", 1)
    factor = 1 if n_batches is None else n_batches * batch_size
    rate = float(base * factor)
    if not 0 < rate < math.inf:
        raise InputError(f"model.base_learning_rate {shown(base)}: times {factor} is no rate")
    return rate


# --- the run ------------------------------------------------------------------------------------


@contextmanager
def _run_folder(folder: Path, is_new: bool) -> Iterator[Path]:
    """The folder of a run, made now if it is new, and removed where no step was done.

    Raises:
        InputError: it cannot be made, or another process trains in it.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield folder
        return
    if not is_new:
        with _alone_in(folder):
            yield folder
        return
    made, number = folder, 1
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                made.mkdir()
                break
            except FileExistsError:
                number += 1
                made = folder.with_name(f"{folder.name}_{number}")
    except OSError as error:
        raise InputError(f"--logdir {escaped(folder.parent)}: {error.strerror}") from None
    try:
        with _alone_in(made):
            yield made
    except BaseException:
        if not any((made / "checkpoints").glob("*.ckpt")):
            shutil.rmtree(made, ignore_errors=True)
        raise


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder: two processes would write their checkpoints over each other's."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise InputError(
                f"--resume {escaped(folder)}: another process trains in this folder; let it end"
            ) from None
        except OSError:  # a disk without locks
            pass
        yield


def _trainer(
    settings: dict[str, Any],
    folder: Path,
    callbacks: Mapping[str, pl.Callback],
    kept: dict[str, Any],
    stop: StopSafely,
    config: dict[str, Any],
    lightning: dict[str, Any],
) -> pl.Trainer:
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    own = {key: value for key, value in config.items() if key != "lightning"}
    _quiet()
    with blamed_on("lightning.trainer"):
        return pl.Trainer(
            default_root_dir=folder,
            logger=CSVLogger(folder, name="metrics"),
            callbacks=[
                SetupCallback(folder, now, own, {"lightning": lightning}),
                Chance(config["seed"]),
                FiniteLoss(),
                *callbacks.values(),
                RunCheckpoints(folder / "checkpoints", enable_version_counter=False, **kept),
                stop,
            ],
            plugins=[WholeCheckpoints()],
            use_distributed_sampler=False,
            **settings,
        )


@contextmanager
def _said(trainer: pl.Trainer, folder: Path, stop: StopSafely) -> Iterator[None]:
    """Turn the ways in which training ends early into one line."""
    try:
        yield
    except Stopped as stopped:
        _end(stopped, trainer, folder)
    except Diverged as error:
        raise Diverged(f"{error}; {_way_on(folder)}") from None
    except InputError as error:
        # a loader's process sends its whole traceback, the last line is the message
        lines = str(error).strip().splitlines()
        raise type(error)(lines[-1].removeprefix("ldm.errors.InputError: ")) from None
    except Exception as error:
        if is_out_of_memory(error) or "killed by signal: Killed" in str(error):
            raise OutOfMemory(LESS_TO_TRAIN) from None
        if fault := disk_fault(error):
            raise cannot_write(folder, fault) from None
        if not stop.has_begun:  # what Lightning finds when it has the data
            with blamed_on("training cannot begin"):
                raise
        raise


def _way_on(folder: Path) -> str:
    try:
        path, step = newest_checkpoint(folder)
    except InputError:
        return "nothing was saved yet; lower model.base_learning_rate"
    return (
        f"{path} holds step {step}: lower model.base_learning_rate or set "
        f"lightning.trainer.gradient_clip_val, and go on with --resume {folder} --train"
    )


def _end(stopped: Stopped, trainer: pl.Trainer, folder: Path) -> NoReturn:
    word, code = word_and_code(stopped.number)
    if stopped.saved is None and not any((folder / "checkpoints").glob("*.ckpt")):
        text = "no step was finished, nothing was saved"
    elif stopped.saved is None:
        text = f"go on with --resume {folder} --train"
    else:
        text = f"saved after step {stopped.saved}; go on with --resume {folder} --train"
    print(f"{word}: {text}", file=sys.stderr, flush=True)
    sys.exit(code)
