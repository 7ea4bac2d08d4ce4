"""Methods published since, as plans: downsampling, tiles, pruning, coverage, means that keep norms.

They stand here to be compared with; each takes a few dozen lines.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules.tome.config import cells, tile_side
from ldm.modules.tome.plan import MergePlan

POOL = 2  # tokens for each destination that is drawn from them
NOISE = 0.1  # of SiTo's scores
TIE = 1e-5  # what a token's number counts against the gain in cosines
SHARPNESS = 1000.0  # of ToMA's weights: nearly one destination for each token


@dataclass(frozen=True)
class Tiled(MergePlan):
    """A plan that acts in tiles of ``tile`` rows and columns of a picture of ``size`` tokens."""

    size: tuple[int, int] = (1, 1)
    tile: tuple[int, int] = (1, 1)

    def cut(self, x: Tensor) -> Tensor:
        """(B, h * w, C) -> (B, tiles, tokens of a tile, C)."""
        (h, w), (rows, columns) = self.size, self.tile
        x = x.reshape(len(x), h // rows, rows, w // columns, columns, -1).transpose(2, 3)
        return x.reshape(len(x), -1, rows * columns, x.shape[-1])

    def joined(self, x: Tensor) -> Tensor:
        """(B, tiles, tokens of a tile, C) -> (B, h * w, C)."""
        (h, w), (rows, columns) = self.size, self.tile
        x = x.reshape(len(x), h // rows, w // columns, rows, columns, -1).transpose(2, 3)
        return x.reshape(len(x), h * w, -1)


@dataclass(frozen=True)
class TilePlan(Tiled):
    """Attention within tiles: they become rows of the batch."""

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """(B, h * w, C) -> (B * tiles, tokens of a tile, C)."""
        return self.cut(x).flatten(0, 1)

    def unmerge(self, x: Tensor) -> Tensor:
        """(B * tiles, tokens of a tile, C) -> (B, h * w, C)."""
        return self.joined(x.unflatten(0, (-1, self.n_tokens // self.n_kept)))


def plan_tiles(
    size: tuple[int, int], stride: tuple[int, int], draw: Tensor | None = None
) -> MergePlan:
    """Let tokens attend to those of their own tile alone.

    Source: HyperTile (tfernd/HyperTile 0.1.5), ``split_attention``.

    Args:
        size: h, w.
        stride: the least rows and columns of a tile; it has the next number that divides the side.
        draw: for each side whether that or the one after it is taken, (2,); None: that.
    """
    options = (0, 0) if draw is None else draw.flatten().tolist()
    sides = zip(size, stride, options, strict=True)
    tile = tuple(tile_side(side, least, int(option)) for side, least, option in sides)
    n_tokens, n_kept = size[0] * size[1], tile[0] * tile[1]
    if n_kept == n_tokens:
        return MergePlan.identity()
    # groups without content: a plan that has none counts as the identity
    return TilePlan(n_tokens, n_kept, groups=torch.empty(0), size=size, tile=(tile[0], tile[1]))


@torch.no_grad()
def plan_downsample(
    n_rows: int, size: tuple[int, int], stride: tuple[int, int], device: torch.device
) -> MergePlan:
    """Let one token of every cell speak for it, the middle one (of two, the second).

    Source: Smith et al. 2024, ToDo (arXiv 2402.13573).

    Args:
        n_rows: batch rows.
        size: h, w.
        stride: by how much rows and columns shrink; of leftovers some cells grow larger.
        device: where the plan is needed.
    """
    new_h, new_w = cells(*size, stride)
    if (new_h, new_w) == size:
        return MergePlan.identity()
    y, cell_y = _resize(size[0], new_h, device)
    x, cell_x = _resize(size[1], new_w, device)
    groups = (cell_y[:, None] * new_w + cell_x).flatten()
    chosen = (y[:, None] * size[1] + x).flatten()
    return MergePlan.from_groups(groups.expand(n_rows, -1), new_h * new_w, chosen)


def _resize(n: int, new: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of n stay, (new,), and the nearest of them for each, (n,); as ``nearest-exact``."""
    chosen = (2 * torch.arange(new, device=device) + 1) * n // (2 * new)
    return chosen, (2 * torch.arange(n, device=device) + 1) * new // (2 * n)


