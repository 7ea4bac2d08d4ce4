"""What the user is told of a run: about its prompts, merging and model, and what may be wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ldm import __version__
from ldm.checkpoint.files import stem_of
from ldm.checkpoint.load import CheckpointInfo
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.emphasis import parse_emphasis, plain_text, syntax_remarks
from ldm.modules.encoders.modules import TextEncoder, truncated_words
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.tally import Tally
from ldm.settings import Settings

# Where the model gives no numbers, larger ones than these are named.
LARGE_SCALE, LARGE_EMPHASIS = 30, 3

logger = logging.getLogger(__name__)


def prompt_remarks(
    encoder: TextEncoder, settings: Settings, vocabulary: Container[str] | None = None
) -> Iterator[str]:
    """Lines about words that the model does not read, or does not know.

    Args:
        encoder: the model's.
        settings: the prompts, and how they are read.
        vocabulary: the words that the model was trained on, in lower case, where that is known.
    """
    own = {part for word in encoder.words for part in unknown_words(word, ())}
    for prompt in dict.fromkeys([*settings.prompts, settings.negative_prompt]):
        yield from syntax_remarks(prompt, settings.long_prompt, settings.emphasis)
        text = plain_text(prompt) if settings.emphasis else prompt
        cut = truncated_words(text, encoder.max_length, encoder.words)
        if cut and not settings.long_prompt:
            yield (
                f"the prompt is too long; the model does not see its end: {cut!r} (long_prompt "
                "reads all of it)"
            )
        strange = [] if vocabulary is None else unknown_words(text, vocabulary)
        if strange := [word for word in strange if word not in own]:
            yield f"words that this model has never seen: {', '.join(strange)}"


def unknown_words(prompt: str, vocabulary: Container[str]) -> list[str]:
    """The words of a prompt, in lower case and once each, that are not in a vocabulary."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in vocabulary]


def report_tome(tally: Tally, config: ToMeConfig, where: str = "") -> None:
    """Say what merging did in all batches together."""
    if not config.is_off:
        logger.info("%s", tally.describe(config).replace("ToMe: ", f"ToMe: {where}", 1))
    for warning in tally.warnings(config):
        logger.warning("%s", where + warning)


def model_notes(
    model: LatentDiffusion, info: CheckpointInfo, file_hash: str, ema: bool
) -> dict[str, Any]:
    """What a picture remembers of the model that drew it, and where.

    Args:
        model: as it is after drawing: its type may have changed.
        info: of its checkpoint.
        file_hash: likewise.
        ema: whether it has the averaged weights.
    """
    unet = next(model.model.parameters())
    return {
        "model": {
            "name": stem_of(info.path),
            "hash": file_hash,
            "family": info.family,
            "parameterization": model.parameterization,
            **({"zero_snr": True} if info.zero_snr else {}),
            "ema": ema,
            **({"vae": info.vae.name} if info.vae else {}),
        },
        "device": unet.device.type,
        "dtype": str(unet.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "version": __version__,
    }


def suspects(
    settings: Settings, added: Mapping[str, Sequence[Mapping[str, Any]]], words: Iterable[str]
) -> str:
    """What may be to blame where a model gives values that are not numbers.

    Args:
        settings: of the run.
        added: what pictures remember of the files that are added to the model, by kind.
        words: that stand for embeddings.
    """
    found = [f"LoRA {one['name']} (weight {one['weight']:g})" for one in added.get("loras", ())]
    found += [f"the ControlNet {one['name']}" for one in added.get("controlnets", ())]
    texts = " ".join((settings.negative_prompt, *settings.prompts))
    found += [f"the embedding {word}" for word in words if word.lower() in texts.lower()]
    if settings.scale is not None and abs(settings.scale) > LARGE_SCALE:
        found.append(f"scale {settings.scale:g}")
    if settings.emphasis:
        weights = {weight for _, weight in parse_emphasis(texts)}
        found += [f"the emphasis {weight:g}" for weight in weights if abs(weight) > LARGE_EMPHASIS]
    if found:
        return f"lower {', '.join(found)}, or leave it out"
    return "the file is damaged, or predicts something else than its configuration says"
