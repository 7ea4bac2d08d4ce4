"""Building a model without weights, and putting each tensor of a file where it belongs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoint import keys
from ldm.checkpoint.files import StateDict
from ldm.device import memory_format
from ldm.errors import InputError, escaped, shown
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import TextEncoder
from ldm.util import instantiate_from_config

MAX_TIMESTEPS = 10_000
OTHER_SCHEDULE = 0.01  # difference of alpha_bar beyond what half precision does to it
logger = logging.getLogger(__name__)


@contextmanager
def _parameters_on_meta(limit: int) -> Iterator[None]:
    """Modules built inside get parameters without memory, and draw no random numbers for them.

    Buffers are real: masks and schedules are computed from the configuration as always, which
    building under ``torch.device("meta")`` would prevent.

    Args:
        limit: the most parameters that there may be.
    """
    count = 0

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        nonlocal count
        count += 1
        if count > limit:
            raise InputError("it describes a model of many more tensors than the file has")
        if parameter is None:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hooks: Any = nn.modules.module  # annotated as if a hook returned nothing
    handle = hooks.register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


def build_without_weights(config: Mapping[str, Any], name: str, limit: int) -> LatentDiffusion:
    """The configured model for inference: no EMA copy, no training loss, no file loaded by it.

    Args:
        config: a whole YAML file.
        name: of the file, for messages.
        limit: about how many tensors there are to fill it.

    Raises:
        InputError: nothing can be built from it.
    """
    model = copy.deepcopy(config["model"])
    params = model["params"]
    params["use_ema"] = False
    stage = params["first_stage_config"]
    stage["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    for section in (params, stage["params"]):
        for key in ("ckpt_path", "ignore_keys", "scheduler_config"):
            section.pop(key, None)
    try:
        steps = params.get("timesteps", 1000)
        if not (isinstance(steps, int) and 1 <= steps <= MAX_TIMESTEPS):
            raise InputError(f"timesteps must be 1 to {MAX_TIMESTEPS}")
        with _parameters_on_meta(limit * 4 + 10_000), np.errstate(all="ignore"):
            built = instantiate_from_config(model, LatentDiffusion)
        _require_sense(built, params)
        return built
    except (
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AssertionError,
        RuntimeError,
    ) as error:
        reason = escaped(" ".join(str(error).split()), 300)
        raise InputError(f"no model can be built from {name}: {reason}") from error


def _require_sense(model: LatentDiffusion, params: Mapping[str, Any]) -> None:
    """Stop at values with which a model can be built, but nothing be drawn.

    Raises:
        InputError: one has no meaning.
    """
    parts = [
        ("unet_config", model.model.diffusion_model, UNetModel),
        ("first_stage_config", model.first_stage_model, AutoencoderKL),
        ("cond_stage_config", model.cond_stage_model, TextEncoder),
    ]
    for key, part, kind in parts:
        if not isinstance(part, kind):
            raise InputError(f"{key}: {type(part).__name__} is no {kind.__name__}")
    unet = params["unet_config"]["params"]
    has_more = unet["in_channels"] != params["channels"]
    if has_more != (model.model.conditioning_key in ("concat", "hybrid")):
        raise InputError(
            f"conditioning_key {shown(model.model.conditioning_key)} does not go with "
            f"{unet['in_channels']} input channels"
        )


def fill(
    model: LatentDiffusion,
    weights: StateDict,
    config: Mapping[str, Any],
    config_name: str,
    ema: bool,
    dtype: torch.dtype,
    device: str | torch.device,
    vae: Path | None = None,
) -> None:
    """Put each tensor of the file where it belongs; refuse what does not fill the model.

    Args:
        model: built without weights.
        weights: of the whole model.
        config: the model's.
        config_name: for messages.
        ema: take the U-Net's averaged weights.
        dtype: of the weights.
        device: where they go.
        vae: the file that the first stage's weights are from, if that is another one.

    Raises:
        InputError: tensors are missing or have other shapes, or the U-Net has others besides.
    """
    path = weights.path

    def home(name: str) -> Path:
        return vae if vae and name.startswith(keys.FIRST_STAGE) else path

    names = keys.canonical_names(weights)
    if not keys.has_encoder(names):
        _leave_out_the_encoder(model, vae or path)
    places = {n: t for n, t in model.state_dict().items() if n not in keys.SCHEDULE}
    idle = keys.idle_text_names(places, config["model"]["params"]["cond_stage_config"])
    sources = {  # name in the model -> name in the file
        name: names[stored]
        for name in places
        for stored in [keys.ema_name(name) if ema and name.startswith(keys.UNET) else name]
        if stored in names
    }
    missing = sorted(set(places) - set(sources) - idle)
    if missing:
        raise InputError(f"{home(missing[0])} lacks {_list(missing)}, needed by {config_name}")
    wrong = [
        name
        for name, raw in sources.items()
        if not _fits(name, weights.entries[raw].shape, tuple(places[name].shape))
    ]
    if wrong:
        found, wanted = weights.entries[sources[wrong[0]]].shape, tuple(places[wrong[0]].shape)
        raise InputError(
            f"{home(wrong[0])} does not fit {config_name}: other shapes in {_list(wrong)}; the "
            f"first is {found}, not {wanted}"
        )
    weights.require_weights(sources.values())
    _report_unused(set(names) - set(sources) - set(places), path, config_name)
    _report_schedule(model, weights, names, config_name)

    unet_format = memory_format(dtype, torch.device(device))

    def load(name: str, place: Tensor) -> Tensor:
        if name not in sources:  # stored by most files, used by no computation
            return torch.zeros(place.shape, dtype=dtype, device=device)
        tensor = weights[sources[name]]
        if name.endswith(keys.TOKENS) and len(tensor) > len(place):
            logger.info(
                "%s has %d tokens of its own training's after the usual %d; no word of a prompt "
                "becomes one of these",
                *(path, len(tensor) - len(place), len(place)),
            )
            tensor = tensor[: len(place)]
        # Converting the loaded model's layout instead would leave the process with 0.6 GB of memory
        # in pieces that it cannot give back.
        is_unet_map = name.startswith(keys.UNET) and place.ndim == 4
        # A copy, as a mapped tensor changes with its file, and its alignment changes last bits.
        return tensor.reshape(place.shape).to(
            device=device,
            dtype=dtype if place.is_meta else place.dtype,  # buffers keep their type
            copy=True,
            memory_format=unet_format if is_unet_map else torch.contiguous_format,
        )

    # read, cast and moved one by one: besides the model there is one tensor in memory
    tensors = {name: load(name, place) for name, place in places.items()}
    model.load_state_dict(tensors, strict=False, assign=True)


def _fits(name: str, shape: keys.Shape, wanted: keys.Shape) -> bool:
    """Whether a tensor fills its place: as it is, with other dimensions of 1, or more tokens."""
    if name.endswith(keys.TOKENS) and len(shape) == 2:
        extra = shape[0] - wanted[0]  # words that somebody's training added at the end
        return shape[1] == wanted[1] and 0 <= extra <= keys.MAX_ADDED_TOKENS
    return keys.same_but_for_ones(shape, wanted)


class NoEncoder(nn.Module):
    """Stands where a checkpoint has a decoder alone: enough for txt2img.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        """Raise InputError."""
        raise InputError(
            f"{self.path} has no encoder in its VAE, so it draws from prompts alone; give a whole "
            "VAE with --vae"
        )


