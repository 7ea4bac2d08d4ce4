"""How LoRA files name things: layers in many spellings, the roles of tensors, and their strength.

Spellings are those of diffusers, PEFT, kohya-ss/sd-scripts, LyCORIS, ComfyUI and OneTrainer.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ldm.checkpoint.diffusers_keys import Place, text_layers, unet_layers
from ldm.checkpoint.files import StateDict
from ldm.checkpoint.keys import TEXT_ENCODER, UNET, Shape
from ldm.errors import InputError, escaped, shown
from ldm.text import parse_json, read_json

logger = logging.getLogger(__name__)

_ADAPTER = r"(?:\.\w+)?"  # PEFT's name of an adapter in a model, such as .default_0
_SUFFIXES = [
    (rf"\.lora_(?:down|A){_ADAPTER}\.weight", "down"),
    (rf"\.lora_(?:up|B){_ADAPTER}\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.(down|up|mid)\.weight", ""),
    (r"\.hada_(w[12]_[ab]|t[12])", ""),
    (r"\.lokr_w([12](?:_[ab])?)", "k"),
    (r"\.lokr_t2", "k_t2"),
    (r"\.dora_scale", "dora"),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "bias"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)?\.alpha", "alpha"),
]
_ROLES = [(re.compile(rf"(?P<layer>.+?){suffix}"), role) for suffix, role in _SUFFIXES]
_MAX_PATTERN = 200
ADAPTER_CONFIG = "adapter_config.json"
_PEFT = "base_model.model."  # before the names of layers in PEFT's own files
# Ways to begin that take from the model's weights what the adapter has from then on.
_TAKES_FROM_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def role_of(name: str) -> tuple[str, str] | None:
    """(layer, role) of a tensor's name; None where it is no part of an adapter."""
    plain = name.removeprefix(_PEFT).replace(".processor.", ".")
    for pattern, role in _ROLES:
        if match := pattern.fullmatch(plain):
            own = match.groups()[1] if len(match.groups()) > 1 else ""
            return match["layer"], role + own
    return None


def places(shapes: Mapping[str, Shape]) -> dict[str, Place]:
    """Every spelling of a layer's name -> where its weight is.

    Args:
        shapes: of the model's tensors.
    """
    found: dict[str, Place] = {}
    unet = {n.removeprefix(UNET).rpartition(".")[0] for n in shapes if n.startswith(UNET)}
    for theirs, ours in unet_layers(sorted(unet)).items():
        place = Place(f"{UNET}{ours}.weight")
        if place.name not in shapes:
            continue
        dotted = [theirs, f"unet.{theirs}", f"unet.{ours}"]
        dotted += [f"diffusion_model.{ours}", f"{UNET}{ours}"]
        flat = [_flat(p, name) for p in ("lora_unet", "lycoris") for name in (theirs, ours)]
        for spelling in (*dotted, *flat):
            found[spelling] = place
            found[spelling.removesuffix(".0")] = place  # to_out.0, before diffusers 0.22
    text = [n.removeprefix(TEXT_ENCODER) for n in shapes if n.startswith(TEXT_ENCODER)]
    for theirs, inner in text_layers(text).items():
        place = Place(TEXT_ENCODER + inner.name, inner.part, inner.parts)
        bare = theirs.removeprefix("text_model.")  # the tower's name before transformers 5.6
        old = re.sub(r"self_attn\.(?:(q|k|v)|(out))_proj", r"self_attn.to_\1\2", theirs)
        for name in (theirs, bare, old):
            found[name] = place
            for prefix in ("text_encoder", "clip_l", "clip_h"):
                found[f"{prefix}.{name}"] = place
            for encoder in ("clip_l", "clip_h"):
                found[f"text_encoders.{encoder}.transformer.{name}"] = place
            found[f"{TEXT_ENCODER}transformer.{name}"] = place
        found[_flat("lora_te", theirs)] = found[_flat("lora_te1", theirs)] = place
    return found


def _flat(prefix: str, layer: str) -> str:
    return f"{prefix}_{layer.replace('.', '_')}"


# --- strength ---------------------------------------------------------------------------------


Patterns: TypeAlias = tuple[tuple[re.Pattern[str], float], ...]


def _of_layer(layer: str, patterns: Patterns, usual: float | None) -> float | None:
    return next((value for pattern, value in patterns if pattern.fullmatch(layer)), usual)


