"""The settings of Lightning's trainer: what they may be, and what older versions called them.

Importing this takes no Lightning, so that ``--help`` and complaints come at once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ldm.errors import InputError, escaped, shown

logger = logging.getLogger(__name__)
LESS_TO_TRAIN = (
    "lower data.params.batch_size (lightning.trainer.accumulate_grad_batches makes up for it), "
    "train with --precision bf16-mixed, or train a smaller model"
)


class Key(NamedTuple):
    """One setting: its values in words, and whether a value is one of them."""

    allowed: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(least: int, most: int = 10**9, also: tuple[Any, ...] = ()) -> Key:
    extra = "".join(f", or {'null' if value is None else value}" for value in also)

    def fits(value: Any) -> bool:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return value in also if not is_whole else value in also or least <= value <= most

    return Key(f"a whole number from {least} to {most}{extra}", fits)


def _share(least: float) -> Key:
    def fits(value: Any) -> bool:
        if isinstance(value, float):
            return least < value <= 1 or (least == 0 and value == 0)
        return _is_number(value) and least <= value <= 10**9

    return Key("so many batches, or a share such as 0.5", fits)


def _choice(*values: Any) -> Key:
    texts = ("null" if value is None else str(value).lower() for value in values)
    words = ", ".join(dict.fromkeys(texts))  # 16 and "16" look alike
    kinds = {(type(value), value) for value in values}  # True is not 1

    def fits(value: Any) -> bool:
        return not isinstance(value, list | dict) and (type(value), value) in kinds

    return Key(words, fits)


def _is_devices(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 64 and all(_whole(0, 1023).fits(one) for one in value)
    if isinstance(value, str):
        return value == "auto" or bool(re.fullmatch(r"\d{1,4}(,\d{1,4})*,?", value))
    return _whole(1, 1024, (-1,)).fits(value)


_BOOL = _choice(True, False)
PRECISIONS = {
    16: "16-mixed",
    32: "32-true",
    64: "64-true",
    "16": "16-mixed",
    "32": "32-true",
    "64": "64-true",
    "bf16": "bf16-mixed",
}
TRAINER: dict[str, Key] = {
    "max_steps": _whole(1, also=(-1,)),
    "max_epochs": _whole(1, also=(-1, None)),
    "min_steps": _whole(1, also=(None,)),
    "min_epochs": _whole(1, also=(None,)),
    "max_time": Key(
        "days:hours:minutes:seconds",
        lambda value: (
            value is None
            or (isinstance(value, str) and bool(re.fullmatch(r"\d{1,3}(:\d{1,2}){3}", value)))
        ),
    ),
    "accelerator": _choice("auto", "cpu", "gpu", "cuda", "mps"),
    "devices": Key("how many devices, or which: 2, [0, 1], '0,1', -1 (all) or auto", _is_devices),
    "num_nodes": _whole(1, 4096),
    "strategy": _choice("auto", "ddp", "ddp_find_unused_parameters_true"),
    "precision": _choice(
        "32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true", *PRECISIONS
    ),
    "accumulate_grad_batches": _whole(1, 10**6),
    "gradient_clip_val": Key(
        "a number from 0 to 1e9, or null",
        lambda value: value is None or (_is_number(value) and 0 <= value <= 1e9),
    ),
    "gradient_clip_algorithm": _choice("norm", "value", None),
    "val_check_interval": Key(
        "every so many batches, or a share of an epoch such as 0.5",
        lambda value: (
            value is None or (isinstance(value, float) and 0 < value <= 1) or _whole(1).fits(value)
        ),
    ),
    "check_val_every_n_epoch": _whole(1, also=(None,)),
    "num_sanity_val_steps": _whole(-1, also=(None,)),
    "limit_train_batches": _share(1e-9),
    "limit_val_batches": _share(0),
    "limit_test_batches": _share(0),
    "log_every_n_steps": _whole(1),
    "benchmark": _choice(True, False, None),
    "deterministic": _choice(True, False, "warn", None),
    "detect_anomaly": _BOOL,
    "sync_batchnorm": _BOOL,
    "inference_mode": _BOOL,
    "enable_progress_bar": _BOOL,
    "enable_model_summary": _BOOL,
    "profiler": _choice("simple", "advanced", None),
}
# Of Lightning's versions that upstream's configurations were written for.
OLD_KEYS = ("gpus", "distributed_backend", "weights_summary", "progress_bar_refresh_rate")
# Settings that have no meaning here, and why.
GONE = {
    "terminate_on_nan": "training always stops at a loss that is no number",
    "resume_from_checkpoint": "use --resume FOLDER",
    "default_root_dir": "use --logdir",
    "checkpoint_callback": "checkpoints are always written",
    "enable_checkpointing": "checkpoints are always written",
    "fast_dev_run": "use --max_steps 2",
    "overfit_batches": "use --limit_train_batches",
    "logger": "use lightning.logger",
    "callbacks": "use lightning.callbacks",
    "use_distributed_sampler": "each process has its share of the data",
    "replace_sampler_ddp": "each process has its share of the data",
    **dict.fromkeys(
        (
            *("track_grad_norm", "log_gpu_memory", "flush_logs_every_n_steps", "process_position"),
            *("auto_lr_find", "auto_scale_batch_size", "auto_select_gpus", "amp_backend"),
            *("amp_level", "tpu_cores", "ipus", "plugins", "num_processes"),
            *("prepare_data_per_node", "truncated_bptt_steps", "move_metrics_to_cpu"),
            *("multiple_trainloader_mode", "stochastic_weight_avg"),
            *("reload_dataloaders_every_epoch", "reload_dataloaders_every_n_epochs"),
            "limit_predict_batches",
        ),
        "it does nothing",
    ),
}
_DISTRIBUTED = ("ddp", "ddp2", "ddp_spawn", "dp", "ddp_cpu")


def trainer_settings(
    given: Mapping[str, Any], n_gpus: Callable[[], int], finds_unused: bool = False
) -> dict[str, Any]:
    """The arguments of Lightning's trainer.

    Args:
        given: settings by their names in any version of it.
        n_gpus: how many GPUs there are; asked only where GPUs are wanted.
        finds_unused: upstream's ``lightning.find_unused_parameters``.

    Raises:
        InputError: a name is unknown, or a value is not allowed.
    """
    for name in given.keys() - TRAINER.keys() - set(OLD_KEYS) - GONE.keys():
        raise InputError(f"lightning.trainer has no setting {shown(name)}")
    for name in given.keys() & GONE.keys():
        why = GONE[name]
        logger.info("lightning.trainer.%s has no meaning here and is left out: %s", name, why)
    settings = {name: value for name, value in given.items() if name in TRAINER}
    _old_devices(given, settings, n_gpus)
    if "weights_summary" in given:
        settings.setdefault("enable_model_summary", given["weights_summary"] is not None)
    if "progress_bar_refresh_rate" in given:
        settings.setdefault("enable_progress_bar", given["progress_bar_refresh_rate"] != 0)
    for name, value in settings.items():
        if not TRAINER[name].fits(value):
            raise InputError(
                f"lightning.trainer.{name} {shown(value)}: allowed is {TRAINER[name].allowed}"
            )
    precision = settings.get("precision")
    if precision in PRECISIONS:
        settings["precision"] = PRECISIONS[precision]
    if settings.get("strategy") == "ddp" and finds_unused:
        settings["strategy"] = "ddp_find_unused_parameters_true"
    if settings.get("max_steps", -1) == -1 and settings.get("max_epochs", 1000) == -1:
        settings["max_steps"] = -1  # until it is stopped
    return settings


def _old_devices(
    given: Mapping[str, Any], settings: dict[str, Any], n_gpus: Callable[[], int]
) -> None:
    """Upstream's ``gpus: 0,1`` and ``accelerator: ddp`` in today's words."""
    old = given.get("accelerator"), given.get("distributed_backend")
    is_distributed = any(value in _DISTRIBUTED for value in old)
    if settings.get("accelerator") in _DISTRIBUTED:
        del settings["accelerator"]
    gpus = given.get("gpus")
    if gpus is not None and gpus not in (0, "0"):
        if not _is_devices(gpus):
            raise InputError(f"gpus {shown(gpus)}: allowed is {TRAINER['devices'].allowed}")
        if settings.get("accelerator", "gpu") == "cpu":
            pass  # said so, after all
        elif n_gpus() == 0:
            logger.warning("gpus %s: there is no GPU here, the CPU trains", escaped(gpus))
            settings["accelerator"] = "cpu"
        else:
            settings.setdefault("accelerator", "gpu")
            settings.setdefault("devices", gpus)
    elif gpus is not None:
        settings.setdefault("accelerator", "cpu")
    wanted = settings.get("devices", 1)
    n_devices = len(wanted) if isinstance(wanted, list) else wanted
    if isinstance(n_devices, str):
        n_devices = len([word for word in n_devices.split(",") if word]) if "," in n_devices else 2
    has_several = n_devices not in (1, "1") or settings.get("num_nodes", 1) != 1
    if is_distributed and has_several:
        settings.setdefault("strategy", "ddp")
    if settings.get("accelerator") == "cpu":
        settings.setdefault("devices", 1)
