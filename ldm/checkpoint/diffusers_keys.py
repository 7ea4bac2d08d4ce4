"""The names that diffusers and transformers give to the layers of Stable Diffusion models.

Adapters such as LoRA name the layers they change in this way. Pure functions of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_FIXED = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_OPEN_CLIP = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}


@dataclass(frozen=True)
class Place:
    """Where the weight of a layer is: a tensor, or one of the equal ``parts`` of its rows."""

    name: str
    part: int = 0
    parts: int = 1


def unet_layers(layers: Iterable[str]) -> dict[str, str]:
    """Name in diffusers' UNet2DConditionModel -> name in ours.

    Args:
        layers: of our U-Net: the names of its parameters without ``.weight`` and ``.bias``.
    """
    layers = list(layers)
    # A level ends with its downsampler, or its upsampler.
    ends = {
        "input": [int(n) for n in _numbers(layers, r"input_blocks\.(\d+)\.0\.op")],
        "output": [int(n) for n in _numbers(layers, r"output_blocks\.(\d+)\.\d+\.conv")],
    }
    return {_unet_layer(layer, ends): layer for layer in layers}


def text_layers(names: Iterable[str]) -> dict[str, Place]:
    """Name of a layer in transformers' CLIPTextModel -> its weight in our text encoder.

    Args:
        names: of the text encoder's parameters.
    """
    found: dict[str, Place] = {}
    for name in names:
        if match := re.fullmatch(r"transformer\.(text_model\.encoder\..*)\.weight", name):
            found[match[1]] = Place(name)
        elif match := re.fullmatch(r"model\.transformer\.resblocks\.(\d+)\.(.*)", name):
            layer = f"text_model.encoder.layers.{match[1]}."
            if match[2] == "attn.in_proj_weight":
                for part, letter in enumerate("qkv"):
                    found[f"{layer}self_attn.{letter}_proj"] = Place(name, part, 3)
            elif inner := _OPEN_CLIP.get(match[2].removesuffix(".weight")):
                found[layer + inner] = Place(name)
    return found


def _numbers(layers: Iterable[str], pattern: str) -> list[str]:
    expression = re.compile(pattern)
    return [match[1] for layer in layers if (match := expression.fullmatch(layer))]


def _unet_layer(layer: str, ends: dict[str, list[int]]) -> str:
    if layer in _FIXED:
        return _FIXED[layer]
    if match := re.fullmatch(r"middle_block\.([012])\.(.*)", layer):
        return f"mid_block.{_MIDDLE[match[1]]}.{_RESIDUAL.get(match[2], match[2])}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", layer)
    if match is None:
        return layer
    side, number, place, rest = match.groups()
    before = [end for end in ends[side] if end < int(number)]
    start = max(before) + 1 if before else int(side == "input")  # input_blocks.0 is conv_in
    level = f"{'down' if side == 'input' else 'up'}_blocks.{len(before)}"
    if rest == "op":
        return f"{level}.downsamplers.0.conv"
    if rest == "conv":
        return f"{level}.upsamplers.0.conv"
    kind = "resnets" if place == "0" else "attentions"
    return f"{level}.{kind}.{int(number) - start}.{_RESIDUAL.get(rest, rest)}"
