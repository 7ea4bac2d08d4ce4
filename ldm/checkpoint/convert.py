"""Rewriting a checkpoint as one flat safetensors file, which cannot carry code and loads lazily."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import keys
from ldm.checkpoint.files import StateDict, open_state_dict
from ldm.errors import InputError

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
        half: store weights as float16; the schedule stays float32, and integers integers.
        ema: the U-Net's running averages take the place of its weights.
        parameterization: what the U-Net predicts (``eps`` or ``v``), to be recorded in the
            metadata; by default as the metadata or name of the source say.
        force: overwrite the target.
        split: make the target a folder with files for each component, of at most so many
            megabytes each; what is not a component's, as the schedule, is left out.

    Returns:
        The file or folder written; each file appears whole or not at all.

    Raises:
        InputError: the source cannot be read, or the target is there already or cannot be written.
    """
    suffix = ".safetensors" if split is None else ""
    target = Path(source).with_suffix(suffix) if target is None else Path(target)
    if target.suffix != suffix:
        kind = ".safetensors file" if split is None else "name for a folder"
        raise InputError(f"{target} is no {kind}")
    if target.exists() and not force:
        raise InputError(f"{target} exists; give --force to overwrite it, or --output another name")
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {str(target.parent)!r} to write to")
    weights = open_state_dict(source)
    metadata = {**weights.metadata, "format": "pt"}
    if prediction := parameterization or _prediction(weights):
        metadata["modelspec.prediction_type"] = "v" if prediction == "v" else "epsilon"
    tensors = _tensors(weights, half, ema)
    if split is None:
        _write(target, tensors, metadata)
        return target
    target.mkdir(exist_ok=True)
    for name, part in _parts(tensors, split * 1e6).items():
        _write(target / f"{name}.safetensors", part, metadata)
    return target


def _prediction(weights: StateDict) -> str | None:
    """``eps`` or ``v``; None, with a warning, where a Stable Diffusion 2 file does not say."""
    family = keys.family({keys.canonical_name(n): e.shape for n, e in weights.entries.items()})
    if stated := keys.prediction_in_metadata(weights.metadata):
        return stated
    if family != "sd2":
        return None if family == "custom" else "eps"
    hinted = keys.prediction_in_name(weights.path.stem)
    if hinted is None:
        logger.warning(
            "%s does not say what it predicts; --parameterization eps or v would record it",
            weights.path,
        )
    return hinted


def _tensors(weights: StateDict, half: bool, ema: bool) -> dict[str, Tensor]:
    """What to store: each tensor once, in memory of its own."""
    names = {keys.canonical_name(name): name for name in weights}
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
    tensors = {}
    memory = set()
    for name, raw in names.items():
        tensor = weights[raw].contiguous()
        if half and tensor.is_floating_point() and name not in keys.SCHEDULE:
            tensor = tensor.to(torch.float16)
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


def _write(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, partial, metadata)
        partial.replace(target)
    except (OSError, SafetensorError) as error:  # a full disk is either of them
        raise InputError(f"{target} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
