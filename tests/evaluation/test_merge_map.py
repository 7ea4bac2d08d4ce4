"""What was merged, as recorded and as drawn."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.evaluation.merge_map import (
    MergeMap,
    Recorder,
    default_block,
    default_steps,
    draw_map,
    draw_strip,
    strip_steps,
)
from ldm.evaluation.merge_page import merge_page
from ldm.modules.tome.config import ToMeConfig
from ldm.modules.tome.merger import TokenMerger
from tests.tiny_models import planned

CONFIGS = [
    {"ratio": 0.5},
    {"ratio": 0.3, "random": True, "window": None},
    {"ratio": 0.75, "apply_to": ["kv"], "stride": [2, 4]},
    {"ratio": 0.9, "stride": [4, 4], "random": True, "similarity": 0.2},
    {"method": "bipartite", "ratio": 0.5},
    {"method": "bipartite", "r": 7, "protect": 2},
    {"method": "kth", "k": 4},
    {"method": "random", "ratio": 0.8},
    {"method": "downsample", "stride": [2, 2]},
    {"method": "tiles", "stride": [3, 7]},
    {"method": "prune", "ratio": 0.5, "random": True},
    {"method": "cover", "ratio": 0.5, "stride": [3, 7]},
    {"method": "guided", "ratio": 0.5},
    {"ratio": 0},
]


def recorded(config, size=(6, 7), n_rows=4, n_calls=2):
    """The recorder of a merger that saw random tokens, and the plans."""
    merger = TokenMerger(ToMeConfig.from_mapping(config))
    recorder, plans = Recorder(merger), []
    for call in range(n_calls):
        merger.begin_call(*size, torch.tensor([900 - call]))
        tokens = torch.randn(n_rows, size[0] * size[1], 8)
        block = merger.block(tokens, size, 1)
        planned(block, tokens)
        merger.end_call()
        plans.append(block.plan)
    return recorder, plans


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_merged_group_has_one_destination(config):
    recorder, _ = recorded(config)
    for (one,) in recorder.maps(0, 2) + recorder.maps(1, 2):
        heads = np.bincount(one.groups[one.destinations], minlength=one.n_kept)
        assert np.all(heads[one.counts > 1] == 1)
        assert heads.max() <= 1
        assert one.counts.sum() == 42
        assert (one.merged_into != np.arange(42)).sum() == 42 - one.n_kept


@pytest.mark.parametrize("method", ["prune", "cover", "guided"])
def test_each_picture_has_its_own_destinations(method):
    merger = TokenMerger(ToMeConfig.from_mapping({"method": method, "ratio": 0.5}))
    merger.is_guided = method == "guided"
    merger.note_guidance(torch.randn(4, 4, 6, 8))
    recorder = Recorder(merger)
    merger.begin_call(6, 8, torch.tensor([5]))
    tokens = torch.randn(4, 48, 8)
    block = merger.block(tokens, (6, 8), 1)
    planned(block, tokens)
    merger.end_call()
    maps = [recorder.maps(picture, 4)[0][0] for picture in range(4)]
    assert {one.n_kept for one in maps} == {24}
    assert not np.array_equal(maps[0].merged_into, maps[1].merged_into)
    marks = torch.arange(48.0).expand(4, -1)[..., None]
    unmerged = block.plan.unmerge(block.plan.merge(marks))[..., 0].numpy()
    if method == "prune":  # what stays is as it was, so it is the mark of its destination
        np.testing.assert_array_equal([one.merged_into for one in maps], unmerged)
    if method == "cover":  # into the most similar destination of its tile of 2 x 2
        cosine = F.normalize(tokens, dim=-1) @ F.normalize(tokens, dim=-1).mT
        tile = np.arange(48) // 16 * 4 + np.arange(48) % 8 // 2
        for one, similarity in zip(maps, cosine, strict=True):
            for token in sorted({*range(48)} - {*one.destinations}):
                heads = one.destinations[tile[one.destinations] == tile[token]]
                assert one.merged_into[token] == heads[similarity[token, heads].argmax()]


def test_a_group_is_what_unmerging_makes_equal():
    recorder, plans = recorded({"ratio": 0.5})
    for picture in range(2):  # of two, with guidance: rows 2 and 3 see the prompt
        for (one,), plan in zip(recorder.maps(picture, 2), plans, strict=True):
            values = plan.unmerge(torch.arange(4.0 * plan.n_kept).view(4, plan.n_kept, 1))
            expected = values[2 + picture, :, 0] - (2 + picture) * plan.n_kept
            np.testing.assert_array_equal(one.groups, expected)


def test_a_merged_token_is_nearest_to_the_destination_that_took_it():
    merger = TokenMerger(ToMeConfig.from_mapping({"method": "kth", "k": 4}))
    recorder = Recorder(merger)
    merger.begin_call(4, 4, torch.tensor([5]))
    tokens = torch.randn(1, 16, 8)
    planned(merger.block(tokens, (4, 4), 1), tokens)
    merger.end_call()
    ((one,),) = recorder.maps()
    similarity = F.normalize(tokens[0], dim=-1) @ F.normalize(tokens[0], dim=-1).T
    heads = np.arange(3, 16, 4)
    for token in sorted({*range(16)} - {*heads}):
        assert one.merged_into[token] == heads[similarity[token, heads].argmax()]


def test_another_run_starts_anew_and_nothing_merged_is_a_map_too():
    recorder, _ = recorded({"ratio": 0.5})
    merger = recorder._merger
    merger.configure(ToMeConfig())
    merger.begin_call(4, 5, torch.tensor([5]))
    merger.block(torch.randn(2, 20, 8), (4, 5), 1)
    merger.end_call()
    ((one,),) = recorder.maps()
    assert (one.n_tokens, one.n_kept, len(one.destinations)) == (20, 20, 0)
    assert one.describe() == "20 tokens, none merged"


def test_descriptions_and_choices():
    pair = MergeMap((1, 4), np.array([0, 1, 1, 1]), np.array([0, 2]), ("kv",))
    assert pair.describe() == (
        "4 -> 2 tokens (kv), up to 3 in one, on average from 1.0 tokens away"
    )
    alone = MergeMap((2, 4), np.arange(8), np.array([]), ("kv",))
    assert default_block([[alone, pair, pair]]) == 1
    assert default_block([[alone]]) == 0
    assert default_steps(20) == [0, 10, 19]
    assert default_steps(1) == strip_steps(1) == [0]
    assert strip_steps(50)[::7] == [0, 49]


def picture_of_two_colours():
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, :4], picture[:, 4:] = (200, 40, 40), (40, 40, 200)
    return picture


def test_groups_have_their_mean_colour_and_the_rest_is_left_alone():
    picture = picture_of_two_colours()
    # Tokens of the left half join one of the right half; two at the right stay.
    one = MergeMap((2, 4), np.array([0, 0, 0, 1, 0, 0, 2, 3]), np.array([2]), ("attn",))
    drawn = draw_map(picture, one)
    assert drawn.shape == (256, 512, 3)
    mean = 0.8 * np.array([168, 40, 72]) + 0.2 * np.array([200, 40, 40])
    np.testing.assert_allclose(drawn[190, 30], mean, atol=2)  # lower left
    np.testing.assert_array_equal(drawn[190, 420], [40, 40, 200])  # lower right, unmerged
    np.testing.assert_array_equal(drawn[64, 320], 255)  # the dot, in the middle of token 2
    assert np.ptp(drawn[60:70, 160:230], axis=(0, 1)).max() > 100  # a line leads to it
    assert drawn[64, 384].mean() > 110  # a border to the right of it


def test_a_strip_has_a_cell_for_each_step():
    one = MergeMap((2, 4), np.zeros(8, dtype=np.int64), np.array([0]), ("attn",))
    strip = draw_strip(picture_of_two_colours(), {0: one, 5: one})
    assert strip.shape[1] == 3 * (256 + 2) + 2
    assert strip.shape[0] > 128


def test_a_page_holds_everything_and_escapes_the_prompt():
    one = MergeMap((2, 4), np.array([0, 0, 0, 1, 0, 0, 2, 3]), np.array([2]), ("attn",))
    page = merge_page(picture_of_two_colours(), [(3, 1, one)], "a </script><b>", "seed 1")
    assert "<b>" not in page
    assert not re.search(
        r"""(src|href)\s*=|url\(|https?:""", page.replace("picture.src = data", "")
    )
    data = json.loads(re.search(r'application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert data["prompt"] == "a </script><b>"
    (entry,) = data["maps"]
    assert (entry["step"], entry["block"], entry["h"], entry["w"], entry["kept"]) == (3, 1, 2, 4, 4)