@dataclass(frozen=True)
class Strength:
    """What PEFT's configuration says about alpha, for layers without one in the file.

    Attributes:
        alpha: of all layers; None: the rank.
        patterns: regular expression of the end of a layer's name -> its alpha.
        rank: of layers whose tensors have none, as LoKr's whole factors; None: nobody says.
        rank_patterns: likewise for their ranks.
        is_rank_stabilised: alpha is divided by the root of the rank.
    """

    alpha: float | None = None
    patterns: Patterns = ()
    is_rank_stabilised: bool = False
    rank: float | None = None
    rank_patterns: Patterns = ()

    def scale(self, layer: str, rank: float | None) -> float:
        """By what a layer's product is multiplied."""
        rank = rank or _of_layer(layer, self.rank_patterns, self.rank)
        alpha = _of_layer(layer, self.patterns, self.alpha)
        if alpha is None or rank is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def said_scale(file: StateDict) -> Callable[[str, int | None], float]:
    """The scale of a layer without an alpha in the file: from what PEFT or diffusers wrote.

    That is PEFT's adapter_config.json beside an adapter of its own, or a field in the header.
    Without either, alpha is the rank, and the scale 1.

    Raises:
        InputError: it says something that cannot be.
    """
    is_bare = any(name.startswith(_PEFT) for name in file)
    if is_bare or file.path.stem == "adapter_model":
        for path in (file.path, file.path.resolve()):  # a link may lead to PEFT's own folder
            beside = path.with_name(ADAPTER_CONFIG)
            if beside.exists():
                return _strength(read_json(beside), "", escaped(beside)).scale
    text = file.metadata.get("lora_adapter_metadata")
    if text is None:
        if is_bare and not any(name.endswith("alpha") for name in file):
            logger.warning(
                "%s is an adapter of PEFT without its %s, which says how strong it is; its alpha "
                "is taken to be its rank",
                *(escaped(file.path), ADAPTER_CONFIG),
            )
        return Strength().scale
    where = f"{file.path}: lora_adapter_metadata"
    said = parse_json(text, where)
    # of a pipeline's parts, or of one U-Net alone
    parts = {part: _strength(said, f"{part}.", where) for part in ("unet", "text_encoder")}
    whole = _strength(said, "", where)

    def scale(layer: str, rank: int | None) -> float:
        part, _, inner = layer.partition(".")
        return parts[part].scale(inner, rank) if part in parts else whole.scale(layer, rank)

    return scale


def _strength(said: Mapping[str, Any], prefix: str, where: str) -> Strength:
    def number(value: Any, name: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or abs(value) > 1e6:
            raise InputError(f"{where}: {name} must be a number, not {shown(value)}")
        return float(value)

    begun = said.get(f"{prefix}init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_TAKES_FROM_MODEL):
        raise InputError(
            f"{where}: init_lora_weights is {shown(begun)}, so the adapter belongs to weights that "
            "are not the model's; have PEFT convert it (path_initial_model_for_weight_conversion)"
        )
    alpha = said.get(f"{prefix}lora_alpha")
    rank = None
    if said.get(f"{prefix}peft_type") in ("LOHA", "LOKR"):
        alpha, rank = said.get(f"{prefix}alpha"), said.get(f"{prefix}r")
    stabilised = said.get(f"{prefix}use_rslora") or False
    if not isinstance(stabilised, bool):
        raise InputError(f"{where}: use_rslora is {shown(stabilised)}, which it cannot be")

    def patterns(key: str) -> Patterns:
        found = said.get(f"{prefix}{key}") or {}
        if not isinstance(found, Mapping):
            raise InputError(f"{where}: {key} is {shown(found)}, which it cannot be")
        return tuple(
            (_pattern(text, key, where), number(value, key)) for text, value in found.items()
        )

    return Strength(
        None if alpha is None else number(alpha, "lora_alpha"),
        patterns("alpha_pattern"),
        stabilised,
        None if rank is None else max(number(rank, "r"), 1.0),
        () if rank is None else tuple((one, max(n, 1.0)) for one, n in patterns("rank_pattern")),
    )


def _pattern(text: str, key: str, where: str) -> re.Pattern[str]:
    """PEFT's pattern of the end of a name; only such as are searched in no time."""
    is_plain = (
        len(text) <= _MAX_PATTERN
        and re.fullmatch(r"[\w.\-\\^$*+?|()]*", text)
        and not re.search(r"\)[*+?]|[*+?][*+]", text)
        and len(re.findall(r"[*+]", text)) <= 3
    )
    try:
        if is_plain:
            return re.compile(rf"(?:.*\.)?(?:{text})")
    except re.error:
        pass
    raise InputError(f"{where}: {key} has the pattern {shown(text)}, which is not read here")
