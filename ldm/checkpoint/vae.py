"""A first stage (VAE) from a file of its own, in the place of a checkpoint's."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ldm.checkpoint.files import StateDict, diffusers_config, stem_of
from ldm.checkpoint.keys import (
    CONTEXT_SIZES,
    FIRST_STAGE,
    canonical_name,
    canonical_names,
    canonical_shapes,
    context_size,
)
from ldm.errors import InputError, escaped, shown
from ldm.text import check_kind

logger = logging.getLogger(__name__)

_ENDINGS = (".vae.safetensors", ".vae.pt", ".vae.ckpt")
_XL = re.compile(r"(?<![a-z])(sd)?xl(?![a-uw-z])", re.IGNORECASE)  # sdxl_vae, xlVAE
_PREFIXES = (FIRST_STAGE, "vae.", "")
# diffusers' AutoencoderKL -> upstream's; {up} is a level counted from the other end
_DIFFUSERS = [
    (r"^(en|de)coder\.mid_block\.resnets\.0\.", r"\1coder.mid.block_1."),
    (r"^(en|de)coder\.mid_block\.resnets\.1\.", r"\1coder.mid.block_2."),
    (r"^(en|de)coder\.mid_block\.attentions\.0\.", r"\1coder.mid.attn_1."),
    (r"^encoder\.down_blocks\.(\d)\.resnets\.(\d)\.", r"encoder.down.\1.block.\2."),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.up_blocks\.(\d)\.resnets\.(\d)\.", r"decoder.up.{up}.block.\2."),
    (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0\.", r"decoder.up.{up}.upsample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
]


def find_vae(checkpoint: Path) -> Path | None:
    """The VAE that belongs to a checkpoint by its name, such as MODEL.vae.safetensors."""
    homes = (checkpoint, checkpoint.resolve())  # links lead home
    beside = (home.parent / (stem_of(home) + ending) for home in homes for ending in _ENDINGS)
    return next((file for file in beside if file.is_file() and file != checkpoint), None)


def with_vae(weights: StateDict, vae: StateDict) -> StateDict:
    """A checkpoint whose first stage is that of another file.

    Args:
        weights: the checkpoint, with a first stage or without.
        vae: the other file: a VAE in upstream's or diffusers' names, or a whole checkpoint.

    Raises:
        InputError: there is no VAE in it, or one of a family with latents of another scale.
    """
    if other := CONTEXT_SIZES.get(context_size(canonical_shapes(vae)) or 0):
        raise InputError(
            f"{vae.path} is {other}, whose VAE has the same shapes but latents of another scale: "
            "take one of Stable Diffusion 1 or 2"
        )
    own = vae_entries(vae)
    if f"{FIRST_STAGE}decoder.conv_in.weight" not in own:
        raise InputError(f"{vae.path} is no VAE: it has no decoder.conv_in.weight")
    vae.require_weights(own.values())
    rest = {
        name: entry
        for name, entry in weights.entries.items()
        if not canonical_name(name).startswith(FIRST_STAGE)
    }
    return StateDict(
        weights.path,
        rest | {name: vae.entries[raw] for name, raw in own.items()},
        weights.metadata,
    )


def check_scale(vae: Path, scale: float) -> None:
    """Compare the scale of a VAE's latents with the model's, where something says it.

    The shapes cannot tell: SDXL's VAE has those of Stable Diffusion's.

    Args:
        vae: its file; diffusers writes config.json beside it.
        scale: by which the model multiplies latents.

    Raises:
        InputError: its configuration says another one.
    """
    own = diffusers_config(vae).get("scaling_factor")
    if own is not None:
        own = check_kind(own, float, f"{escaped(vae)}, its config.json: scaling_factor")
        if abs(own - scale) > 0.01 * scale:
            raise InputError(
                f"{vae} has latents of the scale {shown(own)} (scaling_factor in config.json), "
                f"and the model's have {shown(scale)}: it was made for another family"
            )
    elif _XL.search(vae.stem):
        logger.warning(
            "%s is by its name a VAE for SDXL, whose latents have another scale: if it is one, "
            "pictures will be wrong",
            escaped(vae),
        )


def vae_entries(vae: StateDict) -> dict[str, str]:
    """Name in our models -> name in the file, for a VAE or whatever has one in it."""
    plain = canonical_names(vae)
    prefix = next(p for p in _PREFIXES if p == "" or any(name.startswith(p) for name in plain))
    found = {
        name[len(prefix) :]: raw
        for name, raw in plain.items()
        if name.startswith(prefix)
        and name[len(prefix) :].startswith(("encoder.", "decoder.", "quant_", "post_quant_"))
    }
    numbers = (re.match(r"decoder\.up_blocks\.(\d)\.", name) for name in found)
    last = max((int(match[1]) for match in numbers if match), default=0)
    return {canonical_name(FIRST_STAGE + _ours(name, last)): raw for name, raw in found.items()}


def _ours(name: str, last: int) -> str:
    """A name of diffusers' in upstream's spelling; others stay."""
    for pattern, ours in _DIFFUSERS:
        if match := re.search(pattern, name):
            if "{up}" in ours:
                ours = ours.replace("{up}", str(last - int(match[1])))
            name = re.sub(pattern, ours, name)
    return name