def _leave_out_the_encoder(model: LatentDiffusion, path: Path) -> None:
    model.first_stage_model.encoder = NoEncoder(path)
    model.first_stage_model.quant_conv = nn.Identity()


def _list(names: list[str]) -> str:
    """How many tensors, and the first names of them."""
    first = ", ".join(escaped(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({first})"


def _report_unused(names: set[str], path: Path, config_name: str) -> None:
    """Warn of tensors without a place; in the U-Net they mean another architecture."""
    unknown = sorted(name for name in names if not keys.is_harmless(name))
    if not unknown:
        return
    what = f"{path} has {_list(unknown)} without a place in {config_name}"
    if any(name.startswith(keys.UNET) for name in unknown):
        raise InputError(what)
    logger.warning("%s; they are ignored", what)


def _report_schedule(
    model: LatentDiffusion, weights: StateDict, names: Mapping[str, str], config_name: str
) -> None:
    """Warn of a schedule in the file that is not the configuration's, which holds.

    That with zero terminal SNR is decided otherwise; see `ldm.checkpoint.prediction`.
    """
    raw, own = names.get("alphas_cumprod"), model.alphas_cumprod
    if (
        raw is None
        or weights.entries[raw].kind not in ("F64", "F32", "F16", "BF16")
        or own[-1] == 0
    ):
        return
    stored = weights[raw].float().flatten()
    if not (len(stored) and 0.5 < stored[0] <= 1 and (stored.diff() <= 0).all()):
        return  # it is no schedule at all
    if len(stored) != len(own):
        found = f"{len(stored)} steps, not {len(own)}"
    elif (stored - own).abs().max() > OTHER_SCHEDULE:
        found = f"alphas_cumprod {stored[-1]:.3g} at its end, not {own[-1]:.3g}"
    else:
        return
    logger.warning(
        "%s was trained on another schedule than that of %s, which holds (%s): pictures may be "
        "wrong; --config gives it a configuration of its own",
        *(weights.path, config_name, found),
    )
