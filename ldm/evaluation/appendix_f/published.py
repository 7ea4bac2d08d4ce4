"""What others published, each number with its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A row of a paper: SD 1.5, 512x512, 50 PLMS steps, guidance 7.5, float16, one RTX 4090.

    FID is of 2000 pictures against 5000 of ImageNet's validation set; attention is einsum.

    Attributes:
        setting: as our preset is called.
        ratio: of tokens removed.
        fid: Fréchet inception distance.
        seconds: a picture.
        speedup: over no merging there.
        gigabytes: of memory a picture, at the largest batch.
        source: where it stands; says where it is known second-hand only.
    """

    setting: str
    ratio: float
    fid: float
    seconds: float
    speedup: float
    gigabytes: float
    source: str


_PAPER = "Bolya and Hoffman 2023 (arXiv 2303.17604)"
_TABLE_1 = f"{_PAPER}, table 1, known second-hand"
_TABLE_4 = f"{_PAPER}, table 4"

PUBLISHED = (
    Published("unmerged", 0.0, 33.12, 3.09, 1.00, 3.41, _TABLE_4),
    Published("appendix_f (naive)", 0.1, 33.14, 2.60, 3.09 / 2.60, 2.99, _TABLE_1),
    Published("appendix_f (naive)", 0.3, 33.60, 2.11, 3.09 / 2.11, 1.71, _TABLE_1),
    Published("appendix_f (naive)", 0.5, 38.95, 1.53, 3.09 / 1.53, 0.89, _TABLE_1),
    Published("tomesd", 0.1, 32.86, 2.56, 1.21, 2.99, _TABLE_4),
    Published("tomesd", 0.2, 32.86, 2.29, 1.35, 2.17, _TABLE_4),
    Published("tomesd", 0.3, 32.80, 2.06, 1.50, 1.71, _TABLE_4),
    Published("tomesd", 0.4, 32.87, 1.85, 1.67, 1.26, _TABLE_4),
    Published("tomesd", 0.5, 33.02, 1.65, 1.87, 0.89, _TABLE_4),
    Published("tomesd", 0.6, 33.37, 1.52, 2.03, 0.60, _TABLE_4),
)