def plan_prune(
    metric: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    r: int,
    noise: Tensor | None = None,
) -> MergePlan:
    """Leave out the r tokens most similar to a base token, and copy results back from what stays.

    A cell's base token is the one with the largest sum of cosines to all tokens. A pruned token
    gets the result of the most similar token that stays, base or not.

    Source: SiTo, Zhang et al., AAAI 2025 (EvelynZhang-epiclab/SiTo).

    Args:
        metric: (B, h * w, C).
        size: h, w.
        stride: rows and columns of tokens in a cell.
        r: tokens removed.
        noise: unit normal, (1, h * w), of which a tenth is added to the sums; None: nothing.
    """
    (h, w), (sy, sx) = size, (min(stride[0], size[0]), min(stride[1], size[1]))
    rows, columns = cells(h, w, stride)
    unit = F.normalize(metric.float(), dim=2).nan_to_num()
    cosine = unit @ unit.mT
    score = cosine.sum(2)
    if noise is not None:
        score = score + NOISE * noise.to(score)
    position = torch.arange(h * w, device=metric.device).view(h, w)
    inside = position[: rows * sy, : columns * sx].reshape(rows, sy, columns, sx)
    inside = inside.transpose(1, 2).reshape(-1, sy * sx)
    base = score[:, inside].argmax(2)[..., None]
    base = inside.expand(len(metric), -1, -1).gather(2, base)[..., 0]
    is_base = torch.zeros_like(score, dtype=torch.bool).scatter(1, base, True)
    to_base = cosine.masked_fill(~is_base[:, None], -2).amax(2).masked_fill(is_base, -3)
    pruned = to_base.topk(r, dim=1).indices
    is_pruned = torch.zeros_like(is_base).scatter(1, pruned, True)
    kept = is_pruned.to(torch.uint8).argsort(dim=1, stable=True)[:, : h * w - r]
    copied = cosine.masked_fill(is_pruned[:, None], -2).argmax(2)
    own = torch.where(is_pruned, copied, position.flatten())
    place = (~is_pruned).long().cumsum(1) - 1
    return MergePlan.from_groups(place.gather(1, own), h * w - r, kept)


