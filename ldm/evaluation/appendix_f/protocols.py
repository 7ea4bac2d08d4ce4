"""Which pictures an experiment draws, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm.errors import InputError

PRESETS = ("appendix_f", "lalalune_r2048", "tomesd", "todo", "quality", "balanced", "fast")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)


@dataclass(frozen=True)
class Protocol:
    """An experiment's standard choices; a flag wins over each of them.

    Attributes:
        title: in a sentence.
        prompts: gives so many prompts, and the scenes that they name, if they do.
        n_prompts: how many.
        n_seeds: pictures of each.
        steps, sampler, scale, size: of sampling; None takes the model's own.
        presets, ratios: what is compared.
    """

    title: str
    prompts: Callable[[int], tuple[list[str], list[Any] | None]]
    n_prompts: int
    n_seeds: int
    steps: int | None = None
    sampler: str | None = None
    scale: float | None = None
    size: int | None = None
    presets: Sequence[str] = PRESETS
    ratios: Sequence[float] = RATIOS


def scenes(n: int) -> tuple[list[str], list[Any]]:
    """Captions of held-out scenes, and the scenes."""
    from ldm.demo.check import captions_of, held_out_scenes

    found = held_out_scenes(n)
    return captions_of(found), found


def imagenet(n: int) -> tuple[list[str], None]:
    """A text for each of the first n ImageNet classes, by the class names of open_clip.

    Raises:
        InputError: there are not so many.
    """
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    if n > len(IMAGENET_CLASSNAMES):
        raise InputError(f"--n_prompts {n}: there are {len(IMAGENET_CLASSNAMES)} classes")
    return [f"a photo of a {name}" for name in IMAGENET_CLASSNAMES[:n]], None


PROTOCOLS = {
    "demo": Protocol("held-out scenes, drawn by the demo model", scenes, n_prompts=32, n_seeds=3),
    "tomesd": Protocol(
        "ImageNet's class names, as in tomesd's paper",
        imagenet,
        n_prompts=1000,
        n_seeds=2,
        steps=50,
        sampler="plms",
        scale=7.5,
        size=512,
    ),
}


def quick(protocol: Protocol) -> Protocol:
    """The same in small: a few settings, prompts and steps."""
    return replace(
        protocol,
        n_prompts=4,
        n_seeds=1,
        steps=10,
        presets=("tomesd", "todo", "balanced", "fast"),
        ratios=(0.5,),
    )
