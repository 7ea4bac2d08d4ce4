"""A page on which merged tokens can be explored; one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm.evaluation.merge_map import NEAR, MergeMap
from ldm.evaluation.page import data_url, filled
from ldm.images import Pixels, encode_png

TEMPLATE = Path(__file__).with_suffix(".html")


def merge_page(
    picture: Pixels, maps: Iterable[tuple[int, int, MergeMap]], prompt: str, about: str
) -> str:
    """The page's HTML.

    Args:
        picture: (H, W, 3).
        maps: step, block and map; each block's maps have the same steps.
        prompt: its headline.
        about: how the picture was made, in one line.
    """
    data = {
        "prompt": prompt,
        "about": about,
        "near": NEAR,
        "picture": data_url("png", encode_png(picture)),
        "maps": [
            {
                "step": step,
                "block": block,
                "h": one.size[0],
                "w": one.size[1],
                "kept": one.n_kept,
                "text": one.describe(),
                "groups": _encoded(one.groups),
                "into": _encoded(one.merged_into),
            }
            for step, block, one in maps
        ],
    }
    return filled(TEMPLATE, data)


def _encoded(numbers: NDArray[np.int64]) -> str:
    return base64.b64encode(numbers.astype("<u4").tobytes()).decode()
