"""From a checkpoint file to a model: what the file is, which configuration fits, loading it.

``inspect_checkpoint`` reads headers only, so that a program can refuse bad input in a moment;
``load_model`` builds the model without weights and then puts each tensor where it belongs.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import keys
from ldm.checkpoint.files import StateDict, open_state_dict
from ldm.checkpoint.fill import build_without_weights, fill
from ldm.checkpoint.prediction import ZERO_SNR_KEYS, decide_prediction, kind_of
from ldm.checkpoint.sidecar import neighbouring_config, without_training_keys
from ldm.checkpoint.vae import check_scale, find_vae, with_vae
from ldm.config import (
    MODEL_SECTIONS,
    find_config,
    load_config,
    load_yaml,
    model_configs,
    model_defaults,
    shipped,
)
from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import set_attention_backend
from ldm.modules.tome.config import ToMeConfig

UPSTREAM_DEFAULT = "models/ldm/stable-diffusion-v1/model.ckpt"
DEMO = "models/demo"

logger = logging.getLogger(__name__)
ConfigLike = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known about a checkpoint before any weight is read.

    Attributes:
        path: the file or folder.
        family: ``sd1``, ``sd1-inpainting``, ``sd2``, ``sd2-inpainting`` or ``custom``.
        prediction: what the U-Net predicts, ``eps`` or ``v``.
        prediction_source: how that is known, in words.
        zero_snr: its schedule is rescaled so that the last step is noise alone.
        in_channels: input channels of the U-Net; 9 for inpainting.
        has_ema: whether ``ema=True`` can be asked for.
        n_tensors: tensors in the file.
        config: the whole configuration, with the prediction type filled in.
        config_name: where the configuration comes from, for messages.
        vae: the file that the first stage is from, if that is another one.
        can_encode: whether the first stage can encode pictures; without it there is txt2img alone.
        defaults: sizes, steps and the like for this model (see ``ldm.config.model_defaults``).
    """

    path: Path
    family: str
    prediction: str
    prediction_source: str
    zero_snr: bool
    in_channels: int
    has_ema: bool
    n_tensors: int
    config: dict[str, Any]
    config_name: str
    vae: Path | None
    can_encode: bool
    defaults: dict[str, Any]

    def summary(self) -> str:
        """One line for the user."""
        schedule = ", zero terminal SNR" if self.zero_snr else ""
        vae = f"; VAE of {self.vae}" if self.vae else ""
        return (
            f"{self.path}: {self.family}, {self.prediction}-prediction ({self.prediction_source})"
            f"{schedule}, {self.n_tensors} tensors{', with EMA' if self.has_ema else ''}; "
            f"{self.config_name}{vae}"
        )


def default_checkpoint() -> tuple[Path, str | None]:
    """The checkpoint for a command without ``--ckpt``, and a line to print about it.

    Upstream's default path, if a file is there (below the working folder or the project), else
    the demo model that ships with the project.

    Raises:
        InputError: there is neither.
    """
    for path in (Path(UPSTREAM_DEFAULT), shipped(UPSTREAM_DEFAULT)):
        if path.is_file():
            return path, None
    demo = shipped(DEMO)
    if not any(demo.glob("*.safetensors")):
        raise InputError(f"there is no checkpoint at {UPSTREAM_DEFAULT}: give one with --ckpt")
    note = (
        f"No --ckpt given and no {UPSTREAM_DEFAULT}: using the demo model, which paints small "
        "landscapes only."
    )
    return demo, note


def stored_shapes(path: str | os.PathLike[str]) -> dict[str, keys.Shape]:
    """Shapes of a checkpoint's tensors, by the names that our models give to them.

    Raises:
        InputError: there is nothing to load.
    """
    return keys.canonical_shapes(open_state_dict(path))


def inspect_checkpoint(
    path: str | os.PathLike[str],
    config: ConfigLike | None = None,
    parameterization: str | None = None,
    ema: bool = False,
    vae: str | os.PathLike[str] | None = None,
) -> CheckpointInfo:
    """Find out what a checkpoint is and settle how to load it, from names and shapes alone.

    Args:
        path: ``.ckpt``, ``.safetensors``, or a folder of ``.safetensors`` that make one model.
        config: a YAML file or its content; None: a YAML of the same name beside the file, or the
            one that its training run stored, else the shipped configuration that fits.
        parameterization: ``eps`` or ``v``; None: see ``ldm.checkpoint.prediction``.
        ema: the running averages are wanted.
        vae: a file whose first stage takes the place of the checkpoint's; None:
            NAME.vae.safetensors (.pt, .ckpt) beside the checkpoint, if there is one.

    Raises:
        InputError: the file cannot be used, or what it is cannot be told; the message says why
            and what to do.
    """
    return _inspect(*_open(path, vae), config, parameterization, ema)


def load_model(
    ckpt: str | os.PathLike[str],
    config: ConfigLike | None = None,
    parameterization: str | None = None,
    ema: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    tome: ToMeConfig | Mapping[str, Any] | None = None,
    attention: str = "sdpa",
    vae: str | os.PathLike[str] | None = None,
    info: CheckpointInfo | None = None,
) -> LatentDiffusion:
    """Load a checkpoint as a model that is ready to sample.

    Args:
        ckpt, config, parameterization, ema, vae: see ``inspect_checkpoint``.
        dtype: of the weights; the schedule stays float32. In half precision the U-Net's
            convolutions have channels last, except on MPS.
        device: where the model goes.
        tome: Token Merging settings instead of the configuration's; None leaves those.
        attention: ``sdpa`` or ``einsum``.
        info: what ``inspect_checkpoint`` said for the same arguments, so that it is not said twice.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        InputError: as for ``inspect_checkpoint``; or the tensors do not fill the model.
    """
    weights, vae_file = _open(ckpt, vae)
    info = info or _inspect(weights, vae_file, config, parameterization, ema)
    model = build_without_weights(info.config, info.config_name, limit=len(weights))
    fill(model, weights, info.config, info.config_name, ema, dtype, device, vae_file)
    model.to(device).eval().requires_grad_(False)
    set_attention_backend(model, attention)
    if tome is not None:
        settings = tome if isinstance(tome, ToMeConfig) else ToMeConfig.from_mapping(tome)
        model.model.diffusion_model.tome.configure(settings)
    return model