def favoured(
    draw: Tensor, guidance: Tensor, size: tuple[int, int], n_destinations: int, n_rows: int
) -> Tensor:
    """Random numbers that put destinations among the tokens that guidance changes most.

    Source: IBTM, Wu et al., ICCV 2025 (arXiv 2411.16720). How large their pool is was not found;
    here it is twice as large as what is drawn from it.

    Args:
        draw: below 1, (1, h * w).
        guidance: of the last step, (pictures, H, W), at the latents' size.
        size: h, w.
        n_destinations: how many are drawn.
        n_rows: of the batch: each picture without and with its prompt.

    Returns: (n_rows, h * w), larger by 1 in the pool.
    """
    here = F.interpolate(guidance[:, None], size, mode="area").flatten(1)
    n_pool = min(POOL * n_destinations, here.shape[1])
    pool = here.topk(n_pool, dim=1).indices
    drawn = draw.to(here).expand(len(here), -1) + torch.zeros_like(here).scatter(1, pool, 1.0)
    return drawn.repeat(n_rows // len(here), 1)


@dataclass(frozen=True)
class CoverPlan(Tiled):
    """Merges and unmerges by products with a matrix for each tile, (B, tiles, kept, tokens).

    Its destinations are tokens of the tile, (B, tiles, kept).
    """

    weights: Tensor | None = None
    destinations: Tensor | None = None

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """(B, h * w, C) -> (B, n_kept, C)."""
        assert self.weights is not None
        means = self.weights / self.weights.sum(3, keepdim=True)
        return (means.to(x.dtype) @ self.cut(x)).flatten(1, 2)

    def unmerge(self, x: Tensor) -> Tensor:
        """(B, n_kept, C) -> (B, h * w, C)."""
        assert self.weights is not None
        return self.joined(self.weights.mT.to(x.dtype) @ x.unflatten(1, self.weights.shape[1:3]))

    def shown(self) -> tuple[Tensor, Tensor]:
        """The destination that weighs most for each token, (B, h * w), and theirs, (B, n_kept)."""
        assert self.weights is not None
        assert self.destinations is not None
        number = torch.arange(self.n_kept, device=self.weights.device)
        number = number.view(self.weights.shape[1:3]).expand(len(self.weights), -1, -1)
        own = number.gather(2, self.weights.argmax(2)).scatter(2, self.destinations, number)
        token = torch.arange(self.n_tokens, device=own.device)[None, :, None]
        token = self.cut(token)[..., 0].expand(len(own), -1, -1)
        return self.joined(own)[..., 0], token.gather(2, self.destinations).flatten(1)


def plan_cover(
    metric: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    r: int,
    is_guided: bool = False,
) -> MergePlan:
    """Merge into destinations that cover each tile best, each token into several by a softmax.

    Destinations are chosen one after another, such that the sum over a tile of each token's cosine
    to the nearest of them grows most: for each picture its own, and in guidance the same for both
    of its rows.

    Source: ToMA, Lu et al., ICML 2025 (arXiv 2509.10918).

    Args:
        metric: (B, h * w, C).
        size: h, w.
        stride: the least rows and columns of a tile.
        r: tokens removed, as many in each tile.
        is_guided: the batch has two halves, of the same pictures.
    """
    tile = tile_side(size[0], stride[0]), tile_side(size[1], stride[1])
    n_tokens, n_inside = size[0] * size[1], tile[0] * tile[1]
    n_tiles = n_tokens // n_inside
    n_each = max(1, (n_tokens - r) // n_tiles)
    geometry = Tiled(size=size, tile=tile)
    unit = geometry.cut(F.normalize(metric.float(), dim=2).nan_to_num())
    n_rows = 2 if is_guided else 1  # of a picture
    own = unit[: len(unit) // n_rows].flatten(0, 1)
    chosen = covering(own @ own.mT, n_each).unflatten(0, (-1, n_tiles)).repeat(n_rows, 1, 1)
    index = chosen[..., None].expand(-1, -1, -1, unit.shape[3])
    logits = SHARPNESS * unit.gather(2, index) @ unit.mT
    return CoverPlan(
        n_tokens,
        n_tiles * n_each,
        groups=torch.empty(0),
        size=size,
        tile=tile,
        weights=logits.softmax(2),
        destinations=chosen,
    )


def covering(cosine: Tensor, n: int) -> Tensor:
    """Indices of n tokens of each tile, greedily; cosines (tiles, tokens, tokens)."""
    every = torch.arange(len(cosine), device=cosine.device)
    # Of two tokens that are nearest to each other either would do: rounding must not choose.
    later = TIE * torch.arange(cosine.shape[1], device=cosine.device)
    picks = [(cosine.sum(2) - later).argmax(1)]
    covered = cosine[every, picks[0]]
    is_free = torch.ones_like(covered, dtype=torch.bool)
    for _ in range(n - 1):
        is_free[every, picks[-1]] = False
        gain = (cosine - covered[:, None]).relu().sum(2).masked_fill(~is_free, -1) - later
        picks.append(gain.argmax(1))
        covered = torch.maximum(covered, cosine[every, picks[-1]])
    return torch.stack(picks, dim=1)


@dataclass(frozen=True)
class NormPlan(MergePlan):
    """A plan whose means are as long as the members are on average.

    A plain mean of vectors that point to different sides is shorter than they are.

    Source: MLERP of ToFu, Kim et al., WACV 2024 (arXiv 2312.01026).
    """

    @classmethod
    def of(cls, plan: MergePlan) -> MergePlan:
        """The same plan with such means."""
        if plan.is_identity:
            return plan
        plan = plan.ordered
        return cls(**{field.name: getattr(plan, field.name) for field in fields(MergePlan)})

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """As `MergePlan.merge`."""
        if mode != "mean":
            return super().merge(x, mode)
        lengths = x.float().norm(dim=2, keepdim=True)
        directions = super().merge(x.float() / lengths.clamp(min=1e-12))
        return (F.normalize(directions, dim=2) * super().merge(lengths)).to(x.dtype)
