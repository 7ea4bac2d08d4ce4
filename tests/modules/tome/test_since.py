"""Methods published since token merging, each against its definition written out."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config import load_preset
from ldm.errors import InputError
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.tome.config import ToMeConfig, tile_side
from ldm.modules.tome.keys import METHODS, METRICS, PLACES
from ldm.modules.tome.merger import TokenMerger
from ldm.modules.tome.since import covering
from tests.modules.tome.test_presets import CONTEXT, H, N, W, block, rest, run, x

__all__ = ["block", "x"]  # fixtures


def tiles(rows: int, columns: int) -> list[list[int]]:
    return [
        [y * W + x for y in range(top, top + rows) for x in range(left, left + columns)]
        for top, left in product(range(0, H, rows), range(0, W, columns))
    ]


def cosines(tokens: Tensor) -> Tensor:
    unit = F.normalize(tokens, dim=-1)
    return unit @ unit.mT


@pytest.mark.parametrize("is_random", [False, True])
def test_hypertile(block: BasicTransformerBlock, x: Tensor, is_random: bool) -> None:
    found = run(block, x, "hypertile", stride=[3, 4], random=is_random)
    options = torch.randint(2, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = (3, 4)[options[0] if is_random else 0]
    columns = (4, 8)[options[1] if is_random else 0]
    normed, attended = block.norm1(x), torch.zeros_like(x)
    for tile in tiles(rows, columns):
        attended[:, tile] = block.attn1(normed[:, tile])
    torch.testing.assert_close(found, rest(block, x, attended))


def test_the_sides_of_tiles_divide_the_picture() -> None:
    """The numbers of tiles that HyperTile has for its tiles of 32 and two options."""
    expected = {64: (2, 1), 96: (3, 2), 128: (4, 2), 192: (6, 4), 60: (1, 1)}
    for side, counts in expected.items():
        assert tuple(side // tile_side(side, 32, option) for option in (0, 1)) == counts
    assert tile_side(16, 32) == 16


def test_tofu(block: BasicTransformerBlock, x: Tensor) -> None:
    """With all sources merged, so that their order does not matter."""
    found = run(block, x, "tofu", ratio=0.75, random=False)
    dst = [y * W + x for y in range(0, H, 2) for x in range(0, W, 2)]
    normed, merged, groups = block.norm1(x), torch.zeros(2, len(dst), x.shape[2]), []
    for row in range(2):
        into = cosines(x[row])[:, dst].argmax(1)
        into[dst] = torch.arange(len(dst))
        groups.append(into)
        for j in range(len(dst)):
            members = normed[row, into == j]
            direction = F.normalize(F.normalize(members, dim=1).sum(0), dim=0)
            merged[row, j] = direction * members.norm(dim=1).mean()
    out = block.attn1(merged)
    attended = torch.stack([one[into] for one, into in zip(out, groups, strict=True)])
    torch.testing.assert_close(found, rest(block, x, attended))


@pytest.mark.parametrize("is_random", [False, True])
def test_sito(block: BasicTransformerBlock, x: Tensor, is_random: bool) -> None:
    found = run(block, x, "sito", random=is_random)
    noise = torch.randn(1, N, generator=torch.Generator().manual_seed(0))[0]
    normed, attended = block.norm1(x), torch.zeros_like(x)
    for row in range(2):
        cosine = cosines(x[row])
        score = cosine.sum(1) + (0.1 * noise if is_random else 0)
        base = [max(cell, key=lambda i: float(score[i])) for cell in tiles(2, 2)]
        others = sorted({*range(N)} - {*base}, key=lambda i: -float(cosine[i, base].max()))
        kept = sorted({*range(N)} - {*others[: N // 2]})
        out = block.attn1(normed[row : row + 1, kept])[0]
        copied = [kept.index(i) if i in kept else int(cosine[i, kept].argmax()) for i in range(N)]
        attended[row] = out[copied]
    torch.testing.assert_close(found, rest(block, x, attended))


def test_ca_tome(block: BasicTransformerBlock, x: Tensor) -> None:
    threshold = 0.45
    found = run(block, x, "ca_tome", similarity=threshold, random=False)
    dst = [y * W + x for y in range(0, H, 2) for x in range(0, W, 2)]
    normed, attended, n_kept = block.norm1(x), torch.zeros_like(x), []
    for row in range(2):
        best, nearest = cosines(x[row])[:, dst].max(1)
        own = [i for i in range(N) if i in dst or best[i] < threshold]
        into = [own.index(i if i in own else dst[int(nearest[i])]) for i in range(N)]
        matrix = F.one_hot(torch.tensor(into), len(own)).float().T
        out = block.attn1((matrix / matrix.sum(1, keepdim=True) @ normed[row])[None])[0]
        attended[row] = out[into]
        n_kept.append(len(own))
    assert len(dst) < n_kept[0] < N
    torch.testing.assert_close(found, rest(block, x, attended))


def test_ibtm(block: BasicTransformerBlock, x: Tensor) -> None:
    """Guidance in the last call decides about a picture's pool, the same in both halves."""
    merger = TokenMerger(ToMeConfig.from_mapping(load_preset("ibtm")))
    merger.is_guided = True
    merger.begin_run(seed=3)
    change = torch.rand(1, H, W, generator=torch.Generator().manual_seed(4))
    merger.note_guidance(torch.cat([torch.zeros(1, 4, H, W), change[:, None].expand(1, 4, H, W)]))
    found = block(x, CONTEXT, merger.block(x, (H, W), 1))
    numbers = torch.rand(N, generator=torch.Generator().manual_seed(3))
    pool = change.flatten().argsort(descending=True)[: N // 2].tolist()
    dst = sorted(pool, key=lambda i: -float(numbers[i]))[: N // 4]
    src = [i for i in range(N) if i not in dst]
    normed, attended = block.norm1(x), torch.zeros_like(x)
    for row in range(2):
        best, nearest = cosines(x[row])[src][:, dst].max(1)
        gone = best.topk(N // 2).indices.tolist()
        into = {src[i]: dst[int(nearest[i])] for i in gone}
        own = [i for i in range(N) if i not in into]
        place = [own.index(into.get(i, i)) for i in range(N)]
        matrix = F.one_hot(torch.tensor(place), len(own)).float().T
        out = block.attn1((matrix / matrix.sum(1, keepdim=True) @ normed[row])[None])[0]
        attended[row] = out[place]
    torch.testing.assert_close(found, rest(block, x, attended))


@pytest.mark.parametrize("is_guided", [False, True])
def test_toma(block: BasicTransformerBlock, x: Tensor, is_guided: bool) -> None:
    """Greedily by the sum of each token's cosine to the nearest destination.

    Of two tokens that are nearest to each other, either is as good, so the choice is checked.
    """
    found = run(block, x, "toma", is_guided, stride=[4, 4], apply_to=["attn"])
    merge, unmerge = torch.zeros(2, N // 2, N), torch.zeros(2, N, N // 2)
    for row, (number, tile) in product(range(2), enumerate(tiles(4, 4))):
        cosine = cosines(x[0 if is_guided else row, tile])
        chosen = covering(cosine[None], 8)[0].tolist()
        for n in range(8):
            sums = [cosine[:, [*chosen[:n], v]].amax(1).sum() for v in range(16)]
            torch.testing.assert_close(sums[chosen[n]], max(sums), atol=1e-3, rtol=0)
        assert len({*chosen}) == 8
        weights = (1000 * cosines(x[row, tile])[chosen]).softmax(0)
        place = slice(8 * number, 8 * number + 8)
        merge[row, place, tile] = weights / weights.sum(1, keepdim=True)
        unmerge[row, tile, place] = weights.T
    normed = block.norm1(x)
    attended = unmerge @ block.attn1(merge @ normed)
    torch.testing.assert_close(found, rest(block, x, attended), atol=1e-4, rtol=1e-4)


def test_work_is_counted_as_it_is_done() -> None:
    merger = TokenMerger(ToMeConfig.from_mapping({"method": "tiles", "stride": [4, 4]}))
    tokens = torch.randn(2, 64, 8)
    merger.begin_call(8, 8, torch.tensor([5]))
    decision = merger.block(tokens, (8, 8), 1)
    assert decision.removed == 48
    merger.end_call()
    assert merger.saved_work() == 0.75
    assert "tiles 4x4" in merger.report()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "tiles", "apply_to": "kv"}, "leave apply_to out"),
        ({"method": "tiles", "ratio": 0.5}, "ratio=0.5 means nothing for method tiles"),
        ({"method": "prune", "ratio": 0.8}, r"prune with stride \[2, 2\] can remove at most 0.75"),
        ({"method": "cover", "ratio": 0.8}, r"cover with stride \[2, 2\] can remove at most 0.75"),
        ({"method": "cover", "random": True, "ratio": 0.5}, "means nothing for method cover"),
        ({"ratio": 0.5, "mean": "long"}, "mean='long': must be one of plain, norm"),
    ],
)
def test_what_cannot_be_is_said(keys: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ToMeConfig.from_mapping(keys)


def test_nothing_is_cut_where_a_tile_holds_the_picture(
    block: BasicTransformerBlock, x: Tensor
) -> None:
    merger = TokenMerger(ToMeConfig.from_mapping({"method": "tiles", "stride": [32, 32]}))
    decision = merger.block(x, (H, W), 1)
    assert decision.removed == 0
    assert torch.equal(block(x, CONTEXT, decision), block(x, CONTEXT))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_whatever_is_not_refused_can_be_drawn(
    block: BasicTransformerBlock, x: Tensor, method: str
) -> None:
    amount = {"kth": {"k": 4}, "downsample": {}, "tiles": {"stride": [3, 4]}}
    n_drawn = 0
    for metric, place, mean in product((None, *METRICS), PLACES, ("plain", "norm")):
        keys = {"method": method, "metric": metric, "apply_to": place, "mean": mean}
        try:
            config = ToMeConfig.from_mapping(keys | amount.get(method, {"ratio": 0.5}))
        except InputError:
            continue
        out = block(x, CONTEXT, TokenMerger(config).block(x, (H, W), 1))
        assert out.isfinite().all()
        assert not torch.equal(out, block(x, CONTEXT))
        n_drawn += 1
    assert n_drawn
