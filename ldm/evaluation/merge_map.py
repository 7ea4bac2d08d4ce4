"""Which tokens were merged into which: recorded while a picture is drawn, and drawn over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ldm import images
from ldm.images import Pixels
from ldm.modules.tome.block import BlockMerge
from ldm.modules.tome.config import cells
from ldm.modules.tome.merger import TokenMerger

MAP_SIDE = 512  # pixels that the longer side of a map has at least
STRIP_SIDE = 256
STRIP_LENGTH = 8  # model calls in a strip
FLATNESS = 0.8  # share of a group's mean colour in what is drawn of it

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class MergeMap:
    """Which group each token of a block was in, in one model call, for one picture.

    Attributes:
        size: h, w in tokens.
        groups: the group of each token, (h * w,); numbers from 0, each of which occurs.
        destinations: the tokens into which others may be merged, (n,).
        places: what is merged: the key ``apply_to``.
    """

    size: tuple[int, int]
    groups: Integers
    destinations: Integers
    places: tuple[str, ...]

    @cached_property
    def counts(self) -> Integers:
        """Tokens in each group, (n_kept,)."""
        return np.bincount(self.groups)

    @cached_property
    def merged_into(self) -> Integers:
        """For each token the one that it was merged into, (h * w,); itself where it was not."""
        heads = np.zeros(len(self.counts), dtype=np.int64)
        heads[self.groups] = np.arange(len(self.groups))
        heads[self.groups[self.destinations]] = self.destinations
        return heads[self.groups]

    @property
    def n_tokens(self) -> int:
        """Tokens before merging."""
        return len(self.groups)

    @property
    def n_kept(self) -> int:
        """Tokens after merging."""
        return len(self.counts)

    @property
    def mean_distance(self) -> float:
        """How far tokens lie from those they were merged into, in tokens; 0 where none was."""
        moved = np.flatnonzero(self.merged_into != np.arange(self.n_tokens))
        if not len(moved):
            return 0.0
        here, there = (np.divmod(t, self.size[1]) for t in (moved, self.merged_into[moved]))
        return float(np.hypot(here[0] - there[0], here[1] - there[1]).mean())

    def describe(self) -> str:
        """Numbers of tokens, and how they were merged, in one line."""
        if self.n_kept == self.n_tokens:
            return f"{self.n_tokens} tokens, none merged"
        return (
            f"{self.n_tokens} -> {self.n_kept} tokens ({'+'.join(self.places)}), "
            f"up to {self.counts.max()} in one, {self.mean_distance:.1f} tokens apart"
        )


class Recorder:
    """Keeps what was merged in the last sampling run.

    Args:
        merger: of the model; the recorder becomes its observer.
    """

    def __init__(self, merger: TokenMerger) -> None:
        self._merger = merger
        self._calls: list[list[tuple[BlockMerge, Integers, Integers]]] = []
        merger.observer = self._observe

    def _observe(self, call: int, blocks: list[BlockMerge]) -> None:
        if call == 0:  # another run
            self._calls = []
        self._calls.append([(block, _groups(block), destinations(block)) for block in blocks])

    def maps(self, picture: int = 0, n_pictures: int = 1) -> list[list[MergeMap]]:
        """The maps of one picture: a list of model calls, each a list of blocks in their order.

        With guidance they are those of the half that sees the prompt.

        Args:
            picture: which one of the batch.
            n_pictures: how many the batch has.
        """
        self._merger.report()  # ends the last call, so that it is observed
        return [
            [
                MergeMap(
                    block.size,
                    groups[(picture - n_pictures) % len(groups)],
                    targets,
                    block.config.apply_to,
                )
                for block, groups, targets in blocks
            ]
            for blocks in self._calls
        ]


def _groups(block: BlockMerge) -> Integers:
    """Groups of a block's tokens, (B, N); with nothing merged one row does for all."""
    plan = block.plan
    if plan is None or plan.groups is None or plan.sizes is None:
        return np.arange(block.n_tokens)[None]
    rows = plan.groups.view(len(plan.sizes), -1)
    first = torch.arange(len(rows), device=rows.device)[:, None] * plan.n_kept
    return (rows - first).cpu().numpy()


def destinations(block: BlockMerge) -> Integers:
    """The tokens into which a block's method merges others, rising, (n,); empty without a plan."""
    config, plan, n = block.config, block.plan, block.n_tokens
    if plan is None or plan.is_identity:
        return np.empty(0, dtype=np.int64)
    if plan.chosen is not None:
        return plan.chosen[: plan.n_kept].cpu().numpy()
    if config.method == "bipartite":
        return np.arange(1, n, 2)
    if config.method == "kth":
        k = min(config.group(n), n)
        return np.arange(k - 1, n - n % k, k)
    draw = None if block._draw is None else block._draw.cpu()
    if config.method == "random":
        assert draw is not None
        return draw[0].argsort()[block.removed :].sort().values.numpy()
    h, w = block.size
    sy, sx = min(config.stride[0], h), min(config.stride[1], w)
    rows, columns = cells(h, w, config.stride)
    roll = np.zeros((rows, columns), dtype=np.int64) if draw is None else draw.numpy()
    y = np.arange(rows)[:, None] * sy + roll // sx
    x = np.arange(columns) * sx + roll % sx
    return np.sort((y * w + x).flatten())


