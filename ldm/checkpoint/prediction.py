"""What a U-Net predicts, noise (eps) or v, and on which schedule: decided here and nowhere else.

The tensors' shapes cannot tell. In this order, the first that says something decides:

1. what the user asked for,
2. the file's metadata (`METADATA_KEYS`),
3. keys in the file (`v_pred`, `ztsnr`),
4. the configuration beside the file, or in its training run's folder, where it has the key,
5. the exact name of a published file of Stable Diffusion 2, or the words v-pred and eps in a name,
   of a link or of what it leads to,
6. the configuration beside the file without the key, which means eps,
7. the configuration that the user gave; it may not contradict 2 to 6,
8. the configuration that fits, which is a guess where a file says nothing.

Sources: ComfyUI's and kohya-ss's metadata and keys; Lin et al. 2023 (arXiv 2305.08891) for the
schedule with zero terminal SNR.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.checkpoint.files import StateDict, stem_of
from ldm.checkpoint.keys import canonical_names, canonical_shapes, family
from ldm.errors import InputError, escaped, shown

logger = logging.getLogger(__name__)

KINDS = ("eps", "x0", "v")
_V_PRED = r"v[-_ ]?(pred(iction)?|param(eteri[sz]ation)?)"
_SPELLINGS = {
    "eps": r"(eps(ilon)?|noise)([-_ ]?pred(iction)?)?",
    "x0": r"x0|sample",
    "v": rf"v|velocity|{_V_PRED}",
}
METADATA_KEYS = (
    "modelspec.prediction_type",
    "modelspec.predict_key",
    "prediction_type",
    "parameterization",
)
_SAID_ELSEWHERE = {
    "modelspec.architecture": {
        "stable-diffusion-v2-512": "eps",
        "stable-diffusion-v2-768-v": "v",
    },
    "ss_v_parameterization": {"true": "v", "false": "eps"},
    "v_pred": {"true": "v", "1": "v"},
}
"""Metadata that say it in passing, or say nothing of it: key -> value -> kind."""
ZERO_SNR_KEYS = ("zero_snr", "ztsnr", "zero_terminal_snr", "rescale_betas_zero_snr")
ZERO_SNR_METADATA = (*ZERO_SNR_KEYS, "modelspec.ztsnr", "ss_zero_terminal_snr")
MARKERS = ("v_pred", "ztsnr")
"""Tensors without numbers, whose presence says something."""

_PUBLISHED = {
    "512": "eps",
    "512-base-ema": "eps",
    "512-inpainting-ema": "eps",
    "v2-1_512-ema-pruned": "eps",
    "v2-1_512-nonema-pruned": "eps",
    "sd_turbo": "eps",
    "768": "v",
    "768-v": "v",
    "768-v-ema": "v",
    "v2-1_768-ema-pruned": "v",
    "v2-1_768-nonema-pruned": "v",
}
_STORAGE = re.compile(r"([-_.](fp16|fp32|bf16|half|float16|float32))+$", re.IGNORECASE)
_WORD = r"((?<![a-z0-9])|(?-i:(?<=[a-z0-9])(?=[A-Z])))"  # where a word begins: myModelVPred10
_V_WORD = re.compile(rf"{_WORD}{_V_PRED}(?-i:(?![a-z]))", re.IGNORECASE)
_EPS_WORD = re.compile(rf"{_WORD}eps(ilon)?([-_ ]?pred(iction)?)?(?-i:(?![a-z]))", re.IGNORECASE)
_ZERO_WORD = re.compile(
    rf"{_WORD}(zt?|zero[-_ ]?(terminal[-_ ]?)?)snr(?-i:(?![a-z]))", re.IGNORECASE
)


@dataclass(frozen=True)
class Prediction:
    """What a U-Net predicts, and how that is known.

    Attributes:
        kind: ``eps``, ``x0`` or ``v``.
        zero_snr: the schedule is rescaled so that the last step is noise alone.
        source: how it is known, in words: "by its metadata".
        is_stated: something says so; else it is a guess, which is never written anywhere.
    """

    kind: str
    zero_snr: bool
    source: str
    is_stated: bool = True


@dataclass(frozen=True)
class _Statement:
    kind: str | None
    zero_snr: bool
    where: str
    is_literal: bool = True  # said in so many words


def decide_prediction(
    weights: StateDict,
    asked: str | None = None,
    beside: tuple[str, Mapping[str, Any]] | None = None,
    given: tuple[str, Mapping[str, Any]] | None = None,
    fitting: Mapping[str, Mapping[str, Any]] | None = None,
) -> Prediction | None:
    """Settle what a file's U-Net predicts; see the order above.

    Args:
        weights: the file.
        asked: the user's choice.
        beside: name and content of the configuration that lies beside the file.
        given: name and content of the one that the user gave.
        fitting: name -> content of those that fit where there is neither.

    Returns:
        The decision; None where nothing says anything.

    Raises:
        InputError: a statement cannot be understood, or contradicts the configuration that the
            user gave.
    """
    if asked not in (None, *KINDS):
        raise InputError(f"parameterization {shown(asked)} is none of {', '.join(KINDS)}")
    statements = list(_statements(weights, beside, asked))
    stated = [one for one in statements if one.kind is not None]
    has_zero_snr = any(one.zero_snr for one in statements)
    if asked is None and stated and given is not None:
        own = kind_of(given[1])
        if own != stated[0].kind:
            raise InputError(
                f"{given[0]} says {own}-prediction, but the {stated[0].where} of {weights.path} "
                f"say {stated[0].kind}: give --parameterization to decide"
            )
    if asked is not None:
        found = Prediction(asked, False, "as asked for")
    elif stated:
        found = Prediction(stated[0].kind or "", False, f"by its {stated[0].where}")
        for other in stated[1:]:
            if other.kind != found.kind and other.is_literal:
                logger.warning(
                    "%s: its %s say %s-prediction, its %s %s; the former holds "
                    "(--parameterization decides otherwise)",
                    *(weights.path, stated[0].where, found.kind, other.where, other.kind),
                )
    elif given is not None:
        found = Prediction(kind_of(given[1]), False, "by the given configuration")
    else:
        kinds = {kind_of(whole) for whole in (fitting or {}).values()}
        if len(kinds) != 1:
            return None
        found = Prediction(kinds.pop(), False, "by the configuration that fits", is_stated=False)
    has_zero_snr |= given is not None and has_zero_terminal(given[1])
    if has_zero_snr and found.kind != "v":
        logger.warning(
            "%s asks for a schedule with zero terminal SNR, which needs v-prediction; it is left "
            "out",
            weights.path,
        )
        has_zero_snr = False
    return Prediction(found.kind, has_zero_snr, found.source, found.is_stated)


def kind_of(config: Mapping[str, Any]) -> str:
    """What the U-Net of a configuration predicts; upstream's default is eps.

    Raises:
        InputError: it says something else.
    """
    said = config["model"]["params"].get("parameterization", "eps")
    found = _kind(said) if isinstance(said, str) else None
    if found is None:
        raise InputError(f"parameterization {shown(said)} is none of {', '.join(KINDS)}")
    return found


def has_zero_terminal(config: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for the schedule with zero terminal SNR.

    Raises:
        InputError: it says neither yes nor no.
    """
    params = config["model"]["params"]
    for key in ZERO_SNR_KEYS:
        if not isinstance(params.get(key), bool | None):
            raise InputError(f"{key} {shown(params[key])}: allowed is true or false")
    return any(params.get(key) for key in ZERO_SNR_KEYS)


