"""Which pictures an experiment draws, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.errors import InputError

RATIOS = (None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)  # None: the preset as it is
PRESETS = ("appendix_f", "lalalune_r2048", "tomesd", "todo", "quality", "balanced", "fast")
STRIDE = 619  # has no divisor in common with the 1000 classes


@dataclass(frozen=True)
class Protocol:
    """An experiment's standard choices; a flag wins over each of them.

    Attributes:
        title: in a sentence.
        prompts: gives so many prompts, and the scenes that they name, if they do.
        n_prompts: how many.
        n_seeds: pictures of each.
        steps, sampler, scale, size: of sampling; None takes the model's own.
        presets: what is compared, each at these ratios.
        control_share: controls are drawn for one of so many groups of prompts.
    """

    title: str
    prompts: Callable[[int], tuple[list[str], list[Any] | None]]
    n_prompts: int
    n_seeds: int
    steps: int | None = None
    sampler: str | None = None
    scale: float | None = None
    size: int | None = None
    presets: Mapping[str, Sequence[float | None]] = field(
        default_factory=lambda: dict.fromkeys(PRESETS, RATIOS)
    )
    control_share: int = 1


def scenes(n: int) -> tuple[list[str], list[Any]]:
    """Captions of held-out scenes, and the scenes."""
    from ldm.demo.samples import captions_of, held_out_scenes

    found = held_out_scenes(n)
    return captions_of(found), found


def imagenet(n: int) -> tuple[list[str], None]:
    """A text for each of n ImageNet classes, by the class names of open_clip.

    They are taken in strides, so that any number of them is spread over all classes, and a longer
    list begins with a shorter one.

    Raises:
        InputError: there are not so many.
    """
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    n_classes = len(IMAGENET_CLASSNAMES)
    if n > n_classes:
        raise InputError(f"--n_prompts {n}: there are {n_classes} classes")
    names = (IMAGENET_CLASSNAMES[i * STRIDE % n_classes] for i in range(n))
    return [f"a photo of a {name}" for name in names], None


PROTOCOLS = {
    "demo": Protocol("held-out scenes, drawn by the demo model", scenes, n_prompts=32, n_seeds=3),
    "tomesd": Protocol(
        "ImageNet's class names and the settings of tomesd's tables 1 and 4",
        imagenet,
        n_prompts=1000,
        n_seeds=2,
        steps=50,
        sampler="plms",
        scale=7.5,
        size=512,
        presets={"appendix_f": (0.1, 0.2, 0.3, 0.4, 0.5), "tomesd": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)},
        control_share=20,
    ),
}


def quick(protocol: Protocol) -> Protocol:
    """The same in small: a few settings, prompts and steps."""
    return replace(
        protocol,
        n_prompts=4,
        n_seeds=1,
        steps=10,
        presets=dict.fromkeys(("tomesd", "todo", "balanced", "fast"), (None, 0.5)),
        control_share=1,
    )
