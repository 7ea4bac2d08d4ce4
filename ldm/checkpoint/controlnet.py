"""ControlNet files: as their authors and as diffusers write them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.diffusers_keys import unet_layers
from ldm.checkpoint.files import StateDict, diffusers_config, open_state_dict
from ldm.checkpoint.keys import is_harmless, is_weight, same_but_for_ones
from ldm.errors import InputError, escaped
from ldm.modules.controlnet import ControlNet
from ldm.text import read_text

PREFIXES = ("control_model.", "")  # of the authors' files, and of those cut out of them
_IS_AVERAGED = re.compile(r"^\s*global_average_pooling:\s*true", re.IGNORECASE | re.MULTILINE)
UNUSED = {"dropout", "use_checkpoint", "reuse_deep", "tome_config"}  # of the U-Net's arguments


def load_controlnet(
    path: str | os.PathLike[str],
    unet: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ControlNet:
    """Load a ControlNet for a model of Stable Diffusion 1 or 2.

    Args:
        path: ``.safetensors``, ``.pth`` or the like.
        unet: arguments of the U-Net that it controls.
        dtype: of the weights.
        device: where they go.

    Returns: the network, in evaluation mode, without gradients.

    Raises:
        InputError: the file is none, or was made for another model.
    """
    weights = open_state_dict(path)
    if "difference" in weights:  # a tensor without meaning but this
        raise InputError(
            f"{path} holds what a ControlNet differs from its model by; take the whole ControlNet"
        )
    _refuse_others(Path(path))
    arguments = {name: value for name, value in unet.items() if name not in UNUSED}
    with torch.device("meta"):
        net = ControlNet(**{**arguments, "in_channels": 4})
    wanted = net.state_dict()
    stored = _stored_names(weights, list(wanted), Path(path))
    weights.require_weights(stored.values())
    state = {}
    for name, meta in wanted.items():
        tensor = weights[stored[name]]
        is_wide = {tensor.ndim, meta.ndim} == {2, 4} and same_but_for_ones(tensor.shape, meta.shape)
        if tensor.shape != meta.shape and not is_wide:  # a 1x1 convolution and a matrix are alike
            raise InputError(
                f"{path} is a ControlNet for another model: {name} is {tuple(tensor.shape)}, and "
                f"this one's would be {tuple(meta.shape)}"
            )
        tensor = tensor.reshape(meta.shape).to(dtype, copy=True)
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path} is damaged: {name} has values that are not numbers")
        state[name] = tensor
    net.load_state_dict(state, assign=True)
    return net.to(device).eval().requires_grad_(False)


def _stored_names(weights: StateDict, wanted: list[str], path: Path) -> dict[str, str]:
    """Our name -> the file's."""
    if "controlnet_cond_embedding.conv_in.weight" in weights:
        layers = {name.rpartition(".")[0] for name in wanted}
        theirs = {ours: name for name, ours in unet_layers(layers).items()}
        theirs |= {layer: _control_layer(layer) for layer in layers if _control_layer(layer)}
        names = {}
        for name in wanted:
            layer, _, kind = name.rpartition(".")
            names[name] = f"{theirs[layer]}.{kind}"
    else:
        prefix = next((p for p in PREFIXES if p + "input_hint_block.0.weight" in weights), None)
        if prefix is None:
            raise InputError(
                f"{path} is no ControlNet: there is no layer in it that reads a picture"
            )
        names = {name: prefix + name for name in wanted}
    for name in names.values():
        if name not in weights:
            raise InputError(
                f"{path} is a ControlNet for another model, or a part of one: it has no "
                f"{escaped(name)}"
            )
    own = set(names.values())
    more = [name for name in weights if name not in own and not _is_of_the_model(name)]
    if more:
        raise InputError(
            f"{path} is a ControlNet of another kind: {len(more)} of its tensors have no place "
            f"here, such as {escaped(more[0])}"
        )
    return names


def _is_of_the_model(name: str) -> bool:
    """Whether a tensor belongs to the model that the authors' files hold beside the ControlNet."""
    return is_weight(name) or is_harmless(name)


def _refuse_others(path: Path) -> None:
    """Raise InputError for networks of the same tensors that are to be run in another way.

    Sources: diffusers' ControlNetModel, its configuration; the authors' configurations; ComfyUI,
    which goes by the file's name.
    """
    config = diffusers_config(path)
    said = {
        key: config.get(key)
        for key in ("global_pool_conditions", "controlnet_conditioning_channel_order")
    }
    for file in (path.with_suffix(".yaml"), path.resolve().with_suffix(".yaml")):
        if file.is_file() and _IS_AVERAGED.search(read_text(file)):
            said["global_average_pooling"] = True
    if re.search(r"(?<![a-z])shuffle(?![a-z])", path.stem, re.IGNORECASE):
        said["its name"] = "shuffle"
    usual = {"controlnet_conditioning_channel_order": ("rgb", None)}
    for key, value in said.items():
        if value not in usual.get(key, (False, None)):
            raise InputError(
                f"{path} is a ControlNet of another kind ({key}: {escaped(value)}): only those are "
                "run whose picture is RGB and whose features are not averaged"
            )


def _control_layer(layer: str) -> str:
    """Diffusers' name of a layer that the U-Net does not have; empty for the others."""
    part, _, rest = layer.partition(".")
    number = rest.partition(".")[0]
    if part == "zero_convs":
        return f"controlnet_down_blocks.{number}"
    if part == "middle_block_out":
        return "controlnet_mid_block"
    if part != "input_hint_block":
        return ""
    position = int(number) // 2  # between the convolutions are activations
    inner = {0: "conv_in", 7: "conv_out"}.get(position, f"blocks.{position - 1}")
    return f"controlnet_cond_embedding.{inner}"
