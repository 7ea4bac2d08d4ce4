"""What others published, each number with its source, and the form of their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm.evaluation.appendix_f.measures import FRECHET


@dataclass(frozen=True)
class Published:
    """A row of a paper: SD 1.5, 512x512, 50 PLMS steps, guidance 7.5, float16, one RTX 4090.

    FID is of 2000 pictures against 5000 of ImageNet's validation set; attention is einsum.

    Attributes:
        table: of which paper; says where it is known second-hand only.
        setting: as ours is called.
        ratio: of tokens removed.
        fid: Fréchet inception distance; None where it is not known.
        seconds: a picture.
        gigabytes: of memory a picture, at the largest batch.
    """

    table: str
    setting: str
    ratio: float
    fid: float | None = None
    seconds: float | None = None
    gigabytes: float | None = None

    @property
    def speedup(self) -> float | None:
        """Over no merging there."""
        return None if self.seconds is None else _UNMERGED[1] / self.seconds


SIZE = 512  # of the papers' pictures
_PAPER = "Bolya and Hoffman 2023 (arXiv 2303.17604)"
_NAIVE = f"{_PAPER}, table 1 (naive), known second-hand"
_FINAL = f"{_PAPER}, table 4 (tomesd)"
_UNMERGED = (33.12, 3.09, 3.41)

PUBLISHED = (
    Published(_NAIVE, "unmerged", 0.0, *_UNMERGED),
    Published(_NAIVE, "appendix_f 0.1", 0.1, 33.14, 2.60, 2.99),
    Published(_NAIVE, "appendix_f 0.2", 0.2),
    Published(_NAIVE, "appendix_f 0.3", 0.3, 33.60, 2.11, 1.71),
    Published(_NAIVE, "appendix_f 0.4", 0.4),
    Published(_NAIVE, "appendix_f 0.5", 0.5, 38.95, 1.53, 0.89),
    Published(_FINAL, "unmerged", 0.0, *_UNMERGED),
    Published(_FINAL, "tomesd 0.1", 0.1, 32.86, 2.56, 2.99),
    Published(_FINAL, "tomesd 0.2", 0.2, 32.86, 2.29, 2.17),
    Published(_FINAL, "tomesd 0.3", 0.3, 32.80, 2.06, 1.71),
    Published(_FINAL, "tomesd 0.4", 0.4, 32.87, 1.85, 1.26),
    Published(_FINAL, "tomesd 0.5", 0.5, 33.02, 1.65, 0.89),
    Published(_FINAL, "tomesd 0.6", 0.6, 33.37, 1.52, 0.60),
)


def paper_rows(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The papers' rows with our own beside them: ratio, FID, seconds and memory a picture.

    Args:
        table: rows of `make_table`; a preset that stands there without a ratio is found, too.
    """
    rows = []
    for theirs in PUBLISHED:
        preset = theirs.setting.split()[0]
        own = [r for r in table if r["setting"] == theirs.setting]
        as_it_is = (r for r in table if r["setting"] == preset)
        own += [r for r in as_it_is if r["tome"].get("ratio") == theirs.ratio]
        own.sort(key=lambda r: r["size"] != SIZE)  # theirs before others
        row = {**asdict(theirs), "speedup": theirs.speedup, "size": None}
        if own:
            row |= {
                "size": own[0]["size"],
                "own_fid": own[0]["measures"].get(FRECHET),
                "own_seconds": own[0]["seconds"],
                "own_gib": own[0]["gib"],
            }
        rows.append(row)
    return rows
