"""LoRA: files of low-rank changes to a model's weights, added to them and taken away again.

A layer with weight W becomes W + weight * scale * up @ down. What a file changes is known from its
names and shapes, so `read_lora` can refuse it before a model is loaded; the sums are made once, so
a step takes no longer than without.

Source: Hu et al. 2021 (arXiv 2106.09685) eq. 3; names are those of kohya-ss/sd-scripts, diffusers
and PEFT.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.diffusers_keys import Place, text_layers, unet_layers
from ldm.checkpoint.files import StateDict, open_state_dict
from ldm.checkpoint.keys import TEXT_ENCODER, UNET, Shape
from ldm.errors import InputError

logger = logging.getLogger(__name__)

# The low-rank factors of a layer, as the programs name them: down and up, or A and B.
_FACTOR = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<kohya>down|up|A|B)(?:\.default)?"
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<diffusers>down|up))\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+?)(?:\.lora|\.lora_linear_layer|_lora)?\.alpha")
_BUNDLED = "bundle_emb."  # embeddings that some files carry along

# (pattern of a name, what the file is); the first that is found in any name decides.
_OTHERS = [
    (r"hada_w[12]|\.hada_t[12]", "a LoHa"),
    (r"lokr_[wt]\d", "a LoKr"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA"),
    (r"oft_(blocks|diag|R)|\.oft_", "an OFT"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.on_input$", "an (IA)^3"),
    (r"lora_mid\.|\.lora\.mid\.", "a LoCon with a Tucker core (lora_mid)"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "one with whole differences of weights"),
    (r"(double|single)_(transformer_)?blocks?[._]", "one for FLUX"),
    (r"joint_blocks|^transformer[._]|^lora_transformer_", "one for a transformer such as SD 3"),
    (r"^lora_te[12]_|^text_encoder_2\.|transformer_blocks[._][1-9]", "one for SDXL"),
]


@dataclass(frozen=True)
class Change:
    """What a file changes in one layer: ``scale * up @ down`` is added to its weight."""

    place: Place
    down: str  # names in the file
    up: str
    scale: float


@dataclass(frozen=True)
class Lora:
    """A file that fits a model, and how much of it is wanted."""

    file: StateDict
    weight: float
    changes: list[Change]

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    def summary(self) -> str:
        """One line for the user."""
        counts = {
            what: sum(change.place.name.startswith(prefix) for change in self.changes)
            for prefix, what in ((UNET, "the U-Net"), (TEXT_ENCODER, "the text encoder"))
        }
        layers = " and ".join(f"{n} layers of {what}" for what, n in counts.items() if n)
        ranks = {self.file.entries[change.down].shape[0] for change in self.changes}
        rank = "-".join(str(n) for n in sorted({min(ranks), max(ranks)}))
        return f"LoRA {self.path.name}: weight {self.weight:g}, rank {rank}, {layers}"


def read_lora(path: str | os.PathLike[str], weight: float, shapes: Mapping[str, Shape]) -> Lora:
    """Look at a file, without reading its tensors, and find what it changes.

    Args:
        path: ``.safetensors``, ``.ckpt`` or ``.pt``.
        weight: by which its changes are multiplied; 1 is as it was trained.
        shapes: of the model's tensors.

    Raises:
        InputError: it is something else, or does not fit the model; the message says why.
    """
    if not math.isfinite(weight):
        raise InputError(f"the weight {weight} of LoRA {path} is not a finite number")
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder; name a file")
    file = open_state_dict(path)
    _refuse_others(file)
    downs, ups, alphas, unknown = _sorted_names(file)
    unpaired = sorted({*downs} ^ {*ups})
    if unpaired:
        raise InputError(f"{path} is incomplete: {unpaired[0]} has one of its two factors only")
    places = _places(shapes)
    unknown += [downs[layer] for layer in downs if layer not in places]
    unknown += [name for layer, name in alphas.items() if layer not in downs]
    if unknown:
        raise InputError(
            f"{path} does not fit the model: {len(unknown)} of {len(file)} tensors have no place "
            f"in it, such as {', '.join(sorted(unknown)[:3])}"
        )
    said = _said_scale(file.metadata)
    changes = []
    for layer, down in downs.items():
        place, up = places[layer], ups[layer]
        _require_fit(file, layer, (down, up), place, shapes)
        rank = file.entries[down].shape[0]
        scale = _alpha(file, alphas[layer]) / rank if layer in alphas else said(layer, rank)
        changes.append(Change(place, down, up, scale))
    return Lora(file, weight, changes)


class WeightChanges:
    """What puts LoRAs into a model's weights, and keeps the weights as they were without."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._originals: dict[str, Tensor] = {}  # on the CPU

    @torch.no_grad()
    def set(self, loras: Iterable[Lora]) -> None:
        """Have these LoRAs in the weights, instead of those before; none restores every bit."""
        parameters = dict(self.model.named_parameters())
        for name, original in self._originals.items():
            parameters[name].copy_(original)
        self._originals.clear()
        wanted: dict[str, list[tuple[Lora, Change]]] = defaultdict(list)
        for lora in loras:
            for change in lora.changes if lora.weight else ():
                wanted[change.place.name].append((lora, change))
        for name, changes in wanted.items():
            parameter = parameters[name]
            self._originals[name] = parameter.detach().to("cpu", copy=True)
            parameter.copy_(_changed(parameter, changes))


