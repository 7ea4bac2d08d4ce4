"""Matching and merging against the published implementations' numbers, and their properties."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.errors import InputError
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.decision import Decision
from ldm.modules.tome.match import pieces, similarity
from ldm.modules.tome.merge import (
    bipartite_soft_matching,
    bipartite_soft_matching_random2d,
    do_nothing,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    plan_block,
    plan_grid,
    random_bipartite_soft_matching,
)
from ldm.modules.tome.merger import TokenMerger
from ldm.modules.tome.plan import MergePlan
from tests.golden_util import load_golden
from tests.tiny_models import planned

GOLDEN, METADATA = load_golden("merge")
CASES = json.loads(METADATA["cases"])
Pair = tuple[Callable[..., Tensor], Callable[..., Tensor]]


# --- published numbers ---------------------------------------------------------------------------


def golden_pair(case: str) -> Pair:
    """The pair of a golden case, from its name."""
    metric = GOLDEN["metric"]
    kind, *words = case.split("_")
    number = {word[0]: int(word[1:]) for word in words if word[1:].isdigit()}
    if kind == "bipartite":
        return bipartite_soft_matching(metric, number["r"], "cls" in words, "distill" in words)
    if kind == "kth":
        return kth_bipartite_soft_matching(metric, number["k"])
    if kind == "random":
        torch.manual_seed(int(words[-1].removeprefix("seed")))
        return random_bipartite_soft_matching(metric, number["r"])
    sx, sy = map(int, words[0].split("x"))
    generator = None
    if kind == "gridrand":
        generator = torch.Generator().manual_seed(int(words[-1].removeprefix("seed")))
    return bipartite_soft_matching_random2d(
        metric, 8, 8, sx, sy, number["r"], no_rand=generator is None, generator=generator
    )


def sort_tokens(x: Tensor) -> Tensor:
    """Tokens in the order of their channels, for results whose order is free."""
    return torch.stack([row[sorted(range(len(row)), key=lambda i: row[i].tolist())] for row in x])


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    merge, unmerge = golden_pair(case)
    payload, size = GOLDEN["x"], GOLDEN["size"]
    results = {
        "merged": merge(payload),
        "merged_sum": merge(payload, mode="sum"),
        "unmerged": unmerge(merge(payload)),
        "source": merge_source(merge, payload),
        "wavg": merge_wavg(merge, payload, size)[0],
        "wavg_size": merge_wavg(merge, payload, size)[1],
    }
    names = [name for name in GOLDEN if name.startswith(case + ".")]
    assert names
    for name in names:
        result, expected = results[name.split(".")[1]], GOLDEN[name]
        if case.startswith("grid") and not name.endswith(".unmerged"):
            result, expected = sort_tokens(result), sort_tokens(expected)
        torch.testing.assert_close(result, expected, msg=lambda text, name=name: f"{name}: {text}")


def spiral(n: int, a: float, b: float) -> Tensor:
    i = torch.arange(n, dtype=torch.float64)
    angle = a * i + b * i**2
    return torch.stack([angle.cos(), angle.sin()], -1)[None]


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def check_spiral(pair: Pair, n: int, merged: Tensor, unmerged: Tensor) -> None:
    payload = torch.arange(1, n + 1, dtype=torch.float64)[None, :, None]
    merge, unmerge = pair
    torch.testing.assert_close(merge(payload)[0, :, 0], merged, rtol=0, atol=1e-4)
    torch.testing.assert_close(unmerge(merge(payload))[0, :, 0], unmerged, rtol=0, atol=1e-4)


T = 20 / 3  # the mean of 4, 7 and 9


@pytest.mark.parametrize(
    ("r", "flags", "merged", "unmerged"),
    [
        (3, (), (3, 5, 2, T, 6, 4.5, 10), (4.5, 2, 3, T, 5, 6, T, 4.5, T, 10)),
        (5, (), (2, T, 14 / 3, 4.5, 10), (4.5, 2, 14 / 3, T, 14 / 3, 14 / 3, T, 4.5, T, 10)),
        (3, (True,), (1, 5, 2, T, 4.5, 8, 10), (1, 2, 4.5, T, 5, 4.5, T, 8, T, 10)),
        # Upstream leaves positions 1 and 4 swapped here.
        (3, (True, True), (1, 2, 5, T, 4.5, 8, 10), (1, 2, 4.5, T, 5, 4.5, T, 8, T, 10)),
    ],
)
def test_bipartite_vectors(r: int, flags: tuple, merged: tuple, unmerged: tuple) -> None:
    pair = bipartite_soft_matching(spiral(10, 1.0, 0.37), r, *flags)
    check_spiral(pair, 10, numbers(*merged), numbers(*unmerged))


@pytest.mark.parametrize(
    ("k", "members"),
    [
        (2, [(2,), (4, 7, 9), (3, 5, 6), (1, 8), (10,)]),
        (3, [(3, 5), (2, 6), (1, 4, 7, 8, 9)]),
        (4, [(2, 4, 6, 7), (1, 3, 5, 8)]),
    ],
)
def test_kth_vectors(k: int, members: list[tuple]) -> None:
    """As upstream for the whole groups; the tokens left over, lost there, are somewhere."""
    merge, unmerge = kth_bipartite_soft_matching(spiral(11, 1.0, 0.37), k)
    eye = torch.eye(11, dtype=torch.float64)[None]
    groups = merge(eye, mode="sum")[0]
    whole = 11 - 11 % k
    assert [tuple((row[:whole].nonzero()[:, 0] + 1).tolist()) for row in groups] == members
    assert groups.sum(0).tolist() == [1.0] * 11
    assert unmerge(merge(eye)).shape == (1, 11, 11)


def test_grid_vector() -> None:
    pair = bipartite_soft_matching_random2d(spiral(24, 0.7, 0.11), 6, 4, 2, 2, 9, no_rand=True)
    payload = torch.arange(1, 25, dtype=torch.float64)[None, :, None]
    merged = pair[0](payload)
    third = 22 / 3
    values = (2, 4, 5, third, 8, 10, 12, 13, 14, 16, 16, 19, 20, 22, 23)
    torch.testing.assert_close(merged[0, :, 0].sort().values, numbers(*values))
    values = (5, 2, third, 4, 12, 13, third, 8, 5, 10, 16, third)
    values += (16, 14, 13, 16, 19, 13, 12, 20, 19, 22, 23, 16)
    torch.testing.assert_close(pair[1](merged)[0, :, 0], numbers(*values))


def test_grid_destinations_of_whole_cells_only() -> None:
    merge, _ = bipartite_soft_matching_random2d(torch.randn(1, 30, 4), 6, 5, 2, 2, 100, True)
    groups = merge(torch.eye(30)[None], mode="sum")[0]
    assert groups[:, [0, 2, 4, 12, 14, 16]].equal(torch.eye(6))


# --- what upstream gets wrong, and errors --------------------------------------------------------


@pytest.mark.parametrize(
    "pair",
    [
        bipartite_soft_matching(torch.randn(1, 9, 2), 0),
        bipartite_soft_matching(torch.randn(1, 9, 2), -3),
        bipartite_soft_matching(torch.randn(1, 1, 2), 1),
        bipartite_soft_matching(torch.randn(1, 3, 2), 1, True, True),
        kth_bipartite_soft_matching(torch.randn(1, 9, 2), 1),
        random_bipartite_soft_matching(torch.randn(1, 9, 2), 0),
        bipartite_soft_matching_random2d(torch.randn(1, 9, 2), 3, 3, 2, 2, 0),
        bipartite_soft_matching(torch.randn(1, 3, 4), 1, distill_token=True),
    ],
)
def test_nothing_to_merge(pair: Pair) -> None:
    assert pair == (do_nothing, do_nothing)
    x = torch.randn(1, 9, 2)
    assert pair[0](x, mode="mean") is x


@pytest.mark.parametrize("r", [9, 10])
def test_random_cannot_remove_everything(r: int) -> None:
    with pytest.raises(InputError, match=rf"r={r} .* 9 tokens.* 8"):
        random_bipartite_soft_matching(torch.randn(2, 9, 4), r)


def test_kth_larger_than_the_sequence_leaves_one() -> None:
    merge, unmerge = kth_bipartite_soft_matching(torch.randn(2, 5, 3), 8)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(merge(x), x.mean(1, keepdim=True))
    assert unmerge(merge(x)).shape == x.shape


def test_an_empty_batch_stays_one() -> None:
    metric = torch.randn(0, 12, 4)
    for merge, unmerge in (
        bipartite_soft_matching(metric, 3),
        kth_bipartite_soft_matching(metric, 4),
        bipartite_soft_matching_random2d(metric, 4, 3, 2, 2, 9),
    ):
        assert unmerge(merge(metric)).shape == metric.shape


def test_a_plan_refuses_other_shapes() -> None:
    merge, unmerge = bipartite_soft_matching(torch.randn(2, 8, 4), 3)
    for wrong in (torch.randn(4, 8, 4), torch.randn(2, 7, 4), torch.randn(8, 4)):
        with pytest.raises(ValueError, match="shape"):
            merge(wrong)
    with pytest.raises(ValueError, match="shape"):
        unmerge(torch.randn(2, 8, 4))
    for wrong in (torch.randn(8, 4), torch.randn(2, 8, 8, 4)):
        for match in (bipartite_soft_matching, kth_bipartite_soft_matching):
            with pytest.raises(ValueError, match=r"shape \(B, N, C\), not"):
                match(wrong, 3)
    with pytest.raises(ValueError, match="picture"):
        bipartite_soft_matching_random2d(torch.randn(1, 9, 2), 3, 4, 2, 2, 3, True)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_what_is_similar_to_nothing_comes_last_and_attracts_nothing(bad: float) -> None:
    metric = torch.tensor([[1.0, 0.0]]).repeat(8, 1)
    metric[1::2] = torch.tensor([-1.0, 0.1])  # all opposite, so that zero would be nearer
    metric[3] = metric[4] = bad
    merge, _ = bipartite_soft_matching(metric[None], 3)
    groups = merge(torch.eye(8)[None], mode="sum")[0]
    assert groups[0].nonzero().flatten().tolist() == [4]  # unmerged
    assert groups[2].nonzero().flatten().tolist() == [3]  # alone
    torch.manual_seed(0)
    metric = torch.randn(1, 36, 4).abs()
    metric[0, 14] = bad  # a destination of the grid
    for window in (None, 3):
        plan = plan_grid(-metric if bad == 0 else metric, (6, 6), (2, 2), 27, window=window)
        sizes = plan.merge(torch.ones(1, 36, 1), mode="sum")[0, :, 0]
        assert sizes[4] == 1
        assert sizes.sum() == 36


def test_class_token_stays_when_everything_is_similar_to_nothing() -> None:
    merge, _ = bipartite_soft_matching(torch.zeros(1, 9, 2), 4, class_token=True)
    assert merge(torch.arange(9.0)[None, :, None])[0, 0, 0] == 0


def test_bfloat16_separates_what_is_almost_equal() -> None:
    """Cosines of 0.998 and above all round to 1 in bfloat16."""
    torch.manual_seed(0)
    metric = 1 + 0.05 * torch.randn(1, 64, 64)
    metric[:, ::2] = metric[:, 1::2].flip(1) + 0.01 * torch.randn(1, 32, 64)
    merge, _ = bipartite_soft_matching(metric.bfloat16(), 32)
    groups = merge(torch.eye(64)[None], mode="sum")[0]
    assert all(row.nonzero()[:, 0].sum() == 63 for row in groups)  # i merges with 63 - i


def test_wavg_of_half_does_not_overflow() -> None:
    x = torch.full((1, 64, 1), 3000.0, dtype=torch.float16)
    merge, _ = kth_bipartite_soft_matching(torch.ones(1, 64, 2), 64)
    merged, size = merge_wavg(merge, x)
    assert merged.item() == 3000
    assert size.item() == 64


def test_wavg_has_the_types_of_its_tensors() -> None:
    """Tokens and sizes are 1 to 4; means of whole numbers are not rounded, nor are given sizes."""
    merge, _ = kth_bipartite_soft_matching(torch.ones(1, 4, 2), 4)
    x, half = torch.arange(1, 5)[None, :, None], torch.float16
    for tokens, sizes, mean, total in (
        (x, None, torch.tensor(2.5), torch.tensor(4)),
        (x, x, torch.tensor(3.0), torch.tensor(10)),
        (x, x / 4, torch.tensor(3.0), torch.tensor(2.5)),
        (x.to(half), None, torch.tensor(2.5, dtype=half), torch.tensor(4, dtype=half)),
        (x.to(half), x.float(), torch.tensor(3.0), torch.tensor(10.0)),
        (x.float(), x.to(half), torch.tensor(3.0), torch.tensor(10, dtype=half)),
    ):
        merged, size = merge_wavg(merge, tokens, sizes)
        torch.testing.assert_close(merged[0, 0, 0], mean)
        torch.testing.assert_close(size[0, 0, 0], total)


@pytest.mark.parametrize("mode", ["amax", "amin", "prod"])
def test_other_modes(mode: str) -> None:
    merge, _ = kth_bipartite_soft_matching(torch.ones(1, 4, 2), 4)
    x = torch.tensor([[[1.0], [-2.0], [3.0], [4.0]]])
    assert merge(x, mode=mode).item() == {"amax": 4, "amin": -2, "prod": -24}[mode]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint8])
def test_whole_numbers_merge_as_in_tome(dtype: torch.dtype) -> None:
    """As scatter_reduce has it: sums are exact, means are rounded down."""
    merge, unmerge = bipartite_soft_matching(torch.randn(2, 9, 4), 3)
    x = torch.randint(0 if dtype == torch.uint8 else -50, 60, (2, 9, 3)).to(dtype)
    groups = unmerge(torch.arange(6.0).expand(2, 6)[..., None])[..., 0].long()
    index = groups[..., None].expand_as(x)
    for mode in ("mean", "sum"):
        expected = x.new_zeros(2, 6, 3).scatter_reduce(1, index, x, mode, include_self=False)
        assert merge(x, mode=mode).dtype == dtype
        assert torch.equal(merge(x, mode=mode), expected)


@pytest.mark.parametrize("config", [{"method": "kth", "k": 1000}, {"method": "random", "r": 900}])
def test_another_default_type_loses_no_token(config: dict) -> None:
    """bfloat16 cannot count beyond 256."""
    metric = torch.ones(1, 1000, 2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        plan, _ = plan_of(config, metric, (20, 50))
        merge, _ = kth_bipartite_soft_matching(metric, 1000)
        source = merge_source(merge, metric)
    finally:
        torch.set_default_dtype(torch.float32)
    assert plan.sizes.dtype == torch.float32
    assert plan.sizes.sum() == 1000
    x = torch.randn(1, 1000, 3)
    assert plan.unmerge(plan.merge(x)).shape == x.shape
    assert source.sum() == 1000


# --- matching within a window --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("h", "w", "stride", "window"),
    [
        (8, 8, (2, 2), 3),
        (17, 23, (2, 2), 3),
        (9, 30, (4, 2), 5),
        (20, 9, (3, 3), 1),
        (40, 12, (9, 2), 3),
        (1, 19, (2, 2), 3),
        (13, 1, (4, 4), 3),
        (12, 12, (4, 4), 99),
    ],
)
@pytest.mark.parametrize("is_random", [False, True])
def test_window_is_the_best_destination_nearby(
    h: int, w: int, stride: tuple[int, int], window: int, is_random: bool
) -> None:
    generator = torch.Generator().manual_seed(h * w)
    metric = torch.randn(2, h * w, 5, generator=generator)
    sy, sx = min(stride[0], h), min(stride[1], w)
    rows, columns = h // sy, w // sx
    draw = torch.zeros(rows, columns, dtype=torch.long)
    if is_random:
        draw = torch.randint(sy * sx, (rows, columns), generator=generator)
    plan = plan_grid(metric, (h, w), stride, h * w, draw if is_random else None, window)
    assert plan.n_kept == rows * columns
    unit = metric / metric.norm(dim=2, keepdim=True)
    for batch in range(2):
        expected = []
        places = {
            (a, b): (a * sy + int(draw[a, b]) // sx) * w + b * sx + int(draw[a, b]) % sx
            for a in range(rows)
            for b in range(columns)
        }
        for token in range(h * w):
            a, b = token // w // sy, token % w // sx
            near = {
                place: float(unit[batch, token] @ unit[batch, place])
                for (c, d), place in places.items()
                if abs(a - c) <= window // 2 and abs(b - d) <= window // 2
            }
            home = places[min(a, rows - 1), min(b, columns - 1)]
            expected.append(max(near, key=near.__getitem__) if near else home)
        destinations = torch.tensor(list(places.values()))
        groups = plan.groups.view(2, -1)[batch] - batch * plan.n_kept
        assert destinations[groups].tolist() == expected


def test_training_after_drawing_at_the_same_size() -> None:
    """Tables of a size are kept, and those made in inference mode must do for gradients."""
    metric = torch.randn(1, 14 * 18, 4)
    with torch.inference_mode():
        drawn = plan_grid(metric, (14, 18), (2, 2), 100, window=3)
    x = metric.clone().requires_grad_()
    trained = plan_grid(x, (14, 18), (2, 2), 100, window=3)
    assert torch.equal(drawn.groups, trained.groups)
    trained.merge(x).sum().backward()
    assert x.grad is not None


def test_pieces_cover_everything_once() -> None:
    for n, each in ((10, 1), (10, 2**21), (3, 2**30), (1, 0)):
        covered = [i for piece in pieces(n, each) for i in range(piece.start, piece.stop)]
        assert covered == list(range(n))


def test_matching_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = torch.randn(3, 18 * 20, 6, generator=torch.Generator().manual_seed(0))

    def plans() -> list[MergePlan]:
        windows = (None, 3)
        return [plan_grid(metric, (18, 20), (2, 2), r, None, w) for w in windows for r in (99, 270)]

    whole = plans()
    monkeypatch.setattr("ldm.modules.tome.match._PIECE", 5000)
    for a, b in zip(whole, plans(), strict=True):
        assert torch.equal(a.groups, b.groups)


def test_similarity_is_the_cosine() -> None:
    metric = torch.randn(2, 7, 3).to(torch.float16)
    src, partner = torch.tensor([[0, 2, 4]]), torch.tensor([[1, 3, 5], [5, 3, 1]])
    expected = torch.cosine_similarity(
        metric.float()[:, [0, 2, 4]],
        torch.stack([metric[0, partner[0]], metric[1, partner[1]]]).float(),
        2,
    )
    torch.testing.assert_close(similarity(metric, src, partner), expected)


# --- properties of every method ------------------------------------------------------------------

CONFIGS = [
    {"method": "bipartite", "ratio": 0.3},
    {"method": "bipartite", "ratio": 0.5, "protect": 1},
    {"method": "bipartite", "r": 1000, "protect": 2},
    {"method": "kth", "k": 3},
    {"method": "kth", "k": "tokens//4"},
    {"method": "random", "ratio": 0.9},
    {"method": "random", "max_tokens": 5},
    {"method": "grid", "ratio": 0.5},
    {"method": "grid", "ratio": 0.5, "metric": "hidden"},
    {"method": "grid", "ratio": 0.75, "window": None},
    {"method": "grid", "ratio": 0.75, "weighted": False},
    {"method": "random", "ratio": 0.5, "metric": "logits"},
    {"method": "bipartite", "ratio": 0.5, "metric": "logits"},
    {"method": "grid", "metric": "hidden", "r": 1000, "random": True, "stride": [3, 2]},
    {"method": "grid", "ratio": 0.6, "random": True, "window": None},
    {"method": "grid", "ratio": 0.5, "similarity": 0.9},
    {"method": "downsample", "stride": [2, 3]},
]
KINDS = ["random", "ties", "equal", "zero", "nan"]


def tokens(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "ties":
        x = x.sign()
    if kind == "equal":
        x = x[:, :1].expand(shape)
    if kind in ("zero", "nan"):
        holes = torch.rand(shape[:2], generator=generator) < 0.4
        x = x.masked_fill(holes[..., None], 0.0 if kind == "zero" else math.nan)
    return x.to(dtype)


def plan_of(config: dict, metric: Tensor, size: tuple[int, int]) -> tuple[MergePlan, Decision]:
    """The plan for keys and values, and the block, whose ``query_plan`` may be another one."""
    merger = TokenMerger(ToMeConfig.from_mapping({**config, "apply_to": ["attn"]}))
    block = merger.block(metric, size, downsample=1)
    return planned(block, metric).kv, block


@settings(max_examples=60, deadline=None)
@given(
    config=st.sampled_from(CONFIGS),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    n_rows=st.integers(1, 3),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    seed=st.integers(0, 10),
)
def test_properties(
    config: dict, kind: str, dtype: torch.dtype, n_rows: int, size: tuple[int, int], seed: int
) -> None:
    n = size[0] * size[1]
    metric = tokens(kind, (n_rows, n, 4), dtype, seed)
    state = torch.get_rng_state()
    plan, block = plan_of(config, metric, size)
    assert torch.equal(torch.get_rng_state(), state)

    x = torch.randn(n_rows, n, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    merged = plan.merge(x)
    back = plan.unmerge(merged)
    assert merged.shape == (n_rows, block.n_kept, 3)
    assert back.shape == x.shape
    assert merged.dtype == back.dtype == dtype
    if "similarity" not in config:
        assert block.n_kept == n - block.removed
    if plan.is_identity:
        assert merged is x
        return

    groups = plan.groups.view(n_rows, n) - torch.arange(n_rows)[:, None] * plan.n_kept
    sizes = torch.stack([row.bincount(minlength=plan.n_kept) for row in groups])
    assert (
        plan.has_gaps or (sizes >= 1).all()
    )  # so every token is in a group, and every group has one
    assert torch.equal(sizes.float(), plan.sizes)
    assert (sizes.sum(1) == n).all()
    expected = sizes.float().log()[:, None, None]
    assert torch.equal(plan.log_size(), expected.clamp(min=-1e4) if plan.has_gaps else expected)
    assert plan.has_gaps == ("similarity" in config and not (sizes >= 1).all())

    if config["method"] != "downsample":
        alone = sizes.gather(1, groups) == 1
        assert torch.equal(back[alone], x[alone])  # to the bit
        shares = 1 / sizes.gather(1, groups).double()
        if plan.shares is not None:
            shares = plan.shares.view(n_rows, n).double()
            assert (shares > 0).all()
        mean = torch.zeros(n_rows, plan.n_kept, 3, dtype=torch.float64)
        mean.scatter_add_(1, groups[..., None].expand(-1, -1, 3), x * shares[..., None])
        # shares are rounded to the type of what they weigh
        is_rounded = plan.shares is not None and dtype in (torch.float16, torch.bfloat16)
        loose = {"rtol": 2e-2, "atol": 1e-2} if is_rounded else {}
        torch.testing.assert_close(merged, mean.to(dtype), **loose)
    equal = x[:, :1].expand_as(x)
    loose = {"rtol": 2e-2, "atol": 1e-2} if dtype in (torch.float16, torch.bfloat16) else {}
    if dtype == torch.float64 and plan.shares is not None:
        loose = {"rtol": 1e-6, "atol": 1e-6}  # shares are float32, so they add up to 1 within that
    torch.testing.assert_close(plan.unmerge(plan.merge(equal)), equal, **loose)
    if config.get("protect"):
        assert (sizes.gather(1, groups)[:, 0] == 1).all()
        assert config["protect"] == 1 or (sizes.gather(1, groups)[:, 1] == 1).all()

    again, block_again = plan_of(config, metric, size)
    assert torch.equal(again.groups, plan.groups)
    if block.query_plan is not block.plan:  # the same groups where the same is compared, all alike
        assert torch.equal(block.query_plan.groups, plan.groups)
        assert block.query_plan.shares is None
        assert torch.equal(block_again.query_plan.groups, plan.groups)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_without_embedding_bag_the_same(config: dict) -> None:
    """The path of MPS, where groups are added up by index."""
    plan, _ = plan_of(config, torch.randn(2, 35, 4), (5, 7))
    if plan.is_identity or plan.chosen is not None:
        return
    other = MergePlan(plan.n_tokens, plan.n_kept, plan.sizes, plan.groups, shares=plan.shares)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 35, 3).to(dtype)
        loose = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
        for mode in ("mean", "sum"):
            torch.testing.assert_close(other.merge(x, mode), plan.merge(x, mode), **loose)


def test_gradients_flow_through() -> None:
    plan, _ = plan_of({"ratio": 0.5}, torch.randn(2, 16, 4), (4, 4))
    x = torch.randn(2, 16, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: plan.unmerge(plan.merge(x) ** 2), x)


def test_downsampling_compares_nothing() -> None:
    config = ToMeConfig.from_mapping({"method": "downsample", "apply_to": ["kv"]})
    block = Decision(config, (4, 6), removed=18)

    assert block.metrics == ("hidden",)  # there already
    assert plan_block(block, [torch.randn(1, 24, 4)])[0].n_kept == 6


def test_similarity_merges_nothing_less_similar() -> None:
    metric = torch.randn(1, 64, 3, generator=torch.Generator().manual_seed(0))
    plan, block = plan_of({"ratio": 0.75, "similarity": 0.8, "window": None}, metric, (8, 8))
    assert 0 < 64 - block.n_kept < 48
    unit = metric[0] / metric[0].norm(dim=1, keepdim=True)
    for group in range(plan.n_kept):
        members = (plan.groups == group).nonzero()[:, 0]
        if len(members) > 1:  # the destination is at an even row and column
            target = next(int(i) for i in members if i // 8 % 2 == 0 and i % 8 % 2 == 0)
            assert (unit[members] @ unit[target] >= 0.8 - 1e-6).all()


def test_similarity_is_decided_for_each_picture_alone() -> None:
    random = torch.Generator().manual_seed(0)
    alike = torch.randn(1, 64, 3, generator=random)
    strange = torch.randn(1, 64, 8, generator=random)[..., :3]
    strange[:, ::3] *= -1
    x, both = torch.randn(2, 64, 5), torch.cat([alike, strange])
    for config in ({"ratio": 0.75}, {"method": "bipartite", "ratio": 0.5, "protect": 2}):
        config |= {"similarity": 0.9, "metric": "hidden"}
        together, _ = plan_of(config, both, (8, 8))
        back = together.unmerge(together.merge(x))
        kept = []
        for row in range(2):
            alone, block = plan_of(config, both[row : row + 1], (8, 8))
            own = x[row : row + 1]
            torch.testing.assert_close(back[row : row + 1], alone.unmerge(alone.merge(own)))
            kept.append(block.n_kept)
            assert (together.sizes[row] > 0).sum() == block.n_kept
        assert kept[0] != kept[1]
        assert together.has_gaps
        assert together.n_kept == max(kept)
        for is_proportional in (True, False):  # nothing attends to what is empty
            bias = together.log_size(is_proportional)
            assert torch.equal(bias[:, 0, 0] == -1e4, together.sizes == 0)
        assert set(together.log_size(False).unique().tolist()) == {0.0, -1e4}
