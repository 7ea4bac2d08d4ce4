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
from ldm.modules.tome.config import cells
from ldm.modules.tome.decision import Decision
from ldm.modules.tome.merger import TokenMerger
from ldm.modules.tome.since import CoverPlan, TilePlan

MAP_SIDE = 512  # pixels that the longer side of a map has at least
TOKEN_SIDE = 16  # likewise of a token of square ones
STRIP_SIDE = 256
NEAR = 3.0  # tokens up to this distance are linked to the one that they were merged into
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

    @cached_property
    def distances(self) -> NDArray[np.float64]:
        """How far each token lies from the one that it was merged into, in tokens, (h * w,)."""
        here, there = (
            np.divmod(t, self.size[1]) for t in (np.arange(self.n_tokens), self.merged_into)
        )
        return np.hypot(here[0] - there[0], here[1] - there[1])

    def describe(self) -> str:
        """Numbers of tokens, and how they were merged, in one line."""
        n_merged = self.n_tokens - self.n_kept
        if n_merged == 0:
            return f"{self.n_tokens} tokens, none merged"
        away = self.distances.sum() / n_merged
        return (
            f"{self.n_tokens} -> {self.n_kept} tokens ({'+'.join(self.places)}), up to "
            f"{self.counts.max()} in one, on average from {away:.1f} tokens away"
        )


class Recorder:
    """Keeps what was merged in the last sampling run.

    Args:
        merger: of the model; the recorder becomes its observer.
    """

    def __init__(self, merger: TokenMerger) -> None:
        self._merger = merger
        self._calls: list[list[tuple[Decision, Integers, Integers]]] = []
        merger.observer = self._observe

    def _observe(self, call: int, blocks: list[Decision]) -> None:
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
        return [
            [
                MergeMap(
                    block.size,
                    groups[(picture - n_pictures) % len(groups)],
                    targets[(picture - n_pictures) % len(targets)],
                    block.config.apply_to,
                )
                for block, groups, targets in blocks
            ]
            for blocks in self._calls
        ]


def _groups(block: Decision) -> Integers:
    """Groups of a block's tokens, (B, N); with nothing merged one row does for all."""
    plan = block.plan
    if isinstance(plan, CoverPlan):
        return plan.shown()[0].cpu().numpy()
    if plan is None or plan.groups is None or plan.sizes is None:
        return np.arange(block.n_tokens)[None]
    rows = plan.groups.view(len(plan.sizes), -1)
    first = torch.arange(len(rows), device=rows.device)[:, None] * plan.n_kept
    groups = (rows - first).cpu().numpy()
    if plan.has_gaps:  # then rows have different numbers of groups
        groups = np.stack([np.unique(row, return_inverse=True)[1] for row in groups])
    return groups


def destinations(block: Decision) -> Integers:
    """The tokens into which a block's method merges others, (B or 1, n); none without a plan."""
    config, plan, n = block.config, block.plan, block.n_tokens
    if plan is None or plan.is_identity or isinstance(plan, TilePlan):
        return np.empty((1, 0), dtype=np.int64)
    if isinstance(plan, CoverPlan):
        return plan.shown()[1].cpu().numpy()
    if plan.chosen is not None:
        return (plan.chosen.view(-1, plan.n_kept) % n).cpu().numpy()
    if config.method == "bipartite":
        return np.arange(1, n, 2)[None]
    if config.method == "kth":
        k = min(config.group(n), n)
        return np.arange(k - 1, n - n % k, k)[None]
    draw = None if block.draw is None else block.draw.cpu()
    if config.method in ("random", "guided"):
        assert draw is not None
        n_sources = block.removed if config.method == "random" else config.removable(*block.size)
        return draw.argsort(dim=1)[:, n_sources:].sort(dim=1).values.numpy()
    h, w = block.size
    sy, sx = min(config.stride[0], h), min(config.stride[1], w)
    rows, columns = cells(h, w, config.stride)
    roll = np.zeros((rows, columns), dtype=np.int64) if draw is None else draw.numpy()
    y = np.arange(rows)[:, None] * sy + roll // sx
    x = np.arange(columns) * sx + roll % sx
    return np.sort((y * w + x).flatten())[None]


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