def record(metadata: Mapping[str, str], prediction: Prediction | None) -> dict[str, str]:
    """Metadata that state the prediction; without one, or with a guess, as they are."""
    if prediction is None or not prediction.is_stated:
        return dict(metadata)
    kept = {
        key: value
        for key, value in metadata.items()
        if key not in ZERO_SNR_METADATA
        and not (key in METADATA_KEYS and _kind(value) != prediction.kind)
        and _said_elsewhere(key, value) in (None, prediction.kind)
    }
    names = {"v": "v", "eps": "epsilon", "x0": "sample"}
    kept["modelspec.prediction_type"] = names[prediction.kind]
    return kept | ({"ztsnr": "true"} if prediction.zero_snr else {})


def prediction_in_name(stem: str, is_sd2: bool = True) -> str | None:
    """``eps`` or ``v`` if a file has the exact name of a published one, or a word that says so.

    The published ones are of Stable Diffusion 2; elsewhere ``768`` is a size.
    """
    if is_sd2 and (published := _PUBLISHED.get(_STORAGE.sub("", stem).lower())):
        return published
    is_v, is_eps = bool(_V_WORD.search(stem)), bool(_EPS_WORD.search(stem))
    return None if is_v == is_eps else "v" if is_v else "eps"


def prediction_in_metadata(metadata: Mapping[str, str], whose: str = "the") -> str | None:
    """``eps``, ``v`` or ``x0`` if a safetensors header says so.

    Raises:
        InputError: it says something else.
    """
    for key in METADATA_KEYS:
        if key in metadata:
            if found := _kind(metadata[key]):
                return found
            raise InputError(
                f"{whose} metadata say {escaped(key)}: {shown(metadata[key])}, and supported are "
                "epsilon and v: give --parameterization to decide"
            )
    said = (_said_elsewhere(key, metadata.get(key, "")) for key in _SAID_ELSEWHERE)
    return next(filter(None, said), None)


def _statements(
    weights: StateDict, beside: tuple[str, Mapping[str, Any]] | None, asked: str | None
) -> Iterator[_Statement]:
    """What each source says, in the order in which they count."""
    yield _Statement(
        asked or prediction_in_metadata(weights.metadata, f"{weights.path}: its"),
        any(
            _plain(weights.metadata.get(key, "")) in ("true", "1", "yes")
            for key in ZERO_SNR_METADATA
        ),
        "metadata",
    )
    found = set(MARKERS) & canonical_names(weights).keys()
    yield _Statement("v" if "v_pred" in found else None, "ztsnr" in found, "keys")
    configuration = None
    if beside is not None:
        name, whole = beside
        literal = "parameterization" in whole["model"]["params"]
        said = kind_of(whole), has_zero_terminal(whole), f"configuration {name}", literal
        configuration = _Statement(*said)
    if configuration is not None and configuration.is_literal:
        yield configuration
    is_sd2 = family(canonical_shapes(weights)).startswith("sd2")
    stems = [stem_of(path) for path in (weights.path, weights.path.resolve())]  # links lead home
    kinds = (prediction_in_name(stem, is_sd2) for stem in stems)
    is_zero = any(_ZERO_WORD.search(stem) for stem in stems)
    yield _Statement(next(filter(None, kinds), None), is_zero, "name")
    if configuration is not None and not configuration.is_literal:
        yield configuration


def _kind(text: str) -> str | None:
    """What a word in metadata means: ``eps``, ``x0`` or ``v``."""
    spelt = (kind for kind, form in _SPELLINGS.items() if re.fullmatch(form, _plain(text)))
    return next(spelt, None)


def _said_elsewhere(key: str, value: str) -> str | None:
    return _SAID_ELSEWHERE.get(key, {}).get(_plain(value).partition("/")[0])


def _plain(text: str) -> str:
    return text.strip().lower()
