"""A figure that explains matching on a grid: one small picture, its cells, matches and groups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ldm.modules.tome.merge import bipartite_soft_matching_random2d, merge_source
from ldm.numbered import make_folder
from ldm.util import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

H, W, STRIDE = 6, 8, 2
RATIO = 0.5


def small_picture() -> np.ndarray:
    """A house before a hill under the sky, one colour a token: (H, W, 3), 0 to 1."""
    picture = np.empty((H, W, 3))
    picture[:] = (0.62, 0.80, 0.95)
    picture[3:, :] = (0.55, 0.75, 0.45)
    picture[2, 4:] = (0.55, 0.75, 0.45)
    picture[2:5, 1:4] = (0.80, 0.25, 0.20)
    picture[1, 1:4] = (0.35, 0.25, 0.22)
    picture[0, 6:] = (0.98, 0.90, 0.60)
    shade = np.random.default_rng(4).uniform(-0.04, 0.04, (H, W, 1))
    return np.clip(picture + shade, 0, 1)


def groups_of(picture: np.ndarray, ratio: float = RATIO) -> tuple[np.ndarray, np.ndarray]:
    """What tomesd's matching does to a picture's colours.

    Args:
        picture: (H, W, 3).
        ratio: share of tokens removed.

    Returns: the group of each token, (H * W,), and the merged picture, (H, W, 3).
    """
    tokens = torch.from_numpy(picture).float().reshape(1, H * W, 3)
    centred = tokens - tokens.mean(1, keepdim=True)  # colours have no negative cosines
    merge, unmerge = bipartite_soft_matching_random2d(
        centred, W, H, STRIDE, STRIDE, int(ratio * H * W), no_rand=True
    )
    members = merge_source(merge, tokens)[0]  # (groups, N), 1 where a token belongs to a group
    merged = unmerge(merge(tokens))
    return members.argmax(0).numpy(), merged.reshape(H, W, 3).numpy()


def draw(path: Path) -> None:
    """Write the figure, four panels from left to right."""
    from matplotlib.figure import Figure

    picture = small_picture()
    groups, merged = groups_of(picture)
    destinations = np.array([y * W + x for y in range(0, H, STRIDE) for x in range(0, W, STRIDE)])
    titles = (
        "1  48 tokens in cells of 2x2;\na dot is the cell's destination",
        "2  each source looks for its\nmost similar destination",
        "3  the most similar half is merged:\n24 groups are left",
        "4  unmerged: every token\ngets its group's mean",
    )
    figure = Figure(figsize=(13, 3.3), layout="constrained")
    axes = figure.subplots(1, 4)
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xticks([])
        ax.set_yticks([])
    for ax in axes[:3]:
        ax.imshow(picture)
        _cells(ax)
        ax.plot(destinations % W, destinations // W, "o", color="black", markersize=6)
    full, _ = groups_of(picture, ratio=1 - 1 / STRIDE**2)
    _arrows(axes[1], full, destinations)
    _arrows(axes[2], groups, destinations)
    axes[3].imshow(merged)
    make_folder(path.parent)
    with written_whole(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _cells(ax: Axes) -> None:
    for x in range(0, W + 1, STRIDE):
        ax.axvline(x - 0.5, color="white", linewidth=2)
    for y in range(0, H + 1, STRIDE):
        ax.axhline(y - 0.5, color="white", linewidth=2)


def _arrows(ax: Axes, groups: np.ndarray, destinations: np.ndarray) -> None:
    """An arrow from each merged token to its group's destination."""
    target = {groups[d]: d for d in destinations}
    for token, group in enumerate(groups):
        goal = target.get(group, token)
        if goal != token:
            style = {"arrowstyle": "-|>", "color": "black", "shrinkB": 4, "linewidth": 0.9}
            head, tail = ((n % W, n // W) for n in (goal, token))
            ax.annotate("", head, xytext=tail, arrowprops=style)
