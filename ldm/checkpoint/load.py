"""From a checkpoint file to a model: what the file is, which configuration fits, loading it.

``inspect_checkpoint`` reads headers only, so that a program can refuse bad input in a moment;
``load_model`` builds the model without weights and then puts each tensor where it belongs.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import keys
from ldm.checkpoint.files import StateDict, open_state_dict
from ldm.config import load_config, model_configs, model_defaults, shipped
from ldm.device import memory_format
from ldm.errors import InputError
from ldm.modules.attention import set_attention_backend
from ldm.modules.tome.config import ToMeConfig
from ldm.util import instantiate_from_config

if TYPE_CHECKING:  # Lightning takes seconds to import, and looking at a file needs none of it
    from ldm.models.diffusion.ddpm import LatentDiffusion

UPSTREAM_DEFAULT = "models/ldm/stable-diffusion-v1/model.ckpt"
DEMO = "models/demo"
PARAMETERIZATIONS = ("eps", "x0", "v")

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
        in_channels: input channels of the U-Net; 9 for inpainting.
        has_ema: whether ``ema=True`` can be asked for.
        n_tensors: tensors in the file.
        config: the whole configuration, with the prediction type filled in.
        config_name: where the configuration comes from, for messages.
        defaults: sizes, steps and the like for this model (see ``ldm.config.model_defaults``).
    """

    path: Path
    family: str
    prediction: str
    prediction_source: str
    in_channels: int
    has_ema: bool
    n_tensors: int
    config: dict[str, Any]
    config_name: str
    defaults: dict[str, Any]

    def summary(self) -> str:
        """One line for the user."""
        return (
            f"{self.path}: {self.family}, {self.prediction}-prediction ({self.prediction_source}), "
            f"{self.n_tensors} tensors{', with EMA' if self.has_ema else ''}; {self.config_name}"
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


def state_dict_of(path: str | os.PathLike[str]) -> StateDict:
    """All tensors of a checkpoint under the file's own names, each read when asked for.

    Raises:
        InputError: there is nothing to load.
    """
    return open_state_dict(path)


def stored_shapes(path: str | os.PathLike[str]) -> dict[str, keys.Shape]:
    """Shapes of a checkpoint's tensors, by the names that our models give to them.

    Raises:
        InputError: there is nothing to load.
    """
    weights = open_state_dict(path)
    names = _canonical_names(weights)
    return {name: weights.entries[raw].shape for name, raw in names.items()}


def inspect_checkpoint(
    path: str | os.PathLike[str],
    config: ConfigLike | None = None,
    parameterization: str | None = None,
    ema: bool = False,
) -> CheckpointInfo:
    """Find out what a checkpoint is and settle how to load it, from names and shapes alone.

    Args:
        path: ``.ckpt``, ``.safetensors``, or a folder of ``.safetensors`` that make one model.
        config: a YAML file or its content; None: a YAML of the same name beside the file, or the
            one that its training run stored, else the shipped configuration that fits.
        parameterization: ``eps`` or ``v``; None: as the file's metadata, the given or neighbouring
            configuration, or the file's name says.
        ema: the running averages are wanted.

    Raises:
        InputError: the file cannot be used, or what it is cannot be told; the message says why
            and what to do.
    """
    return _inspect(open_state_dict(path), config, parameterization, ema)


def load_model(
    ckpt: str | os.PathLike[str],
    config: ConfigLike | None = None,
    parameterization: str | None = None,
    ema: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    tome: ToMeConfig | Mapping[str, Any] | None = None,
    attention: str = "sdpa",
) -> LatentDiffusion:
    """Load a checkpoint as a model that is ready to sample.

    Args:
        ckpt, config, parameterization, ema: see ``inspect_checkpoint``.
        dtype: of the weights; the schedule stays float32. In half precision the U-Net's
            convolutions have channels last, except on MPS.
        device: where the model goes.
        tome: Token Merging settings instead of the configuration's; None leaves those.
        attention: ``sdpa`` or ``einsum``.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        InputError: as for ``inspect_checkpoint``; or the tensors do not fill the model.
    """
    weights = open_state_dict(ckpt)
    info = _inspect(weights, config, parameterization, ema)
    model = _build_without_weights(info)
    _fill(model, weights, info, ema, dtype, device)
    model.to(device).eval().requires_grad_(False)
    set_attention_backend(model, attention)
    if tome is not None:
        settings = tome if isinstance(tome, ToMeConfig) else ToMeConfig.from_mapping(tome)
        model.model.diffusion_model.tome.configure(settings)
    return model


# --- what it is -------------------------------------------------------------------------------


def _canonical_names(weights: StateDict) -> dict[str, str]:
    """Name in our models -> name in the file; a tensor that needs no renaming wins."""
    renamed = {keys.canonical_name(name): name for name in weights}
    return renamed | {name: name for name in weights if name in renamed}


def _inspect(
    weights: StateDict, config: ConfigLike | None, parameterization: str | None, ema: bool
) -> CheckpointInfo:
    """See ``inspect_checkpoint``."""
    path = weights.path
    if parameterization not in (None, *PARAMETERIZATIONS):
        known = ", ".join(PARAMETERIZATIONS)
        raise InputError(f"parameterization {parameterization!r} is none of {known}")
    names = _canonical_names(weights)
    shapes = {name: weights.entries[raw].shape for name, raw in names.items()}
    keys.refuse_other_families(shapes, str(path))
    _require_components(shapes, path)
    if ema and not keys.has_ema(shapes):
        raise InputError(f"{path} has no EMA weights to use; leave out the EMA option")

    shipped_fits = [
        (str(file), whole)
        for file, whole in ((file, load_config(file)) for file in model_configs())
        if keys.misfit(whole, shapes) is None
    ]
    if config is None:
        config = _neighbouring_config(path)
    if config is not None:
        candidates = [_chosen_config(config, shapes, path, [name for name, _ in shipped_fits])]
    elif shipped_fits:
        candidates = shipped_fits
    else:
        raise InputError(
            f"no shipped configuration fits {path}, whose U-Net has {keys.input_channels(shapes)} "
            f"input channels and context size {keys.context_size(shapes)}: give its own one with "
            "--config"
        )
    prediction, source = parameterization, "as asked for"
    if prediction is None:
        prediction, source = _deduce_prediction(weights, candidates, is_chosen=config is not None)

    def predicts_alike(candidate: tuple[str, dict[str, Any]]) -> bool:
        return _prediction_of(candidate[1]) == prediction

    name, whole = next(filter(predicts_alike, candidates), candidates[0])
    _, relative = next(filter(predicts_alike, shipped_fits), (name, whole))
    whole["model"]["params"]["parameterization"] = prediction
    return CheckpointInfo(
        path=path,
        family=keys.family(shapes),
        prediction=prediction,
        prediction_source=source,
        in_channels=keys.input_channels(shapes) or 0,
        has_ema=keys.has_ema(shapes),
        n_tensors=len(weights),
        config=whole,
        config_name=name,
        defaults={**model_defaults(relative), **(whole.get("defaults") or {})},
    )


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
        raise InputError(f"{path} has no {' and no '.join(missing)}; a full checkpoint is needed")


def _neighbouring_config(path: Path) -> Path | None:
    """A configuration that was put beside the file, or that its training run stored."""
    sidecar = path.with_suffix(".yaml")
    if sidecar.is_file():
        return sidecar
    # scripts/train.py writes logs/RUN/checkpoints/last.ckpt and logs/RUN/configs/TIME-project.yaml
    if path.parent.name == "checkpoints":
        return max(path.parent.parent.glob("configs/*-project.yaml"), default=None)
    return None


def _chosen_config(
    config: ConfigLike, shapes: Mapping[str, keys.Shape], path: Path, fitting: list[str]
) -> tuple[str, dict[str, Any]]:
    """The configuration that was given or lies beside the file, if it fits the tensors."""
    if isinstance(config, Mapping):
        name, whole = "the given configuration", copy.deepcopy(dict(config))
    else:
        name, whole = str(config), load_config(config)
    if reason := keys.misfit(whole, shapes):
        advice = " or ".join(fitting) or "no shipped configuration"
        raise InputError(f"{name} does not fit {path}: {reason}; {advice} fits")
    return name, whole


def _prediction_of(config: Mapping[str, Any]) -> str:
    """What the U-Net of a configuration predicts; upstream's default is eps."""
    return config["model"]["params"].get("parameterization", "eps")


def _deduce_prediction(
    weights: StateDict, candidates: list[tuple[str, dict[str, Any]]], is_chosen: bool
) -> tuple[str, str]:
    """``eps`` or ``v``, and how we know; shapes cannot tell.

    The order: the file's metadata, the configuration if there is no choice, the file's name.
    """
    path = weights.path
    said = {_prediction_of(whole) for _, whole in candidates}
    stated = keys.prediction_in_metadata(weights.metadata)
    if stated and is_chosen and stated not in said:
        raise InputError(
            f"{candidates[0][0]} says {said.pop()}-prediction, but the metadata of {path} say "
            f"{stated}: give --parameterization to decide"
        )
    if stated:
        return stated, "by its metadata"
    if len(said) == 1:
        return said.pop(), "by its configuration"
    if hinted := keys.prediction_in_name(path.stem):
        return hinted, "by its name"
    raise InputError(
        f"{path} is a Stable Diffusion 2 model that predicts either noise (512 models) or v (768 "
        "models), and nothing in it says which: give --parameterization eps or v"
    )


# --- loading ----------------------------------------------------------------------------------


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside get parameters without memory, and draw no random numbers for them.

    Buffers are real: masks and schedules are computed from the configuration as always, which
    building under ``torch.device("meta")`` would prevent.
    """

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hooks: Any = nn.modules.module  # annotated as if a hook returned nothing
    handle = hooks.register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _build_without_weights(info: CheckpointInfo) -> LatentDiffusion:
    """The configured model for inference: no EMA copy, no training loss, no file loaded by it."""
    config = copy.deepcopy(info.config["model"])
    params = config["params"]
    params["use_ema"] = False
    params["first_stage_config"]["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    for section in (params, params["first_stage_config"]["params"]):
        for key in ("ckpt_path", "ignore_keys"):
            section.pop(key, None)
    try:
        with _parameters_on_meta():
            return instantiate_from_config(config)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"no model can be built from {info.config_name}: {reason}") from error


def _fill(
    model: nn.Module,
    weights: StateDict,
    info: CheckpointInfo,
    ema: bool,
    dtype: torch.dtype,
    device: str | torch.device,
) -> None:
    """Put each tensor of the file where it belongs; refuse what does not fill the model.

    Raises:
        InputError: tensors are missing or have other shapes, or the U-Net has others besides.
    """
    names = _canonical_names(weights)
    places = {n: t for n, t in model.state_dict().items() if n not in keys.SCHEDULE}
    idle = keys.idle_text_names(places, info.config["model"]["params"]["cond_stage_config"])
    sources = {  # name in the model -> name in the file
        name: names[stored]
        for name in places
        for stored in [keys.ema_name(name) if ema and name.startswith(keys.UNET) else name]
        if stored in names
    }
    _refuse_missing(sorted(set(places) - set(sources) - idle), info)
    wrong = [n for n, raw in sources.items() if weights.entries[raw].shape != places[n].shape]
    if wrong:
        found, wanted = weights.entries[sources[wrong[0]]].shape, tuple(places[wrong[0]].shape)
        raise InputError(
            f"{info.path} does not fit {info.config_name}: other shapes in {_list(wrong)}; the "
            f"first is {found}, not {wanted}"
        )
    _report_unused(set(names) - set(sources) - set(places), info)

    unet_format = memory_format(dtype, torch.device(device))

    def load(name: str, place: Tensor) -> Tensor:
        if name not in sources:  # stored by most files, used by no computation
            return torch.zeros(place.shape, dtype=dtype, device=device)
        # Converting the loaded model's layout instead would leave the process with 0.6 GB of memory
        # in pieces that it cannot give back.
        is_unet_map = name.startswith(keys.UNET) and place.ndim == 4
        # A copy, as a mapped tensor changes with its file, and its alignment changes last bits.
        return weights[sources[name]].to(
            device=device,
            dtype=dtype if place.is_meta else place.dtype,  # buffers keep their type
            copy=True,
            memory_format=unet_format if is_unet_map else torch.contiguous_format,
        )

    # read, cast and moved one by one: besides the model there is one tensor in memory
    tensors = {name: load(name, place) for name, place in places.items()}
    model.load_state_dict(tensors, strict=False, assign=True)


def _list(names: list[str]) -> str:
    """How many tensors, and the first names of them."""
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({first})"


def _refuse_missing(names: list[str], info: CheckpointInfo) -> None:
    if names:
        raise InputError(f"{info.path} lacks {_list(names)}, needed by {info.config_name}")


def _report_unused(names: set[str], info: CheckpointInfo) -> None:
    """Warn of tensors without a place; in the U-Net they mean another architecture."""
    unknown = sorted(name for name in names if not keys.is_harmless(name))
    if not unknown:
        return
    what = f"{info.path} has {_list(unknown)} without a place in {info.config_name}"
    if any(name.startswith(keys.UNET) for name in unknown):
        raise InputError(what)
    logger.warning("%s; they are ignored", what)
