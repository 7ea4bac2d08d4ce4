"""What is measured of each picture of a sweep."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.scenes import Scene
from ldm.evaluation.attributes import AttributeClassifier
from ldm.evaluation.demo import named_attributes
from ldm.evaluation.metrics import high_frequency_ratio, ms_ssim, psnr, ssim


@dataclass(frozen=True)
class Measure:
    """A number for each picture.

    Attributes:
        title: what tables call it.
        meaning: in a sentence.
        digits: shown after the point.
        is_distance: whether it compares with the unmerged picture of the same noise.
        is_better_high: whether more is better.
    """

    title: str
    meaning: str
    digits: int
    is_distance: bool = True
    is_better_high: bool = True


MEASURES = {
    "psnr_db": Measure(
        "PSNR, dB",
        "peak signal-to-noise ratio against the unmerged picture; identical ones: 100",
        2,
    ),
    "ssim": Measure("SSIM", "structural similarity with the unmerged picture (11x11 window)", 4),
    "ms_ssim": Measure(
        "MS-SSIM", "SSIM over up to five scales, as many as the picture's size allows", 4
    ),
    "high_frequency_ratio": Measure(
        "high freq.",
        "energy above half of the highest frequency, relative to the unmerged picture's: below 1 "
        "fine texture was lost, above 1 some was added",
        3,
    ),
    "attributes": Measure(
        "attributes",
        "share of what the prompt names that the classifier finds in the picture",
        4,
        is_distance=False,
    ),
}


class Features(Protocol):
    """Turns pictures into the vectors that a Fréchet distance compares."""

    name: str

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, n), float32 on the CPU."""
        ...


class ClassifierFeatures:
    """What the demo's attribute classifier sees; for pictures of the demo's kind alone.

    Args:
        classifier: the shipped one.
    """

    name = "features of the demo's attribute classifier"

    def __init__(self, classifier: AttributeClassifier) -> None:
        self.classifier = classifier

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, 64)."""
        return torch.cat([self.classifier.features(picture[None]) for picture in pictures])


@dataclass(frozen=True)
class Judge:
    """Measures pictures, one by one, so that numbers do not depend on what is drawn together.

    Attributes:
        classifier: reads attributes off pictures, where prompts name scenes.
        features: for a Fréchet distance.
    """

    classifier: AttributeClassifier | None = None
    features: Features | None = None

    def rows(
        self, pictures: Tensor, reference: Tensor | None, scenes: Sequence[Scene] | None
    ) -> list[dict[str, Any]]:
        """Measures of each picture.

        Args:
            pictures: (B, 3, H, W), float32 in [-1, 1].
            reference: the unmerged ones, likewise; None where these are them.
            scenes: what the prompts name.
        """
        return [
            self._row(
                pictures[i : i + 1],
                None if reference is None else reference[i : i + 1],
                None if scenes is None else scenes[i],
            )
            for i in range(len(pictures))
        ]

    def _row(
        self, picture: Tensor, reference: Tensor | None, scene: Scene | None
    ) -> dict[str, Any]:
        row: dict[str, Any] = {}
        if reference is not None:
            for name, measure in (
                ("psnr_db", psnr),
                ("ssim", ssim),
                ("ms_ssim", ms_ssim),
                ("high_frequency_ratio", high_frequency_ratio),
            ):
                row[name] = measure(picture, reference).item()
        if self.classifier is not None and scene is not None:
            (seen,) = self.classifier.predict_attributes(picture)
            named = named_attributes(scene)
            right = {name: seen[name] == value for name, value in named.items()}
            row["attributes"] = sum(right.values()) / len(right)
            row["attributes_right"] = right
        if self.features is not None:
            row["features"] = encode(self.features(picture)[0])
        return row


def encode(vector: Tensor) -> str:
    """A vector as text."""
    return base64.b64encode(vector.float().numpy().astype("<f4").tobytes()).decode()


def decode(text: str) -> Tensor:
    """The vector, float32, that `encode` made a text of."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))
