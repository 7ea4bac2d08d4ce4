"""Configurations that lie beside a checkpoint, or that its training run stored: values, no targets.

A file that came with a download must not choose what is built. Each section of it describes a
class that is known beforehand; what that class does not take belongs to training, and is left out.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.files import stem_of
from ldm.checkpoint.keys import TEXT_ENCODER, Shape
from ldm.checkpoint.prediction import ZERO_SNR_KEYS
from ldm.config import MODEL_SECTIONS, load_yaml
from ldm.errors import InputError, escaped
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import INERT_ARGUMENTS, LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from ldm.util import get_obj_from_str

logger = logging.getLogger(__name__)

# What a whole configuration has; scripts/train.py reads some of it.
SECTIONS = {"model", "data", "lightning", "defaults", "shared", "seed"}
# What forks of the training program keep in model.params, and no picture needs.
TRAINING_KEYS = {
    *("personalization_config", "embedding_reg_weight", "unfreeze_model", "unfreeze_unet"),
    *("model_lr", "embedding_lr", "reg_weight", "freeze_model", "add_token", "modifier_token"),
    *("initializer_words", "progressive_words", "placeholder_strings", "num_vectors_per_token"),
}


def neighbouring_config(
    path: Path, shapes: Mapping[str, Shape]
) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the configuration that belongs to a file, if there is one.

    Args:
        path: the checkpoint.
        shapes: of its tensors: they say which text encoder it is.

    Raises:
        InputError: it cannot be read.
    """
    found = config_beside(path)
    if found is None:
        return None
    config = load_yaml(found, MODEL_SECTIONS)
    if not isinstance(config.get("model"), Mapping) and found.parent == path.parent:
        raise InputError(
            f"{found} has no section model, and is taken for the configuration of {path.name}, "
            "beside which it lies under its name: rename one of the two"
        )
    return str(found), _values(config, str(found), shapes)


def config_beside(path: Path) -> Path | None:
    """The file of a checkpoint's configuration, if there is one."""
    return next(filter(None, map(_beside, (path, path.resolve()))), None)  # links lead home


def _beside(path: Path) -> Path | None:
    """NAME.yaml beside a file; or what scripts/train.py stored for it: logs/RUN/configs/..."""
    named = [path.parent / (stem_of(path) + ending) for ending in (".yaml", ".yml")]
    runs = [folder.parent for folder in path.parents[:2] if folder.name == "checkpoints"]
    stored = [file for run in runs for file in run.glob("configs/*-project.yaml")]
    return next((file for file in named if file.is_file()), max(stored, default=None))


def without_training_keys(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration less what only training needs, with a line that says so.

    The line also names what stands where nothing reads it.
    """
    params = _section(config, "model")
    left_out = sorted(set(params) & TRAINING_KEYS)
    _say([*left_out, *_misplaced(config)], name)
    kept = {key: value for key, value in params.items() if key not in left_out}
    model = config.get("model")
    return {**config, "model": {**model, "params": kept}} if isinstance(model, Mapping) else {}


def _values(config: Mapping[str, Any], name: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The sections of a model, each for the class that belongs there, with what it takes."""
    is_open_clip = any(key.startswith(f"{TEXT_ENCODER}model.") for key in shapes)
    text: list[type] = [FrozenOpenCLIPEmbedder, FrozenCLIPEmbedder]
    model = _section(config, "model")
    dropped: list[str] = []

    def section(holder: Mapping[str, Any], key: str, classes: list[type]) -> dict[str, Any]:
        own = holder.get(key)
        if not isinstance(own, Mapping):
            raise InputError(f"{name} is no configuration of a latent-diffusion model: no {key}")
        cls = classes[0]
        if "target" in own:
            try:
                named = get_obj_from_str(own["target"])
            except InputError:
                named = None
            if named in classes:
                cls = named
            else:
                dropped.append(f"{key}.target")
        known = set(inspect.signature(cls).parameters) | set(ZERO_SNR_KEYS)
        known |= set(INERT_ARGUMENTS) if cls is LatentDiffusion else set()
        params = _section(holder, key)
        dropped.extend(sorted(set(params) - known))
        kept = {key: value for key, value in params.items() if key in known}
        return {"target": f"{cls.__module__}.{cls.__name__}", "params": kept}

    whole = section(config, "model", [LatentDiffusion])
    whole["params"] |= {
        "unet_config": section(model, "unet_config", [UNetModel]),
        "first_stage_config": section(model, "first_stage_config", [AutoencoderKL]),
        "cond_stage_config": section(
            model, "cond_stage_config", text if is_open_clip else text[::-1]
        ),
    }
    whole["params"].pop("scheduler_config", None)
    _say([*dropped, *_misplaced(config)], name)
    defaults = config.get("defaults")
    return {"model": whole, "defaults": dict(defaults) if isinstance(defaults, Mapping) else {}}


def _misplaced(config: Mapping[str, Any]) -> list[str]:
    """Keys at the top that are no section, and those beside the target and params of a model."""

    def beside(node: Mapping[str, Any], place: str) -> Iterator[str]:
        for key, value in node.items():
            if "target" in node and key not in ("target", "params", "base_learning_rate"):
                yield place + key
            elif isinstance(value, Mapping):
                yield from beside(value, f"{place}{key}.")

    model = config.get("model")
    strange = beside(model, "model.") if isinstance(model, Mapping) else ()
    return [*(key for key in config if key not in SECTIONS), *strange]


def _section(holder: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = holder.get(key)
    params = section.get("params") if isinstance(section, Mapping) else None
    return params if isinstance(params, Mapping) else {}


def _say(left_out: list[str], name: str) -> None:
    if left_out:
        logger.warning(
            "%s: not needed for drawing, and left out: %s", name, escaped(", ".join(left_out), 300)
        )