# --- what it is -------------------------------------------------------------------------------


def _open(
    path: str | os.PathLike[str], vae: str | os.PathLike[str] | None
) -> tuple[StateDict, Path | None]:
    """A checkpoint's tensors, with those of the VAE that was given or lies beside it; and that."""
    weights = open_state_dict(path)
    file = find_vae(weights.path) if vae is None else Path(vae)
    return (weights, None) if file is None else (with_vae(weights, open_state_dict(file)), file)


def _inspect(
    weights: StateDict,
    vae: Path | None,
    config: ConfigLike | None,
    parameterization: str | None,
    ema: bool,
) -> CheckpointInfo:
    """See ``inspect_checkpoint``."""
    path = weights.path
    names = keys.canonical_names(weights)
    shapes = {name: weights.entries[raw].shape for name, raw in names.items()}
    keys.refuse_other_families(shapes, str(path))
    _require_components(shapes, path)
    weights.require_weights(raw for name, raw in names.items() if keys.is_weight(name))
    if ema and not keys.has_ema(shapes):
        raise InputError(f"{path} has no EMA weights to use; leave out the EMA option")

    shipped_fits = {
        str(file): whole
        for file, whole in ((file, load_config(file)) for file in model_configs())
        if keys.misfit(whole, shapes) is None
    }
    given = None if config is None else _given_config(config)
    beside = None if given else neighbouring_config(path, shapes)
    chosen = given or beside
    if chosen is not None:
        if reason := keys.misfit(chosen[1], shapes):
            advice = " or ".join(shipped_fits) or "no shipped configuration"
            raise InputError(f"{chosen[0]} does not fit {path}: {reason}; {advice} fits")
    elif not shipped_fits:
        raise InputError(
            f"no shipped configuration fits {path}, whose U-Net has {keys.input_channels(shapes)} "
            f"input channels and context size {keys.context_size(shapes)}: give its own one with "
            "--config"
        )
    candidates = dict([chosen]) if chosen else shipped_fits
    prediction = decide_prediction(weights, parameterization, beside, given, candidates)
    if prediction is None:
        raise InputError(
            f"{path} is a Stable Diffusion 2 model that predicts either noise (512 models) or v "
            "(768 models), and nothing in it says which: give --parameterization eps or v"
        )
    alike = [n for n, whole in candidates.items() if kind_of(whole) == prediction.kind]
    name = (alike or list(candidates))[0]
    whole = candidates[name]
    relatives = [one for one in shipped_fits.values() if kind_of(one) == prediction.kind]
    params = whole["model"]["params"]
    params = {key: value for key, value in params.items() if key not in ZERO_SNR_KEYS}
    params["parameterization"] = prediction.kind
    if prediction.zero_snr:
        params["zero_snr"] = True
    whole = {**whole, "model": {**whole["model"], "params": params}}
    scale = params.get("scale_factor")
    if vae is not None and isinstance(scale, float) and not params.get("scale_by_std"):
        check_scale(vae, scale)
    return CheckpointInfo(
        path=path,
        family=keys.family(shapes),
        prediction=prediction.kind,
        prediction_source=prediction.source,
        zero_snr=prediction.zero_snr,
        in_channels=keys.input_channels(shapes) or 0,
        has_ema=keys.has_ema(shapes),
        n_tensors=len(weights),
        config=whole,
        config_name=name,
        vae=vae,
        can_encode=keys.has_encoder(shapes),
        defaults=_defaults(whole, (relatives or [whole])[0]),
    )


def _defaults(whole: dict[str, Any], relative: dict[str, Any]) -> dict[str, Any]:
    """A configuration's own defaults; where it has none, those of the shipped one of its kind."""
    own = model_defaults(whole)
    return {**model_defaults(relative), **{name: own[name] for name in whole.get("defaults") or {}}}


def _require_components(shapes: Mapping[str, keys.Shape], path: Path) -> None:
    """Stop where a whole part of the model is not in the file."""
    missing = [
        f"{what} ({prefix}*)"
        for prefix, what in keys.COMPONENTS.items()
        if not any(name.startswith(prefix) for name in shapes)
    ]
    if len(missing) == len(keys.COMPONENTS):
        raise InputError(f"{path} is no Stable Diffusion checkpoint: it has no {missing[0]}")
    if missing:
        is_vae = len(missing) == 1 and keys.FIRST_STAGE in missing[0]
        hint = "give one with --vae" if is_vae else "a full checkpoint is needed"
        raise InputError(f"{path} has no {' and no '.join(missing)}; {hint}")


def _given_config(config: ConfigLike) -> tuple[str, dict[str, Any]]:
    """Name and content of the configuration that the user gave."""
    if isinstance(config, Mapping):
        name, whole = "the given configuration", copy.deepcopy(dict(config))
    else:
        name, whole = str(config), load_yaml(find_config(config), MODEL_SECTIONS)
    return name, without_training_keys(whole, name)
