"""Rewriting a checkpoint as one flat safetensors file, which cannot carry code and loads lazily."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import keys
from ldm.checkpoint.files import (
    INDEX,
    SPLIT_ID,
    SUFFIXES,
    StateDict,
    open_state_dict,
    stem_of,
)
from ldm.checkpoint.prediction import MARKERS, decide_prediction, record
from ldm.checkpoint.sidecar import neighbouring_config
from ldm.errors import InputError, escaped
from ldm.util import part_of, whole_folder

COMPONENTS = {
    "first_stage": "first_stage_model.",
    "unet": "model.diffusion_model.",
    "text": "cond_stage_model.",
}
"""Names of a split checkpoint's files, and of the tensors in them."""

logger = logging.getLogger(__name__)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    half: bool = False,
    ema: bool = False,
    parameterization: str | None = None,
    force: bool = False,
    split: float | None = None,
) -> Path:
    """Write a checkpoint's tensors, under this project's names, and what is known about it.

    Args:
        source: ``.ckpt``, ``.safetensors`` or a folder of the latter.
        target: a ``.safetensors`` file; by default the source with that suffix.
        half: store weights as float16; the schedule and single numbers, such as the decay of the
            averages, stay as they are, and integers integers.
        ema: the U-Net's running averages take the place of its weights.
        parameterization: what the U-Net predicts (``eps`` or ``v``), to be recorded in the
            metadata; by default what the source states (see ``ldm.checkpoint.prediction``), never
            a guess.
        force: overwrite the target.
        split: make the target a folder with files for each component, of at most so many
            megabytes each; what is not a component's, as the schedule, is left out.

    Returns:
        The file or folder written; each file appears whole or not at all.

    Raises:
        InputError: the source cannot be read, or the target is there already or cannot be written.
    """
    suffix = ".safetensors" if split is None else ""
    if target is None:
        base = Path(source)
        if base.name in ("", ".."):
            base = Path(os.path.abspath(base))
        target = base.parent / (stem_of(base) + suffix)
    target = Path(target)
    _check_target(target, split, force)
    weights = open_state_dict(source)
    shapes = keys.canonical_shapes(weights)
    beside = neighbouring_config(weights.path, shapes)
    prediction = decide_prediction(weights, parameterization, beside)
    if prediction is None and keys.family(shapes) == "sd2":
        logger.warning(
            "%s does not say what it predicts; --parameterization eps or v would record it", source
        )
    metadata = {**record(weights.metadata, prediction), "format": "pt"}
    metadata.pop(SPLIT_ID, None)
    tensors = _tensors(weights, half, ema)
    if prediction is not None and prediction.kind != "v":
        tensors = {name: tensor for name, tensor in tensors.items() if name not in MARKERS}
    if split is None:
        with part_of(target) as part:
            _save(target, tensors, part, metadata)
        return target
    with whole_folder(target) as folder:
        metadata[SPLIT_ID] = _fingerprint(tensors)
        index: dict[str, str] = {}
        for name, own in _parts(tensors, split * 1e6).items():
            file = folder / f"{name}.safetensors"
            _save(target, own, file, metadata)
            index |= dict.fromkeys(own, file.name)
        (folder / INDEX).write_text(json.dumps({"weight_map": index}, indent=0), "utf-8")
    return target


def _check_target(target: Path, split: float | None, force: bool) -> None:
    """Stop before anything is read where the target cannot be written."""
    is_file_name = target.suffix in SUFFIXES  # sd1.5 is none
    if target.suffix != ".safetensors" if split is None else is_file_name:
        kind = ".safetensors file" if split is None else "name for a folder"
        raise InputError(f"{target} is no {kind}")
    if split is not None and not (math.isfinite(split) and split > 0):
        raise InputError(f"--split {split:g}: give the megabytes of a file, above 0")
    if target.exists() and not force:
        raise InputError(f"{target} exists; give --force to overwrite it, or --output another name")
    if target.exists() and target.is_dir() != (split is not None):
        kind = "folder" if target.is_dir() else "file"
        raise InputError(f"{target} is a {kind} already; give --output another name")
    if target.is_dir():
        for file in target.iterdir():
            if file.suffix != ".safetensors" and file.name != INDEX:
                raise InputError(
                    f"{target} holds other files, too ({escaped(file.name)}), and would be "
                    "replaced as a whole; give --output another name"
                )
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {str(target.parent)!r} to write to")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{target} cannot be written: its folder is read-only")


def _tensors(weights: StateDict, half: bool, ema: bool) -> dict[str, Tensor]:
    """What to store: each tensor once, in memory of its own."""
    names = keys.canonical_names(weights)
    if ema:
        if not keys.has_ema(names):
            raise InputError(f"{weights.path} has no EMA weights; leave out --ema")
        averages = {n: keys.ema_name(n) for n in names if n.startswith(keys.UNET)}
        lost = [name for name, average in averages.items() if average not in names]
        if lost:
            raise InputError(
                f"{weights.path} has no average of {len(lost)} U-Net tensors: {lost[0]}, ..."
            )
        names = {n: raw for n, raw in names.items() if not n.startswith("model_ema.")}
        names |= averages
    weights.require_weights(raw for name, raw in names.items() if keys.is_weight(name))
    weights.require_numbers(names.values())
    tensors = {}
    memory = set()
    for name, raw in names.items():
        tensor = weights[raw].contiguous()
        if half and tensor.is_floating_point() and tensor.ndim and name not in keys.SCHEDULE:
            full, tensor = tensor, tensor.to(torch.float16)
            if not bool(torch.isfinite(tensor).all()) and bool(torch.isfinite(full.float()).all()):
                raise InputError(
                    f"{weights.path}: {escaped(name)} has numbers that are too large for half "
                    "precision; leave out --half"
                )
        # safetensors refuses tensors that share memory
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in memory else tensor
        memory.add(address)
    return tensors


def _parts(tensors: dict[str, Tensor], limit: float) -> dict[str, dict[str, Tensor]]:
    """The tensors of each component, in files of at most so many bytes."""
    parts: dict[str, dict[str, Tensor]] = {}
    for component, prefix in COMPONENTS.items():
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if component == "unet":
            own |= {name: tensors[name] for name in MARKERS if name in tensors}
        files: list[dict[str, Tensor]] = []
        room = 0.0
        for name, tensor in own.items():
            if not files or tensor.nbytes > room:
                files.append({})
                room = limit - 1e5  # less the names
            files[-1][name] = tensor
            room -= tensor.nbytes
        for number, file in enumerate(files, 1):
            parts[component if len(files) == 1 else f"{component}-{number}"] = file
    return parts


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    """Tells models apart: from names, shapes and the first numbers of each tensor."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        some = tensor.flatten()[:64].to(torch.float64).tolist()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {some}".encode())
    return found.hexdigest()[:16]


def _save(target: Path, tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, file, metadata)
    except (OSError, SafetensorError) as error:  # a full disk is either of them
        raise InputError(f"{target} cannot be written: {escaped(error)}") from error
