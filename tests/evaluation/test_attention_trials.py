"""Trials of merging on recorded attention, against the program's own merging."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import nn

from ldm.evaluation.attention_trials import Trial, error, merged_attention, recording, trials
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.tome.block import tokens_to_compare
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import TokenMerger
from tests.golden_util import fill_parameters
from tests.tiny_models import UNET


@pytest.fixture(scope="module")
def unet() -> UNetModel:
    return fill_parameters(UNetModel(**UNET, num_heads=4), 0).eval()


def recorded(unet: UNetModel, calls: set[int]) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), recording(unet, calls) as kept:
        for t in (900, 500, 100):
            x = torch.randn(2, 4, 8, 12, generator=generator)
            context = torch.randn(2, 5, UNET["context_dim"], generator=generator)
            unet(x, torch.full((2,), t), context)
    return kept


def test_recording(unet: UNetModel) -> None:
    one, two = recorded(unet, {1}), recorded(unet, {1, 2})
    assert len(two) == 2 * len(one) > 0
    assert all(kept.size == (8, 12) and kept.hidden.shape[:2] == (2, 96) for kept in one)
    assert not unet._forward_pre_hooks
    assert not unet._forward_hooks
    assert one[0].predicted.shape == (2, 96, 4)
    assert one[0].attended.shape == one[0].hidden.shape


@pytest.mark.parametrize(
    ("trial", "config"),
    [
        (Trial(), {"ratio": 0.75}),
        (Trial(stride=4, window=None), {"ratio": 0.9375, "stride": [4, 4], "window": None}),
        (Trial(mean="plain", bias="none"), {"weighted": False, "proportional": False}),
        (
            Trial(metric="keys", by_distance=False, mean="plain"),
            {"metric": "keys"},
        ),
        (Trial(metric="hidden", by_distance=False, mean="plain"), {"metric": "hidden"}),
    ],
    ids=str,
)
def test_as_the_program_merges(unet: UNetModel, trial: Trial, config: dict) -> None:
    one = recorded(unet, {1})[0]
    block = next(m for m in unet.modules() if m.__class__.__name__ == "BasicTransformerBlock")
    keys = {"ratio": 0.75, "apply_to": ["kv"], **config}
    merging = TokenMerger(ToMeConfig.from_mapping(keys)).block(one.hidden, one.size, 1)
    out, block.attn1.to_out = block.attn1.to_out, nn.Identity()
    try:
        with torch.no_grad():
            normed = block.norm1(one.hidden)
            plans = merging.plans(partial(tokens_to_compare, block, one.hidden, normed, one.size))
            bias = plans.kv.log_size if plans.is_proportional else None
            expected = block.attn1(normed, plans.kv.merge(normed), bias)
    finally:
        block.attn1.to_out = out
    found = rearrange(merged_attention(one, trial), "b h n d -> b n (h d)")
    torch.testing.assert_close(found, expected)


def test_error(unet: UNetModel) -> None:
    kept = recorded(unet, {1})
    assert error(kept, Trial(stride=1)) > 80  # nothing is merged
    found = {name: error(kept, trial) for name, trial in trials(2).items()}
    assert all(0 < value < 80 for value in found.values())
    assert len({round(value, 4) for value in found.values()}) == len(found)
