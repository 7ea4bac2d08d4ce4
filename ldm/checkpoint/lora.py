"""LoRA: files of small changes to a model's weights, added to them and taken away again.

A layer with weight W becomes W + weight * scale * delta, where delta is made of the file's tensors
(see `ldm.checkpoint.lora_kinds`). What a file changes is known from its names and shapes, so
`read_lora` can refuse it before a model is loaded; the sums are made once, so a step takes no
longer than without.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint import lora_kinds
from ldm.checkpoint.diffusers_keys import Place
from ldm.checkpoint.files import NUMBERS, StateDict, open_state_dict
from ldm.checkpoint.keys import TEXT_ENCODER, UNET, Shape
from ldm.checkpoint.lora_names import places, role_of, said_scale
from ldm.errors import InputError, escaped

logger = logging.getLogger(__name__)

_BUNDLED = "bundle_emb."  # embeddings that some files carry along
_CONV_IN = f"{UNET}input_blocks.0.0.weight"

# (pattern of a name, what the file is); the first that is found in any name decides.
_OTHERS = [
    (r"oft_(blocks|diag|R)|\.oft_", "an OFT"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.on_input$", "an (IA)^3"),
    (r"(double|single)_(transformer_)?blocks?[._]", "one for FLUX"),
    (r"joint_blocks|^transformer[._]|^lora_transformer_", "one for a transformer such as SD 3"),
    (r"^lora_te2_|^text_encoder_2\.|clip_g\.|transformer_blocks[._][1-9]", "one for SDXL"),
]


@dataclass(frozen=True)
class Change:
    """What a file changes in one layer.

    Attributes:
        place: where the weight is.
        kind: of ``lora_kinds.KINDS``.
        tensors: role -> name in the file.
        scale: by which the product is multiplied.
        rank: of the product; None where it has none.
        n_columns: only so many input channels of the weight are changed; None: all.
    """

    place: Place
    kind: str
    tensors: dict[str, str]
    scale: float
    rank: int | None
    n_columns: int | None = None


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
        ranks = {change.rank for change in self.changes if change.rank is not None}
        rank = "-".join(str(n) for n in sorted({min(ranks), max(ranks)})) if ranks else "none"
        kinds = {change.kind for change in self.changes}
        kinds |= {"DoRA" for one in self.changes if {"dora", "magnitude"} & set(one.tensors)}
        others = sorted(kinds - {"LoRA"})
        what = f" ({', '.join(others)})" if others else ""
        return f"LoRA {self.path.name}{what}: weight {self.weight:g}, rank {rank}, {layers}"


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
    layers, unknown = _layers(file)
    known = places(shapes)
    unknown += [
        name for layer, own in layers.items() if layer not in known for name in own.values()
    ]
    if unknown:
        some = ", ".join(escaped(name) for name in sorted(unknown)[:3])
        raise InputError(
            f"{path} does not fit the model: {len(unknown)} of {len(file)} tensors have no place "
            f"in it, such as {some}"
        )
    spelt: dict[Place, str] = {}
    for layer in layers:
        if (before := spelt.setdefault(known[layer], layer)) != layer:
            raise InputError(
                f"{path} has one layer twice, as {escaped(before)} and as {escaped(layer)}"
            )
    said = said_scale(file)
    changes = []
    for layer, own in layers.items():
        # a layer can have a difference for its bias beside anything else
        rest = {role: name for role, name in own.items() if role != "bias"}
        for tensors in (rest, {"bias": own["bias"]} if "bias" in own else {}):
            kind = lora_kinds.kind_of(set(tensors))
            if kind is None and set(tensors) - {"alpha"}:
                raise InputError(
                    f"{path} is incomplete: {escaped(layer)} has one of its two factors only, or "
                    f"parts that do not go together ({', '.join(sorted(tensors))})"
                )
            if kind is not None:
                change = _change(file, layer, kind, tensors, known[layer], shapes)
                changes += [] if change is None else [_scaled(file, layer, change, said)]
    if not changes:
        raise InputError(f"{path} changes nothing: all its layers have rank 0")
    return Lora(file, weight, changes)


class WeightChanges:
    """What puts LoRAs into a model's weights, and keeps the weights as they were without."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._originals: dict[str, Tensor] = {}  # on the CPU

    @torch.no_grad()
    def set(self, loras: Iterable[Lora]) -> None:
        """Have these LoRAs in the weights, instead of those before; none restores every bit.

        Raises:
            InputError: a weight would be no finite number; all are the originals then.
        """
        parameters = dict(self.model.named_parameters())
        self._restore(parameters)
        wanted: dict[str, list[tuple[Lora, Change]]] = defaultdict(list)
        for lora in loras:
            for change in lora.changes if lora.weight else ():
                wanted[change.place.name].append((lora, change))
        for name, changes in wanted.items():
            parameter = parameters[name]
            self._originals[name] = parameter.detach().to("cpu", copy=True)
            parameter.copy_(_changed(parameter, changes))
            if not torch.isfinite(parameter).all() and self._originals[name].isfinite().all():
                self._restore(parameters)
                files = ", ".join(f"{lora.path.name} at {lora.weight:g}" for lora, _ in changes)
                for lora, change in changes:
                    for raw in change.tensors.values():
                        if not torch.isfinite(lora.file[raw]).all():
                            raise InputError(
                                f"{lora.path} is damaged: {escaped(raw)} has values that are not "
                                "numbers"
                            )
                kind = str(parameter.dtype).removeprefix("torch.")
                raise InputError(
                    f"LoRA {files}: {escaped(name)} is beyond the numbers of {kind}; lower its "
                    "weight, or take --dtype float32"
                )

    def _restore(self, parameters: Mapping[str, Tensor]) -> None:
        for name, original in self._originals.items():
            parameters[name].copy_(original)
        self._originals.clear()