def draw_map(picture: Pixels, merge_map: MergeMap) -> Pixels:
    """Draw a map over a picture, with tokens large enough to be told apart.

    Merged tokens are flat areas in the mean colour of their group, with a line around neighbours of
    one group, a dot on the token that the others were merged into, and a line to it from those that
    are near. Where nothing was merged, the picture is seen.

    Args:
        picture: (H, W, 3).
        merge_map: of any block.
    """
    side = max(MAP_SIDE, TOKEN_SIDE * max(merge_map.size))
    shown, owner = _tinted(picture, merge_map, side)
    height, width = owner.shape
    h, w = merge_map.size
    cell = min(height / h, width / w)
    ink = np.where(shown.mean(axis=2, keepdims=True) < 110, 255.0, 0.0)
    line = _borders(owner, merge_map.counts > 1, thickness=1 + (cell >= 24))
    shown = np.where(line[..., None], 0.6 * shown + 0.4 * ink, shown)

    def middle(tokens: Integers) -> NDArray[np.float64]:
        return np.stack([(tokens // w + 0.5) * height / h, (tokens % w + 0.5) * width / w])

    tokens = np.arange(merge_map.n_tokens)
    is_near = (merge_map.distances > 0) & (merge_map.distances <= NEAR)
    ends = middle(tokens[is_near]), middle(merge_map.merged_into[is_near])
    along = np.linspace(0, 1, int(2 * NEAR * cell))[:, None]
    y, x = (start + along * (end - start) for start, end in zip(*ends, strict=True))
    shown[y.astype(int), x.astype(int)] = ink[y.astype(int), x.astype(int)]

    is_head = (merge_map.merged_into == tokens) & (merge_map.counts[merge_map.groups] > 1)
    for radius, value in ((cell / 6 + 1, 0.0), (cell / 6, 255.0)):
        shown[_dots((height, width), middle(tokens[is_head]), radius)] = value
    return np.rint(shown).astype(np.uint8)


def draw_strip(picture: Pixels, maps: Mapping[int, MergeMap]) -> Pixels:
    """The picture, and beside it a small map, of colours alone, for each of some model calls.

    Args:
        picture: (H, W, 3).
        maps: number of the call -> map, in the order in which they are shown.
    """
    zoom = -(-STRIP_SIDE // max(picture.shape[:2]))
    height, width = (zoom * length for length in picture.shape[:2])
    cells = [images.label(images.fit(picture, height, width), ["the picture", ""])]
    for step, one in maps.items():
        tinted = np.rint(_tinted(picture, one, STRIP_SIDE)[0]).astype(np.uint8)
        lines = [f"step {step}", f"{one.n_tokens} -> {one.n_kept} tokens"]
        cells.append(images.label(tinted, lines))
    return images.make_grid(cells, len(cells))


def _tinted(
    picture: Pixels, merge_map: MergeMap, side: int
) -> tuple[NDArray[np.floating], Integers]:
    """The picture with groups of several tokens in their mean colour, and each pixel's group.

    Args:
        picture: (H, W, 3).
        merge_map: of any block.
        side: the longer side of the result has at least so many pixels; it is enlarged by a whole
            number.
    """
    zoom = -(-side // max(picture.shape[:2]))
    height, width = (zoom * length for length in picture.shape[:2])
    shown = images.fit(picture, height, width).astype(np.float64)
    h, w = merge_map.size
    token = np.arange(height)[:, None] * h // height * w + np.arange(width) * w // width
    owner = merge_map.groups[token]
    area = np.bincount(owner.flatten())
    means = [np.bincount(owner.flatten(), shown[..., c].flatten()) / area for c in range(3)]
    tint = FLATNESS * np.stack(means, axis=1)[owner] + (1 - FLATNESS) * shown
    return np.where((merge_map.counts > 1)[owner][..., None], tint, shown), owner


def _borders(owner: Integers, is_merged: NDArray[np.bool_], thickness: int) -> NDArray[np.bool_]:
    """Where neighbouring pixels belong to different groups, one of them merged, (H, W).

    Args:
        owner: group of each pixel, (H, W).
        is_merged: whether a group has several tokens, (n_kept,).
        thickness: of the lines, in pixels.
    """
    line = np.zeros(owner.shape, dtype=bool)
    for shift in range(1, thickness + 1):
        for here, there in (
            (np.s_[shift:], np.s_[:-shift]),
            (np.s_[:, shift:], np.s_[:, :-shift]),
        ):
            is_either = is_merged[owner[here]] | is_merged[owner[there]]
            line[here] |= (owner[here] != owner[there]) & is_either
    return line


def _dots(shape: tuple[int, int], centres: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    """Discs around points (2, n), (H, W)."""
    reach = np.arange(-int(radius) - 1, int(radius) + 2)
    rows, columns = centres[..., None, None]
    y = np.floor(rows).astype(int) + reach[:, None]
    x = np.floor(columns).astype(int) + reach
    distance = np.hypot(y + 0.5 - rows, x + 0.5 - columns)
    y, x = np.broadcast_arrays(y, x)
    is_inside = (distance <= radius) & (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
    dots = np.zeros(shape, dtype=bool)
    dots[y[is_inside], x[is_inside]] = True
    return dots
