"""What is merged where and when in a run, what is kept, and what is reported."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.modules.tome.config import PAYS_FROM, ToMeConfig
from ldm.modules.tome.decision import Decision
from ldm.modules.tome.merge import plan_block
from ldm.modules.tome.merger import TokenMerger
from ldm.modules.tome.tally import Tally
from tests.tiny_models import planned

SIDE = 16
LEVELS = [(1, 16), (1, 16), (2, 32), (1, 16)]  # downsampling and channels of the blocks, in order


def merger(**config: Any) -> TokenMerger:
    return TokenMerger(ToMeConfig.from_mapping(config))


def call(
    tome: TokenMerger, t: int = 500, side: int = SIDE, n_rows: int = 2, seed: int = 0
) -> list[Decision]:
    """One call of a U-Net, with new tokens in each call."""
    generator = torch.Generator().manual_seed(1000 * seed + t)
    tome.begin_call(side, side, torch.full((n_rows,), t))
    blocks = []
    for downsample, channels in LEVELS:
        size = (side // downsample, side // downsample)
        x = torch.randn(n_rows, size[0] * size[1], channels, generator=generator)
        block = tome.block(x, size, downsample)
        planned(block, x)
        blocks.append(block)
    tome.end_call()
    return blocks


def groups(blocks: list[Decision]) -> list[Tensor | None]:
    return [None if block.plan is None else block.plan.groups for block in blocks]


def same(a: list[Tensor | None], b: list[Tensor | None]) -> list[bool]:
    return [x is y or (x is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True)]


def kept(blocks: list[Decision]) -> list[int]:
    return [block.n_kept for block in blocks]


# --- where and when ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [256, 256, 64, 256]),
        ({"ratio": 0}, [256, 256, 64, 256]),
        ({"ratio": 0.5}, [128, 128, 64, 128]),
        ({"ratio": 0.5, "max_downsample": 2}, [128, 128, 32, 128]),
        ({"ratio": 0.5, "max_downsample": 8, "min_tokens": 100}, [128, 128, 64, 128]),
        ({"max_tokens": 60, "max_downsample": 8}, [64, 64, 60, 64]),
        ({"method": "bipartite", "r": 100, "max_downsample": 8}, [156, 156, 32, 156]),
        ({"k": "tokens//64", "max_downsample": 8}, [64, 64, 64, 64]),
        (
            {"rules": [{"min_tokens": 100, "ratio": 0.75}, {"min_tokens": 1, "k": 2}]},
            [64, 64, 32, 64],
        ),
    ],
    ids=str,
)
def test_tokens_kept(config: dict[str, Any], expected: list[int]) -> None:
    tome = merger(**config)
    blocks = call(tome)
    assert kept(blocks) == expected
    for block in blocks:
        assert (block.plan is None) == (block.removed == 0)


def test_steps_follow_the_progress() -> None:
    tome = merger(steps=[[0, 0.6], [0.5, 0.2], [0.501, 0]])
    by_time = {t: kept(call(tome, t))[0] for t in (1000, 750, 500, 499, 0)}
    assert by_time == {1000: 103, 750: 154, 500: 205, 499: 256, 0: 256}


def test_steps_of_a_batch_at_several_times() -> None:
    tome = merger(steps=[[0, 0.0], [1, 0.5]])
    tome.begin_call(SIDE, SIDE, torch.tensor([1000, 0]))
    assert tome.block(torch.randn(2, 256, 4), (16, 16), 1).removed == 64


# --- plans that are kept -------------------------------------------------------------------------


def test_by_default_every_block_of_every_call_has_its_own_plan() -> None:
    tome = merger(ratio=0.5)
    first, second = call(tome, 900), call(tome, 800)
    assert len({id(block) for block in first + second}) == 8
    assert same(groups(first), groups(second)) == [False, False, True, False]  # level 2 has none


@pytest.mark.parametrize(
    "config",
    [
        {"method": "random", "ratio": 0.5},
        {"method": "tiles", "random": True},
        {"method": "prune", "ratio": 0.5, "random": True},
        {"ratio": 0.5, "random": True},
    ],
)
def test_random_numbers_are_the_processors_whatever_the_default_device_is(config: Any) -> None:
    expected = merger(**config)
    expected.begin_call(SIDE, SIDE, torch.tensor([500]))
    other = merger(**config)
    x = torch.zeros(1, SIDE * SIDE, 4)
    block = expected.block(x, (SIDE, SIDE), 1)
    with torch.device("meta"):
        other.begin_call(SIDE, SIDE, torch.tensor([500], device="cpu"))
        assert torch.equal(other.block(x, (SIDE, SIDE), 1).draw, block.draw)


def test_reuse_steps() -> None:
    tome = merger(ratio=0.5, reuse_steps=3)
    calls = [groups(call(tome, t)) for t in (900, 800, 700, 600)]
    assert all(same(calls[0], calls[1]))
    assert all(same(calls[0], calls[2]))
    assert not same(calls[0], calls[3])[0]
    assert not same(calls[0][:1], calls[0][1:2])[0]


def test_another_batch_in_training_has_plans_of_its_own() -> None:
    tome = merger(ratio=0.5, reuse_steps=100)
    first = groups(call(tome, 900))
    tome.begin_batch()
    assert not same(first, groups(call(tome, 800)))[0]


def test_reuse_layers() -> None:
    tome = merger(ratio=0.5, reuse_layers=True, max_downsample=2)
    first, second = call(tome, 900), call(tome, 800)
    assert first[0] is first[1] is first[3]
    assert first[2] is not first[0]
    assert second[0] is not first[0]


def test_a_kept_plan_serves_only_the_same_geometry() -> None:
    tome = merger(ratio=0.5, reuse_steps=100)
    plans = [call(tome, 900)[0], call(tome, 900, side=12)[0], call(tome, 900, n_rows=1)[0]]
    assert len({id(plan) for plan in plans}) == 3
    assert call(tome, 100)[0] is plans[0]


def test_a_run_begins_with_nothing_kept() -> None:
    tome = merger(ratio=0.5, reuse_steps=100)
    before = groups(call(tome, 900))
    tome.begin_run()
    assert not same(before, groups(call(tome, 900, seed=1)))[0]
    assert "nothing" not in tome.report()
    tome.begin_run()
    assert "nothing merged" in tome.report()


def test_outside_a_call_nothing_is_kept() -> None:
    tome = merger(ratio=0.5, reuse_steps=100, reuse_layers=True)
    x = torch.randn(1, 256, 4)
    assert tome.block(x, (16, 16), 1) is not tome.block(x, (16, 16), 1)
    assert "nothing merged" in tome.report()


def test_a_ratio_that_ends_lets_no_kept_plan_live_on() -> None:
    tome = merger(steps=[[0, 0.5], [0.5, 0.5], [0.51, 0]], reuse_steps=100)
    assert kept(call(tome, 900))[0] == 128
    assert kept(call(tome, 100))[0] == 256


# --- randomness ----------------------------------------------------------------------------------

RANDOM = [{"ratio": 0.5, "random": True}, {"method": "random", "ratio": 0.7}]


@pytest.mark.parametrize("config", RANDOM, ids=str)
def test_the_same_seed_gives_the_same_plans(config: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    tome = merger(**config)

    def run(seed: int | None = None) -> list[Tensor | None]:
        tome.begin_run(seed)
        return groups(call(tome, 900)) + groups(call(tome, 800))

    first = run()
    call(tome, 700)
    assert all(same(first, run()))
    assert all(same(first, run(0)))
    assert not same(first, run(1))[0]
    assert not same(first, groups(call(merger(**config, seed=1), 900)) * 2)[0]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("config", RANDOM, ids=str)
def test_rows_of_a_batch_share_the_partition(config: dict[str, Any]) -> None:
    tome = merger(**config)
    tome.begin_call(SIDE, SIDE, torch.tensor([500]))
    x = torch.randn(1, 256, 4).repeat(2, 1, 1)
    block = tome.block(x, (16, 16), 1)
    plan = planned(block, x).q
    first, second = plan.groups.view(2, -1)
    assert torch.equal(first, second - plan.n_kept)


def test_guidance_merges_queries_alike_in_both_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 256, 2, 3, generator=generator)  # two halves of two pictures
    both = torch.cat([logits[:2], logits[2:]], 3)

    def plans(logits: Tensor, is_guided: bool) -> tuple[Tensor, Tensor]:
        tome = merger(ratio=0.5)
        tome.is_guided = is_guided
        tome.begin_call(SIDE, SIDE, torch.tensor([500]))
        block = tome.block(torch.randn(len(logits), 256, 8), (16, 16), 1)
        keys, queries = found = plan_block(block, [logits, logits])
        rows = torch.arange(len(logits))[:, None] * 128
        queries, keys = (plan.groups.view(-1, 256) - rows for plan in (queries, keys))
        assert found[1].sizes.sum(1).tolist() == [256] * len(logits)
        return queries, keys

    queries, keys = plans(logits, is_guided=True)
    apart, apart_keys = plans(logits, is_guided=False)
    assert torch.equal(queries[:2], queries[2:])
    assert torch.equal(queries[:2], plans(both, is_guided=False)[0])
    assert not torch.equal(apart[:2], apart[2:])
    assert torch.equal(keys, apart_keys)
    assert torch.equal(plans(logits[:3], is_guided=True)[0], apart[:3])  # no halves


def test_models_are_apart() -> None:
    one, other = merger(ratio=0.5, random=True), merger(ratio=0.5, random=True)
    expected = groups(call(one, 900))
    other.begin_run()
    call(other, 100)
    call(other, 100)
    one.begin_run()
    assert all(same(expected, groups(call(one, 900))))
    twin = copy.deepcopy(one)
    assert all(same(groups(call(one, 800)), groups(call(twin, 800))))


# --- auto ----------------------------------------------------------------------------------------


def test_auto_merges_only_where_it_pays() -> None:
    assert PAYS_FROM["cpu", False] == 1024
    for config, large in (
        ({"ratio": "auto"}, 512),
        ({"ratio": "auto", "apply_to": ["kv"], "stride": [4, 4]}, 64),
        ({"ratio": "auto", "method": "bipartite"}, 512),
        ({"ratio": "auto", "method": "random"}, 512),
    ):
        tome = merger(**config)
        assert kept(call(tome)) == [256, 256, 64, 256]
        assert "auto merges from 1024 tokens here" in tome.report()
        assert kept(call(tome, side=32)) == [large, large, 256, large]
        assert tome.warnings() == []


# --- the report ----------------------------------------------------------------------------------


def test_report_off() -> None:
    assert merger().report() == "ToMe: off"
    assert merger(ratio=0).report() == "ToMe: off"
    assert merger().warnings() == merger(ratio=0).warnings() == []


def test_report_of_attention() -> None:
    tome = merger(ratio=0.5)
    for t in (900, 800):
        call(tome, t)
    # work: three blocks of 256 tokens and 16 channels, one of 64 and 32
    saved = 3 * 256**2 * 16 * 0.75 / (3 * 256**2 * 16 + 64**2 * 32)
    assert tome.report() == (
        "ToMe: grid 2x2 ratio=0.5 window=3 on attn: 256 -> 128 tokens in 3 of 4 blocks, "
        f"{saved:.0%} of the self-attention work saved"
    )


def test_tallies_add_up() -> None:
    """Two runs counted together are one run of all their calls."""
    together = merger(steps=[[0, 0.5], [1, 0]], min_tokens=60)
    for t in (900, 500, 300, 100):
        call(together, t)
    apart, tally = merger(steps=[[0, 0.5], [1, 0]], min_tokens=60), Tally()
    for timesteps in ((900, 500), (300, 100)):
        apart.begin_run()
        for t in timesteps:
            call(apart, t)
        tally.add(apart.tally)
    assert tally.describe(apart.config) == together.report()
    assert tally.warnings(apart.config) == together.warnings() != []
    assert apart.report() != together.report()


def test_report_of_levels_steps_and_limits() -> None:
    tome = merger(method="bipartite", r=100, apply_to=["kv"], max_downsample=2)
    call(tome)
    report = tome.report()
    assert (
        "256 -> 156 tokens, 64 -> 32 tokens (no more can go than 32 of r=100) in 4 of 4" in report
    )
    tome = merger(max_tokens=10, apply_to=["mlp"])
    call(tome)
    assert "256 -> 64 tokens (no more can go than 192)" in tome.report()
    assert ", 0% of" in tome.report()
    tome = merger(steps=[[0, 0.5], [1, 0]])
    for t in (1000, 500, 0):
        call(tome, t)
    assert "ratio=0:0.5,1:0 " in tome.report()
    assert "256 -> 128-192 tokens in 2 of 4 blocks" in tome.report()
    tome = merger(rules=[{"min_tokens": 100, "k": 4}])
    call(tome)
    assert tome.report().startswith("ToMe: from 100 tokens kth k=4 on attn: 256 -> 64 tokens")


def test_report_says_what_acts_where_no_rule_does() -> None:
    tome = merger(r=9, rules=[{"min_tokens": 1000, "method": "kth", "k": 4}])
    call(tome)
    expected = "ToMe: from 1000 tokens kth k=4 on attn; else grid 2x2 r=9 window=3 on attn: 256 ->"
    assert tome.report().startswith(expected)


def test_report_counts_what_similarity_left() -> None:
    tome = merger(ratio=0.75, similarity=0.5)
    found = kept(call(tome))
    assert 64 < found[0] < 256
    low, high = min(n for n in found if n > 64), max(n for n in found if n < 256)
    assert f"256 -> {low}-{high} tokens in 3 of 4 blocks" in tome.report()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"apply_to": ["kv"]}, "no amount is given; set ratio, r, k, max_tokens or steps"),
        ({"ratio": 0.5, "min_tokens": 100_000}, "has tokens to spare"),
        ({"ratio": 0.5, "similarity": 1.0}, "or no tokens are as similar as 1"),
        ({"steps": [[0, 0], [0.9, 0], [1, 0.5]]}, "or the ratio of steps is 0 in this part"),
        ({"ratio": "auto", "stride": [1, 1], "min_tokens": 2048}, "merged nothing"),
        ({"ratio": 0.5}, "256 tokens is likely to take longer"),
    ],
    ids=str,
)
def test_warnings(config: dict[str, Any], words: str) -> None:
    tome = merger(**config)
    call(tome)
    (warning,) = tome.warnings()
    assert words in warning
    assert "\n" not in warning


def test_what_auto_leaves_alone_is_said_once() -> None:
    tome = merger(ratio="auto")
    call(tome)
    assert tome.report().endswith("(auto merges from 1024 tokens here): nothing merged")
    assert tome.warnings() == []
    tome.begin_run()
    assert not tome.tally.has_declined


def test_observer_sees_the_blocks_of_each_call() -> None:
    tome = merger(ratio=0.5)
    seen: list[tuple[int, list[Decision]]] = []
    tome.observer = lambda number, blocks: seen.append((number, blocks))
    first = call(tome, 900)
    assert seen == [(0, first)]
    second = call(tome, 800)
    assert seen == [(0, first), (1, second)]
