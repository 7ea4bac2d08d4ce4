"""What is measured of pictures: a name, a meaning, and which value is best, for each measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A number for each picture, or for a set of pictures.

    Attributes:
        title: what tables call it.
        meaning: in a sentence.
        digits: shown after the point.
        best: "high", "low", or the one value that is best.
        is_distance: whether it compares with the unmerged picture of the same noise.
        floor: what 8-bit rounding alone would give, where that is known; nothing nearer to the
            unmerged picture can be told apart from it.
    """

    title: str
    meaning: str
    digits: int
    best: str | float = "high"
    is_distance: bool = True
    floor: float | None = None


EIGHT_BITS_DB = 58.9  # 10 log10(12 * 255^2): an error spread evenly over one step of 255
MEASURES = {
    "psnr_db": Measure(
        "PSNR, dB",
        "peak signal-to-noise ratio against the unmerged picture; identical ones: 100",
        2,
        floor=EIGHT_BITS_DB,
    ),
    "ssim": Measure("SSIM", "structural similarity with the unmerged picture (11x11 window)", 4),
    "ms_ssim": Measure(
        "MS-SSIM", "SSIM over up to five scales, as many as the picture's size allows", 4
    ),
    "high_frequency_ratio": Measure(
        "high freq.",
        "energy above half of the highest frequency, relative to the unmerged picture's: below 1 "
        "fine texture was lost, above 1 some was added; 1 is best",
        3,
        best=1.0,
    ),
    "lpips": Measure(
        "LPIPS", "perceptual distance to the unmerged picture (AlexNet)", 4, best="low"
    ),
    "attributes": Measure(
        "attributes",
        "share of what the prompt names that the classifier finds in the picture",
        4,
        is_distance=False,
    ),
    "clip_score": Measure(
        "CLIP score", "cosine of picture and prompt, times 100", 2, is_distance=False
    ),
}
FRECHET = "frechet"
FRECHET_MEASURE = Measure(
    "FID", "Fréchet distance to the reference pictures", 2, best="low", is_distance=False
)


def is_above_floor(name: str, value: float, floor: float | None) -> bool:
    """Whether a value is nearer to the unmerged picture than a change of precision alone.

    Args:
        name: of the measure.
        value: of a setting.
        floor: the worse one of the controls ``precision`` and ``rounding``; None without them.
    """
    measure = MEASURES.get(name)
    if measure is None or not measure.is_distance:
        return False
    floors = [f for f in (floor, measure.floor) if f is not None]
    return any(badness(measure, value) < badness(measure, f) for f in floors)


def badness(measure: Measure, value: float) -> float:
    """How far a value is from the best one; less is better."""
    if isinstance(measure.best, float):
        return abs(value - measure.best)
    return -value if measure.best == "high" else value
