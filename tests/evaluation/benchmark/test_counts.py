"""Operators, counted on tensors without content."""

from __future__ import annotations

import pytest
import torch

from ldm.config import load_preset
from ldm.evaluation.benchmark.counts import count, count_block, table
from ldm.modules.tome.config import ToMeConfig
from tests.tiny_models import tiny_config

LIMITS = {"fast": 40, "balanced": 40, "quality": 40, "tomesd": 35, "todo": 8}


def test_views_do_not_count_and_attention_is_one_operator() -> None:
    x = torch.empty(2, 3, 4, device="meta")
    assert count(lambda: x.view(6, 4).T[1:].unsqueeze(0)) == []
    assert count(lambda: x + x.mT.contiguous().view(2, 3, 4)) == ["clone", "add"]
    q = x[None]
    names = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert names == ["scaled_dot_product_attention"]


@pytest.mark.parametrize("side", [64, 128])
def test_a_merged_block_has_few_more_operators(side: int) -> None:
    """As on a card, where sizes are a further channel: no more than so many."""
    plain = count_block(ToMeConfig(), side)
    assert plain == 20
    for name, limit in LIMITS.items():
        assert 0 < count_block(ToMeConfig.from_mapping(load_preset(name)), side) - plain <= limit
    half = ToMeConfig.from_mapping({"ratio": 0.5})
    assert 0 < count_block(half, side) - plain <= 75


def test_the_table_has_a_line_for_each_setting() -> None:
    settings = {"half": ToMeConfig.from_mapping({"ratio": 0.5}), "off": ToMeConfig()}
    head, _, plain, half, off, *rest = table(tiny_config(), settings, sides=(8,)).splitlines()
    assert head == "| setting | block of 64 tokens | step at 64 |"
    assert plain.startswith("| no merging | 20 | ")
    assert "(+0)" not in half
    assert off.count("(+0)") == 2
    assert all(line.startswith("| the tomesd package") for line in rest)