def _changed(parameter: Tensor, changes: Sequence[tuple[Lora, Change]]) -> Tensor:
    """A weight with all changes added up in float32."""
    result = parameter.to(torch.float32, copy=True)
    for lora, change in changes:
        tensors = {
            role: lora.file[name].to(result.device, torch.float32)
            for role, name in change.tensors.items()
        }
        rows = result.chunk(change.place.parts)[change.place.part]
        if change.n_columns is not None:
            rows = rows[:, : change.n_columns]
        product = lora_kinds.delta(change.kind, tensors)
        if {"dora", "magnitude"} & set(tensors):
            # the weight moves towards what was trained, so half of it is half of the way
            trained = lora_kinds.decomposed(
                rows + (change.scale * product).reshape(rows.shape), tensors
            )
            rows += lora.weight * (trained - rows)
        else:
            rows += (lora.weight * change.scale * product).reshape(rows.shape)
    return result


# --- what a file has --------------------------------------------------------------------------


def _refuse_others(file: StateDict) -> None:
    """Raise InputError, by name, for files of kinds that are not read here."""
    for pattern, kind in _OTHERS:
        expression = re.compile(pattern)
        if any(expression.search(name) for name in file):
            raise InputError(
                f"{file.path} is {kind}; supported are LoRA, LoCon, LoHa, LoKr and DoRA of Stable "
                "Diffusion 1 and 2"
            )
    if not any(role_of(name) for name in file):
        first = escaped(next(iter(file)))
        raise InputError(f"{file.path} is no LoRA: it has no lora_down or lora_A, but {first}")


def _layers(file: StateDict) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Layer -> role -> name in the file; and the names that are part of no adapter."""
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    unknown = []
    for name in file:
        found = role_of(name)
        if name.startswith(_BUNDLED):
            continue
        if found is None or found[1] in layers[found[0]]:
            unknown.append(name)
        else:
            layers[found[0]][found[1]] = name
    if bundled := [escaped(name) for name in file if name.startswith(_BUNDLED)]:
        logger.warning(
            "%s carries embeddings along (%s); they are ignored", file.path, ", ".join(bundled[:3])
        )
    unknown += [own["alpha"] for own in layers.values() if set(own) == {"alpha"}]
    return {layer: own for layer, own in layers.items() if own and set(own) != {"alpha"}}, unknown


def _change(
    file: StateDict,
    layer: str,
    kind: str,
    tensors: dict[str, str],
    place: Place,
    shapes: Mapping[str, Shape],
) -> Change | None:
    """A change that fits the weight; None where it has rank 0, and so changes nothing.

    Raises:
        InputError: it has another shape than the weight, or is not of real numbers.
    """
    own = {role: file.entries[name].shape for role, name in tensors.items() if role != "alpha"}
    file.require_weights(name for role, name in tensors.items() if role != "alpha")
    if kind == "bias":
        name = place.name.replace("in_proj_weight", "in_proj_bias")
        place = Place(re.sub(r"\.weight$", ".bias", name), place.part, place.parts)
    whole = shapes.get(place.name, ())
    wanted = (whole[0] // place.parts, *whole[1:]) if whole else ()
    rank = lora_kinds.rank_of(kind, own)
    if rank == 0:
        return None
    n_columns = None
    try:
        stand_ins = {role: torch.empty(shape, device="meta") for role, shape in own.items()}
        added = lora_kinds.delta(kind, stand_ins)
        product = tuple(added.flatten(1).shape if added.ndim > 1 else added.shape)
        if place.name == _CONV_IN and wanted[1] > 4 and product[1] == 4 * math.prod(wanted[2:]):
            # an inpainting model: the mask and the picture behind it come after the 4 latents
            n_columns = 4
            wanted = (wanted[0], 4, *wanted[2:])
        fits = product == (*wanted[:1], *([math.prod(wanted[1:])] if len(wanted) > 1 else []))
        if fits and {"dora", "magnitude"} & set(own):
            fits = lora_kinds.decomposed(torch.empty(wanted, device="meta"), stand_ins).shape == (
                wanted
            )
    except (RuntimeError, IndexError, ValueError):
        fits = False
    if not fits:
        found = " and ".join(f"{shape}" for shape in own.values())
        raise InputError(
            f"{file.path} does not fit the model: {escaped(layer)} has factors of {found} for a "
            f"weight of {wanted}; it was made for another model"
        )
    return Change(place, kind, tensors, 1.0, rank, n_columns)


def _scaled(
    file: StateDict, layer: str, change: Change, said: Callable[[str, int | None], float]
) -> Change:
    """The change with its scale, and without the tensor that said so."""
    tensors = dict(change.tensors)
    alpha = tensors.pop("alpha", None)
    scale = 1.0
    if alpha is None and change.kind in ("LoRA", "LoHa", "LoKr"):
        scale = said(layer, change.rank)
    elif alpha is not None and change.rank is not None:
        scale = _alpha(file, alpha) / change.rank
    return dataclasses.replace(change, tensors=tensors, scale=scale)


def _alpha(file: StateDict, name: str) -> float:
    entry = file.entries[name]
    is_number = math.prod(entry.shape) == 1 and entry.kind in NUMBERS
    value = file[name].float().item() if is_number else math.nan
    if not math.isfinite(value):
        raise InputError(f"{file.path} is damaged: {escaped(name)} is not a number")
    return value