def _changed(parameter: Tensor, changes: Sequence[tuple[Lora, Change]]) -> Tensor:
    """A weight with all changes added up in float32."""
    result = parameter.to(torch.float32, copy=True)
    for lora, change in changes:
        down, up = (
            lora.file[name].to(result.device, torch.float32).flatten(1)
            for name in (change.down, change.up)
        )
        rows = result.chunk(change.place.parts)[change.place.part]
        rows += (lora.weight * change.scale * (up @ down)).view_as(rows)
    return result


# --- names ------------------------------------------------------------------------------------


def _refuse_others(file: StateDict) -> None:
    """Raise InputError, by name, for files of kinds that are not read here."""
    for pattern, kind in _OTHERS:
        expression = re.compile(pattern)
        if any(expression.search(name) for name in file):
            raise InputError(
                f"{file.path} is {kind}; supported are plain LoRAs (lora_down, lora_up) of Stable "
                "Diffusion 1 and 2"
            )
    if not any(_FACTOR.fullmatch(name) for name in file):
        raise InputError(
            f"{file.path} is no LoRA: it has no lora_down or lora_A, but {next(iter(file))}"
        )


def _sorted_names(
    file: StateDict,
) -> tuple[dict[str, str], dict[str, str], dict[str, str], list[str]]:
    """Layer -> name in the file for factors down and up and for alpha; and what is neither."""
    downs: dict[str, str] = {}
    ups: dict[str, str] = {}
    alphas: dict[str, str] = {}
    unknown = []
    for name in file:
        plain = name.removeprefix("base_model.model.").replace(".processor.", ".")
        if match := _FACTOR.fullmatch(plain):
            is_down = (match["kohya"] or match["diffusers"]) in ("down", "A")
            (downs if is_down else ups)[match["layer"]] = name
        elif match := _ALPHA.fullmatch(plain):
            alphas[match["layer"]] = name
        elif not name.startswith(_BUNDLED):
            unknown.append(name)
    if bundled := [name for name in file if name.startswith(_BUNDLED)]:
        logger.warning(
            "%s carries embeddings along (%s); they are ignored", file.path, ", ".join(bundled[:3])
        )
    return downs, ups, alphas, unknown


def _places(shapes: Mapping[str, Shape]) -> dict[str, Place]:
    """Every name of a layer with a matrix or a convolution -> where its weight is."""
    found = {}
    unet = {n.removeprefix(UNET).rpartition(".")[0] for n in shapes if n.startswith(UNET)}
    for theirs, ours in unet_layers(sorted(unet)).items():
        name = f"{UNET}{ours}.weight"
        if len(shapes.get(name, ())) < 2:
            continue
        for spelling in (theirs, f"unet.{theirs}", _kohya("unet", theirs), _kohya("unet", ours)):
            found[spelling] = Place(name)
            found[spelling.removesuffix(".0")] = Place(name)  # to_out.0, before diffusers 0.22
    text = [n.removeprefix(TEXT_ENCODER) for n in shapes if n.startswith(TEXT_ENCODER)]
    for theirs, inner in text_layers(text).items():
        place = Place(TEXT_ENCODER + inner.name, inner.part, inner.parts)
        if len(shapes[place.name]) < 2:
            continue
        flat = theirs.removeprefix("text_model.")  # the tower's name before transformers 5.6
        old = re.sub(r"self_attn\.(?:(q|k|v)|(out))_proj", r"self_attn.to_\1\2", theirs)
        for spelling in (theirs, flat, old):
            found[f"text_encoder.{spelling}"] = place
        found[_kohya("te", theirs)] = place
    return found


def _kohya(model: str, layer: str) -> str:
    return f"lora_{model}_{layer.replace('.', '_')}"


def _said_scale(metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """The scale of a layer without an alpha in the file, from what diffusers wrote beside it.

    Without that, too, alpha is the rank, and the scale 1.
    """
    try:
        said: Any = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError:
        said = {}

    def scale(layer: str, rank: int) -> float:
        part, _, inner = layer.partition(".")
        alpha = said.get(f"{part}.lora_alpha", rank)
        for pattern, value in (said.get(f"{part}.alpha_pattern") or {}).items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", inner):
                alpha = value
        return alpha / (math.sqrt(rank) if said.get(f"{part}.use_rslora") else rank)

    return scale


def _alpha(file: StateDict, name: str) -> float:
    value = file[name].float()
    if value.numel() != 1 or not torch.isfinite(value).all():
        raise InputError(f"{file.path} is damaged: {name} is not a number")
    return value.item()


def _require_fit(
    file: StateDict,
    layer: str,
    factors: tuple[str, str],
    place: Place,
    shapes: Mapping[str, Shape],
) -> None:
    """Raise InputError where the product of down and up has not the shape of the weight."""
    down, up = (file.entries[name].shape for name in factors)
    whole = shapes[place.name]
    weight = (whole[0] // place.parts, *whole[1:])
    is_product = min(len(down), len(up)) >= 2 and 0 < down[0] == math.prod(up[1:])
    if not is_product or (up[0], math.prod(down[1:])) != (weight[0], math.prod(weight[1:])):
        raise InputError(
            f"{file.path} does not fit the model: {layer} has factors of {down} and {up} for a "
            f"weight of {weight}; it was made for another model"
        )
