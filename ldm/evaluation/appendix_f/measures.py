"""What is measured of each picture of a sweep."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.demo.check import named_attributes
from ldm.demo.classifier import AttributeClassifier
from ldm.demo.scenes import Scene
from ldm.evaluation.appendix_f.features import Features
from ldm.evaluation.appendix_f.metrics import high_frequency_ratio, ms_ssim, psnr, ssim


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
    "lpips": Measure(
        "LPIPS", "perceptual distance to the unmerged picture (AlexNet)", 4, is_better_high=False
    ),
    "clip_score": Measure(
        "CLIP score", "cosine of picture and prompt, times 100", 2, is_distance=False
    ),
}
FRECHET = "frechet"
FRECHET_MEASURE = Measure(
    "FID", "Fréchet distance to the reference pictures", 2, is_distance=False, is_better_high=False
)


@dataclass(frozen=True)
class Judge:
    """Measures pictures, one by one, so that numbers do not depend on what is drawn together.

    Attributes:
        classifier: reads attributes off pictures, where prompts name scenes.
        features: for a Fréchet distance.
        lpips: of a picture and the unmerged one.
        clip_score: of a picture and its prompt.
    """

    classifier: AttributeClassifier | None = None
    features: Features | None = None
    lpips: Callable[[Tensor, Tensor], float] | None = None
    clip_score: Callable[[Tensor, str], float] | None = None

    def rows(
        self,
        pictures: Tensor,
        reference: Tensor | None,
        prompts: Sequence[str],
        scenes: Sequence[Scene] | None,
    ) -> list[dict[str, Any]]:
        """Measures of each picture.

        Args:
            pictures: (B, 3, H, W), float32 in [-1, 1].
            reference: the unmerged ones, likewise; None where these are them.
            prompts: of each.
            scenes: what they name.
        """
        return [
            self._row(
                pictures[i : i + 1],
                None if reference is None else reference[i : i + 1],
                prompts[i],
                None if scenes is None else scenes[i],
            )
            for i in range(len(pictures))
        ]

    def _row(
        self, picture: Tensor, reference: Tensor | None, prompt: str, scene: Scene | None
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
            if self.lpips is not None:
                row["lpips"] = self.lpips(picture, reference)
        if self.clip_score is not None:
            row["clip_score"] = self.clip_score(picture, prompt)
        if self.classifier is not None and scene is not None:
            (seen,) = self.classifier.predict_attributes(picture)
            named = named_attributes(scene)
            right = {name: seen[name] == value for name, value in named.items()}
            row["attributes"] = sum(right.values()) / len(right)
            row["attributes_right"] = right
        if self.features is not None:
            row["features"] = encode(self.features(picture))
        return row


def encode(vector: Tensor) -> str:
    """A vector as text."""
    return base64.b64encode(vector.float().numpy().astype("<f4").tobytes()).decode()


def decode(text: str) -> Tensor:
    """The vector, float32, that `encode` made a text of."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))