# --- which to draw ------------------------------------------------------------------------------


def default_block(calls: Sequence[Sequence[MergeMap]]) -> int:
    """The first of the blocks with the most tokens, among those where something was merged."""
    merged = [
        (-one.n_tokens, number)
        for blocks in calls
        for number, one in enumerate(blocks)
        if one.n_kept < one.n_tokens
    ]
    return min(merged)[1] if merged else 0


def default_steps(n_calls: int) -> list[int]:
    """The first, the middle and the last model call."""
    return sorted({0, n_calls // 2, n_calls - 1})


def strip_steps(n_calls: int) -> list[int]:
    """Model calls for a strip, evenly spaced from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, n_calls - 1, STRIP_LENGTH).tolist()})


# --- drawing ------------------------------------------------------------------------------------


def draw_map(picture: Pixels, merge_map: MergeMap, side: int = MAP_SIDE) -> Pixels:
    """Draw a map over a picture.

    Tokens that were merged are flat areas in the mean colour of their group, with a line around
    neighbours of one group and a dot on the token that the others were merged into; where nothing
    was merged, the picture is seen.

    Args:
        picture: (H, W, 3).
        merge_map: of any block.
        side: the result's longer side, in pixels, is at least this; it is a multiple of H, W.
    """
    zoom = -(-side // max(picture.shape[:2]))
    height, width = (zoom * length for length in picture.shape[:2])
    shown = images.fit(picture, height, width).astype(np.float32)
    h, w = merge_map.size
    token = np.arange(height)[:, None] * h // height * w + np.arange(width) * w // width
    owner = merge_map.groups[token]
    is_merged = (merge_map.counts > 1)[owner]

    area = np.bincount(owner.flatten())
    means = [np.bincount(owner.flatten(), shown[..., c].flatten()) / area for c in range(3)]
    tint = np.stack(means, axis=1)[owner]
    shown = np.where(is_merged[..., None], FLATNESS * tint + (1 - FLATNESS) * shown, shown)

    ink = np.where(shown.mean(axis=2, keepdims=True) < 110, 255.0, 0.0)
    cell = min(height / h, width / w)
    line = _borders(owner, is_merged, thickness=1 + (cell >= 24))
    shown = np.where(line[..., None], 0.45 * shown + 0.55 * ink, shown)
    heads = merge_map.destinations
    heads = heads[merge_map.counts[merge_map.groups[heads]] > 1]
    rows, columns = (heads // w + 0.5) * height / h, (heads % w + 0.5) * width / w
    for radius, value in ((cell / 5 + 1, 0.0), (cell / 5, 255.0)):
        shown[_dots((height, width), rows, columns, radius)] = value
    return np.rint(shown).astype(np.uint8)


def _borders(owner: Integers, is_merged: NDArray[np.bool_], thickness: int) -> NDArray[np.bool_]:
    """Where neighbouring pixels belong to different groups, one of them of several tokens."""
    line = np.zeros(owner.shape, dtype=bool)
    for shift in range(1, thickness + 1):
        for here, there in (
            (np.s_[shift:], np.s_[:-shift]),
            (np.s_[:, shift:], np.s_[:, :-shift]),
        ):
            differ = (owner[here] != owner[there]) & (is_merged[here] | is_merged[there])
            line[here] |= differ
    return line


def _dots(
    shape: tuple[int, int], rows: NDArray[np.float64], columns: NDArray[np.float64], radius: float
) -> NDArray[np.bool_]:
    """Discs around points, (H, W)."""
    reach = np.arange(-int(radius) - 1, int(radius) + 2)
    y = np.floor(rows).astype(int)[:, None, None] + reach[:, None]
    x = np.floor(columns).astype(int)[:, None, None] + reach
    distance = np.hypot(y + 0.5 - rows[:, None, None], x + 0.5 - columns[:, None, None])
    y, x = np.broadcast_arrays(y, x)
    is_inside = (distance <= radius) & (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
    dots = np.zeros(shape, dtype=bool)
    dots[y[is_inside], x[is_inside]] = True
    return dots


def draw_strip(picture: Pixels, maps: Mapping[int, MergeMap]) -> Pixels:
    """The picture, and beside it a small map for each of some model calls.

    Args:
        picture: (H, W, 3).
        maps: number of the call -> map, in the order in which they are shown.
    """
    zoom = -(-STRIP_SIDE // max(picture.shape[:2]))
    height, width = (zoom * length for length in picture.shape[:2])
    cells = [images.label(images.fit(picture, height, width), ["the picture", ""])]
    for step, one in maps.items():
        lines = [f"step {step}", f"{one.n_tokens} -> {one.n_kept} tokens"]
        cells.append(images.label(draw_map(picture, one, STRIP_SIDE), lines))
    return images.make_grid(cells, len(cells))
