"""What a user may ask for, what is refused and with which words, and how flags are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from ldm.cli.tome_flags import parse_flag
from ldm.errors import InputError
from ldm.modules.tome.config import ToMeConfig, ToMeWish, overlay, refuse_contradictions
from ldm.modules.tome.keys import KEYS

PRESETS = Path(__file__).parents[3] / "configs" / "tome"
SIZES = {512: 64, 768: 96, 1024: 128, 1536: 192, 2048: 256}  # pixels -> latents


def config(**keys: object) -> ToMeConfig:
    return ToMeConfig.from_mapping(keys)


def test_plain_ratio_merges_all_of_attention_at_the_top() -> None:
    plain = config(ratio=0.5)
    assert (plain.method, plain.apply_to, plain.max_downsample) == ("grid", ("attn",), 1)
    assert plain.proportional
    assert not plain.random
    assert plain.removed(64, 64) == 2048


def test_of_two_rules_that_fit_the_first_wins_and_one_that_never_acts_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small, large = {"min_tokens": 64, "ratio": 0.5}, {"min_tokens": 4096, "ratio": 0.2}
    assert config(rules=[large, small]).for_tokens(4096).ratio == 0.2
    assert not caplog.records
    assert config(rules=[small, large]).for_tokens(4096).ratio == 0.5
    assert "the entry from 4096 tokens never acts after that from 64" in caplog.text


def test_a_rule_that_never_acts_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    rules = [{"min_tokens": 64, "ratio": 0.5}, {"min_tokens": 4096, "ratio": 0.2}]
    keys = {"rules": rules, "hires": {"window": 5}}
    refuse_contradictions(keys)
    assert not caplog.records
    ToMeWish(keys).over(None)
    (record,) = caplog.records
    assert "never acts" in record.getMessage()
    caplog.clear()
    later = {"rules": [{"min_tokens": 64, "ratio": 0.2}], "hires": {"rules": rules}}
    ToMeWish(later).over(None)
    (record,) = caplog.records


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"ratio": 0},
        {"ratio": 0.0, "method": "bipartite"},
        {"r": 0},
        {"k": 1},
        {"apply_to": ["kv"]},
        {"steps": [[0, 0], [1, 0]]},
        {"method": "downsample", "stride": [1, 1]},
        {"method": "downsample", "ratio": 0},
        {"method": "tiles", "stride": [8, 8], "r": 0},
        {"context": "trim"},
        {"rules": [{"min_tokens": 4096, "ratio": 0}]},
    ],
)
def test_off(keys: dict) -> None:
    assert config(**keys).is_off


@pytest.mark.parametrize(
    "keys",
    [
        {"ratio": 0.1},
        {"ratio": "auto"},
        {"k": 4},
        {"k": "tokens//1024"},
        {"max_tokens": 100},
        {"method": "downsample"},
        {"steps": [[0, 0], [1, 0.5]]},
        {"rules": [{"min_tokens": 4096, "ratio": 0.5}]},
    ],
)
def test_on(keys: dict) -> None:
    assert not config(**keys).is_off


def test_none_is_off() -> None:
    assert ToMeConfig.from_mapping(None) == ToMeConfig()
    assert ToMeConfig().is_off


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ration": 0.5}, ["ration", "ratio"]),
        ({"ratio": 1.0}, ["ratio", "1.0", "below 1"]),
        ({"ratio": -0.1}, ["ratio", "-0.1", "0"]),
        ({"ratio": "half"}, ["ratio", "half", "auto"]),
        ({"ratio": True}, ["ratio", "True"]),
        ({"ratio": 0.6, "method": "bipartite"}, ["ratio=0.6", "bipartite", "0.5"]),
        ({"ratio": 0.8}, ["ratio=0.8", "grid", "[2, 2]", "0.75"]),
        ({"ratio": 0.95, "stride": [4, 4]}, ["0.95", "0.9375"]),
        ({"steps": [[0, 0.8], [1, 0]]}, ["0.8", "0.75"]),
        ({"ratio": 0.5, "r": 10}, ["ratio=0.5", "r=10", "amount"]),
        ({"ratio": 0.5, "max_tokens": 10}, ["ratio=0.5", "max_tokens=10"]),
        ({"ratio": 0.5, "steps": [[0, 0.5]]}, ["ratio=0.5", "steps"]),
        ({"method": "kth", "ratio": 0.5}, ["ratio=0.5", "kth"]),
        ({"method": "bipartite", "k": 4}, ["k=4", "bipartite", "kth"]),
        ({"method": "downsample", "ratio": 0.5}, ["ratio=0.5", "downsample"]),
        ({"method": "bipartite", "ratio": 0.5, "window": 3}, ["window=3", "bipartite", "grid"]),
        ({"method": "random", "ratio": 0.5, "protect": 1}, ["protect=1", "bipartite"]),
        ({"method": "soft"}, ["method", "soft", "bipartite"]),
        ({"method": "tiles", "mean": "norm"}, ["mean='norm'", "tiles", "grid"]),
        ({"method": "downsample", "mean": "norm"}, ["mean='norm'", "downsample", "grid"]),
        ({"method": "cover", "ratio": 0.5, "mean": "norm"}, ["mean='norm'", "cover", "grid"]),
        (
            {"method": "prune", "ratio": 0.5, "metric": "logits", "apply_to": "kv"},
            ["metric='logits'", "prune", "hidden"],
        ),
        ({"apply_to": ["attn", "block"]}, ["apply_to", "block", "alone"]),
        ({"apply_to": []}, ["apply_to", "kv"]),
        ({"apply_to": ["keys"]}, ["apply_to", "keys", "kv"]),
        ({"metric": "queries"}, ["metric", "queries", "hidden"]),
        ({"window": 4}, ["window", "4", "odd"]),
        ({"stride": 2}, ["stride", "2", "two"]),
        ({"stride": [0, 2]}, ["stride", "0"]),
        ({"max_downsample": 3}, ["max_downsample", "3", "1, 2, 4, 8"]),
        ({"similarity": 2}, ["similarity", "2", "-1 to 1"]),
        ({"k": 0}, ["k", "0", "at least 1"]),
        ({"k": "tokens/4"}, ["k", "tokens/4", "tokens//N"]),
        ({"steps": [[0.5, 0.5], [0.2, 0]]}, ["steps", "rise"]),
        ({"steps": [[0, 0.5, 1]]}, ["steps", "[progress, ratio]"]),
        ({"steps": 3}, ["steps", "3"]),
        ({"rules": 3}, ["rules", "3"]),
        ({"rules": [{"ratio": 0.5}]}, ["rules", "min_tokens"]),
        ({"rules": [{"min_tokens": 1, "seed": 3}]}, ["rules", "seed"]),
        ({"rules": [{"min_tokens": 1, "ratio": 2}]}, ["ratio", "2"]),
        ({"proportional": "yes"}, ["proportional", "yes", "true"]),
        ({"reuse_steps": 0}, ["reuse_steps", "0", "1"]),
        ({"context": "cut"}, ["context", "cut", "trim"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"sx": 2, "stride": [2, 2]}, ["stride", "tomesd"]),
        ({"merge_mlp": "no"}, ["merge_mlp", "no", "true"]),
        ({"merge_attn": 0}, ["merge_attn", "0", "true"]),
    ],
)
def test_refusals_name_key_value_and_limit(keys: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        config(**keys)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_lists_may_be_those_of_omegaconf() -> None:
    keys = {
        "stride": [2, 4],
        "apply_to": ["kv"],
        "steps": [[0, 0.5], [1, 0]],
        "rules": [{"min_tokens": 64, "stride": [4, 4]}],
    }
    assert ToMeConfig.from_mapping(OmegaConf.create(keys)) == config(**keys)


def test_mapping_is_required() -> None:
    with pytest.raises(InputError, match=r"\[1\]"):
        ToMeConfig.from_mapping([1])


def test_tomesd_spellings() -> None:
    theirs = config(
        ratio=0.6, sx=4, sy=2, use_rand=True, merge_attn=False, merge_crossattn=True, merge_mlp=True
    )
    ours = config(ratio=0.6, stride=[2, 4], random=True, apply_to=["crossattn", "mlp"])
    assert theirs == ours
    assert config(merge_mlp=True, ratio=0.5).apply_to == ("attn", "mlp")


def test_rules_first_that_fits() -> None:
    rules = config(
        apply_to=["kv"],
        rules=[
            {"min_tokens": 9216, "method": "kth", "k": 8},
            {"min_tokens": 4096, "method": "kth", "k": 4, "metric": "keys_mean"},
        ],
    )
    large, middle, small = (rules.for_tokens(n) for n in (16384, 4096, 4095))
    assert (large.k, large.metric, large.apply_to) == (8, "keys", ("kv",))
    assert (middle.k, middle.metric) == (4, "keys_mean")
    assert large.max_downsample == 8  # min_tokens alone decides where a rule acts
    assert small.is_off


def test_rules_over_an_amount_beside_them() -> None:
    both = config(ratio=0.25, window=None, rules=[{"min_tokens": 4096, "r": 1000}])
    assert both.for_tokens(4096).r == 1000
    assert both.for_tokens(4096).ratio is None
    assert both.for_tokens(100).ratio == 0.25
    assert both.for_tokens(4096).window is None


@pytest.mark.parametrize(
    ("below", "above", "words"),
    [
        # an amount over a rule whose method it means nothing to
        ({"rules": [{"min_tokens": 512, "method": "kth", "k": 8}]}, {"ratio": 0.5}, "ratio=0.5"),
        ({"rules": [{"min_tokens": 512, "method": "kth", "k": 8}]}, {"r": 9}, "r=9"),
        ({"rules": [{"min_tokens": 512, "k": 8}], "method": "kth"}, {"max_tokens": 9}, "max_tok"),
        ({"rules": [{"min_tokens": 1, "method": "kth"}]}, {"steps": [[0, 0.5]]}, "steps"),
        ({"rules": [{"min_tokens": 9, "method": "downsample"}]}, {"ratio": 0.5}, "ratio=0.5"),
        ({"rules": [{"min_tokens": 9, "method": "tiles"}]}, {"ratio": "auto"}, "ratio='auto'"),
        ({"rules": [{"min_tokens": 9, "method": "tiles"}]}, {"steps": [[0, 0.5]]}, "steps"),
        # a rule in which the steps beside it would do nothing
        ({}, {"steps": [[0, 0.5], [1, 0]], "rules": [{"min_tokens": 9, "ratio": 0.5}]}, "steps"),
        ({}, {"steps": [[0, 0.5], [1, 0]], "rules": [{"min_tokens": 9, "k": 4}]}, "steps"),
        ({}, {"steps": [[0, 0.5]], "rules": [{"min_tokens": 9, "method": "downsample"}]}, "steps"),
        # the same in a second pass
        (
            {"rules": [{"min_tokens": 1, "method": "kth", "k": 4}]},
            {"hires": {"ratio": 0.5}},
            "ratio=0.5",
        ),
    ],
)
def test_an_amount_that_would_do_nothing_is_an_error(below: dict, above: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ToMeConfig.from_mapping(overlay(below, above))


def test_an_amount_over_rules_acts_in_them() -> None:
    rules = {"rules": [{"min_tokens": 512, "ratio": 0.25, "window": 5}]}
    ratio = ToMeConfig.from_mapping(overlay(rules, {"ratio": 0.5})).for_tokens(512)
    assert (ratio.ratio, ratio.window) == (0.5, 5)
    steps = ToMeConfig.from_mapping(overlay(rules, {"steps": [[0, 0.5], [1, 0]]})).for_tokens(512)
    assert (steps.ratio, steps.ratio_at(0.5)) == (None, 0.25)
    off = {"rules": [{"min_tokens": 512, "method": "kth", "k": 1}]}
    assert ToMeConfig.from_mapping(overlay(off, {"rules": off["rules"], "ratio": 0.5})).rules[0].k


@pytest.mark.parametrize("method", ["kth", "downsample", "tiles", "grid"])
@pytest.mark.parametrize("amount", [{"ratio": 0}, {"ratio": 0.0}, {"r": 0}])
def test_an_amount_of_0_over_rules_is_off(method: str, amount: dict) -> None:
    for keys in ({"k": 4} if method == "kth" else {}, {}):
        rules = [{"min_tokens": 1024, "method": method, **keys}]
        for below in ({"rules": rules}, {"method": method, **keys}):
            found = ToMeConfig.from_mapping(overlay(below, amount))
            assert found.is_off
            assert found.for_tokens(4096).removed(64, 64) == 0


def test_a_least_number_of_tokens_over_rules_holds_in_them() -> None:
    rules = [
        {"min_tokens": n, "ratio": ratio} for n, ratio in ((9216, 0.3), (4096, 0.2), (64, 0.1))
    ]
    below = {"rules": rules, "ratio": 0.5}
    found = ToMeConfig.from_mapping(overlay(below, {"min_tokens": 5000}))
    assert [(rule.min_tokens, rule.ratio) for rule in found.rules] == [(9216, 0.3), (5000, 0.2)]
    assert found.for_tokens(4096).min_tokens == 5000
    assert overlay(below, {"min_tokens": 10})["rules"] == rules
    assert ToMeConfig.from_mapping({**below, "min_tokens": 9999}).for_tokens(64).ratio == 0.1


def test_contradictions_are_found_whatever_lies_below() -> None:
    for keys in (
        {"ratio": 0.5, "r": 3},
        {"method": "kth", "ratio": 0.5},
        {"window": 3, "protect": 1},
        {"apply_to": "mlp", "metric": "logits"},
        {"similarity": 0.5, "metric": "logits"},
        {"method": "cover", "metric": "logits"},
    ):
        with pytest.raises(InputError):
            refuse_contradictions(keys)
    for keys in ({"protect": 1}, {"ratio": 0.9}, {"weighted": True}, {"similarity": 0.5}, {}):
        refuse_contradictions(keys)  # over a method or stride that has them


@pytest.mark.parametrize(
    "keys",
    [
        {"r": 10**30},
        {"seed": 2**64},
        {"stride": [10**12, 2]},
        {"k": "tokens//" + "9" * 99},
        {"similarity": float("nan")},
        {"steps": [[float("nan"), 0.5]]},
        {"apply_to": 3},
        {"apply_to": [["kv"]]},
        {"method": ["grid"]},
        {"method": {}},
        {"rules": ["kth"]},
        {"steps": {"0": 1}},
        {"hires": 3},
        {"hires": {"hires": {}}},
    ],
)
def test_whatever_a_value_is_the_refusal_is_one_line(keys: dict) -> None:
    with pytest.raises(InputError) as error:
        ToMeConfig.from_mapping(overlay({"ratio": 0.25}, keys))
    assert "\n" not in str(error.value)


def test_steps_are_piecewise_linear() -> None:
    steps = config(steps=[[0.2, 0.6], [0.6, 0.2], [0.6001, 0.0]])
    assert steps.ratio_at(0.0) == steps.ratio_at(0.2) == 0.6
    assert steps.ratio_at(0.4) == pytest.approx(0.4)
    assert steps.ratio_at(1.0) == 0.0


@pytest.mark.parametrize(
    ("keys", "size", "removed"),
    [
        ({"ratio": 0.5, "method": "bipartite"}, (3, 3), 4),
        ({"ratio": 0.5, "method": "bipartite", "protect": 2}, (3, 3), 3),
        ({"r": 100, "method": "bipartite"}, (3, 3), 4),
        ({"r": 100, "method": "bipartite", "protect": 2}, (2, 1), 0),
        ({"r": 100, "method": "random"}, (3, 3), 8),
        ({"k": 4}, (3, 3), 7),
        ({"k": 100}, (3, 3), 8),
        ({"k": "tokens//4"}, (3, 3), 5),
        ({"k": "tokens//16"}, (3, 3), 0),
        ({"ratio": 0.75}, (6, 6), 27),
        ({"r": 100}, (5, 6), 24),
        ({"r": 100}, (1, 7), 4),
        ({"ratio": 0.8889, "stride": [3, 3]}, (9, 9), 72),
        ({"max_tokens": 10}, (6, 6), 26),
        ({"max_tokens": 1}, (6, 6), 27),
        ({"max_tokens": 50}, (6, 6), 0),
        ({"method": "downsample", "stride": [2, 3]}, (6, 6), 30),
        ({"ratio": 0.29, "method": "random"}, (10, 10), 29),
    ],
)
def test_removed(keys: dict, size: tuple[int, int], removed: int) -> None:
    assert config(**keys).removed(*size) == removed


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("ratio", "0.5", 0.5),
        ("ratio", "auto", "auto"),
        ("k", "8", 8),
        ("k", "tokens//1024", "tokens//1024"),
        ("stride", "2 2", [2, 2]),
        ("stride", "2x4", [2, 4]),
        ("apply_to", "kv", ["kv"]),
        ("apply_to", "attn mlp", ["attn", "mlp"]),
        ("apply_to", "attn,mlp", ["attn", "mlp"]),
        ("window", "none", None),
        ("random", "true", True),
        ("steps", "0:0.6,0.7:0", [[0, 0.6], [0.7, 0]]),
        (
            "rules",
            "9216:method=kth,k=8;4096:method=kth,k=4",
            [
                {"min_tokens": 9216, "method": "kth", "k": 8},
                {"min_tokens": 4096, "method": "kth", "k": 4},
            ],
        ),
        (
            "rules",
            "1024:apply-to=attn,mlp,stride=2x2,ratio=0.5",
            [{"min_tokens": 1024, "apply_to": ["attn", "mlp"], "stride": [2, 2], "ratio": 0.5}],
        ),
    ],
)
def test_flags(key: str, text: str, value: object) -> None:
    assert parse_flag(key, text) == value
    ToMeConfig.from_mapping({key: value})


def test_overlay_replaces_the_amount() -> None:
    assert overlay({"ratio": 0.5, "window": 3}, {"r": 10}) == {"window": 3, "r": 10}
    assert overlay({"k": 4, "method": "kth"}, {"max_downsample": 8})["k"] == 4


def test_overlay_of_another_method_drops_what_it_does_not_know() -> None:
    below = {"ratio": 0.5, "stride": [2, 2], "window": 3, "apply_to": ["kv"]}
    assert overlay(below, {"method": "bipartite"}) == {
        "method": "bipartite",
        "ratio": 0.5,
        "apply_to": ["kv"],
    }


def test_overlay_reaches_into_rules() -> None:
    below = {"rules": [{"min_tokens": 4096, "ratio": 0.75, "window": 3}], "ratio": 0.1}
    above = ToMeConfig.from_mapping(overlay(below, {"ratio": 0.5}))
    assert above.for_tokens(4096).ratio == above.for_tokens(1).ratio == 0.5
    assert (
        "rules" not in overlay(below, {"rules": []}) or not overlay(below, {"rules": []})["rules"]
    )


def test_overlay_of_tomesd_spellings() -> None:
    assert overlay({"sx": 4, "sy": 4, "ratio": 0.9}, {"stride": [2, 2], "ratio": 0.5}) == {
        "stride": [2, 2],
        "ratio": 0.5,
    }


def test_every_key_is_a_field_and_has_help() -> None:
    assert list(KEYS) == list(ToMeConfig.__dataclass_fields__)
    assert all(key.help and key.values for key in KEYS.values())


def test_needs_no_torch() -> None:
    code = "import sys, ldm.modules.tome.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PRESETS.parents[1]).returncode == 0


# Tokens kept at each level (downsampling 1, 2, 4, 8) of a square picture.
KEPT = {
    "appendix_f": {
        512: (2048, 512, 128, 32),
        768: (4608, 1152, 288, 72),
        1024: (8192, 2048, 512, 128),
        1536: (18432, 4608, 1152, 288),
        2048: (32768, 8192, 2048, 512),
    },
    "birch_kth": {
        512: (1024, 1024, 256, 64),
        768: (2304, 2304, 576, 144),
        1024: (4096, 1024, 1024, 256),
        1536: (9216, 2304, 2304, 576),
        2048: (16384, 4096, 1024, 1024),
    },
    "birch_schedule": {
        512: (1024, 1024, 256, 64),
        768: (1024, 1152, 576, 144),
        1024: (1024, 1024, 1024, 256),
        1536: (1024, 1024, 1152, 576),
        2048: (1024, 1024, 1024, 1024),
    },
    "lalalune_r2048": {
        512: (2049, 513, 129, 33),
        768: (7168, 1153, 289, 73),
        1024: (14336, 2049, 513, 129),
        1536: (34816, 7168, 1153, 289),
        2048: (63488, 14336, 2049, 513),
    },
    "kv_cap": {
        512: (4096, 1024, 256, 64),
        768: (8192, 2304, 576, 144),
        1024: (8192, 4096, 1024, 256),
        1536: (8192, 8192, 2304, 576),
        2048: (8192, 8192, 4096, 1024),
    },
    "tomesd": {
        512: (2048, 1024, 256, 64),
        768: (4608, 2304, 576, 144),
        1024: (8192, 4096, 1024, 256),
        1536: (18432, 9216, 2304, 576),
        2048: (32768, 16384, 4096, 1024),
    },
    "comfy_q": {
        512: (2868, 1024, 256, 64),
        768: (6452, 2304, 576, 144),
        1024: (11469, 4096, 1024, 256),
        1536: (25805, 9216, 2304, 576),
        2048: (45876, 16384, 4096, 1024),
    },
    "todo": {
        512: (1024, 1024, 256, 64),
        768: (2304, 2304, 576, 144),
        1024: (4096, 4096, 1024, 256),
        1536: (9216, 9216, 2304, 576),
        2048: (16384, 16384, 4096, 1024),
    },
    "todo_large": {
        512: (1024, 1024, 256, 64),
        768: (2304, 2304, 576, 144),
        1024: (4096, 4096, 1024, 256),
        1536: (4096, 9216, 2304, 576),
        2048: (4096, 16384, 4096, 1024),
    },
    "balanced": {
        512: (256, 1024, 256, 64),
        768: (576, 2304, 576, 144),
        1024: (1024, 4096, 1024, 256),
        1536: (2304, 9216, 2304, 576),
        2048: (4096, 16384, 4096, 1024),
    },
    "fast": {
        512: (256, 64, 256, 64),
        768: (576, 144, 576, 144),
        1024: (1024, 256, 1024, 256),
        1536: (2304, 576, 2304, 576),
        2048: (4096, 1024, 4096, 1024),
    },
    "trim_context": {
        size: tuple((side // d) ** 2 for d in (1, 2, 4, 8)) for size, side in SIZES.items()
    },
}
KEPT |= {"kv_full_keys": KEPT["birch_kth"], "quality": KEPT["todo"], "ca_tome": KEPT["todo"]}
KEPT |= dict.fromkeys(("tofu", "sito", "toma", "ibtm"), KEPT["tomesd"])
KEPT["hypertile"] = {size: (32 * 32, *counts[1:]) for size, counts in KEPT["todo"].items()}


def preset(name: str) -> ToMeConfig:
    return ToMeConfig.from_mapping(yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))


def test_every_preset_is_counted() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(KEPT)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("size", SIZES)
def test_tokens_kept_by_presets(name: str, size: int) -> None:
    kept = []
    for downsample in (1, 2, 4, 8):
        side = SIZES[size] // downsample
        level = preset(name).for_tokens(side * side)
        acts = downsample <= level.max_downsample and side * side >= level.min_tokens
        kept.append(side * side - (level.removed(side, side) if acts else 0))
    assert tuple(kept) == KEPT[name][size]


@pytest.mark.parametrize("name", KEPT)
def test_presets_say_where_they_come_from(name: str) -> None:
    text = (PRESETS / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert "Source:" in text or name in ("quality", "balanced", "fast")


# --- second pass --------------------------------------------------------------------------------


def test_the_second_pass_has_the_keys_beside_it_and_its_own_over_them():
    config = ToMeConfig.from_mapping(
        {"ratio": 0.3, "window": 5, "hires": {"ratio": 0.6, "max_downsample": 2}}
    )
    assert (config.ratio, config.max_downsample) == (0.3, 1)
    second = config.second_pass
    assert (second.ratio, second.window, second.max_downsample) == (0.6, 5, 2)
    other = ToMeConfig.from_mapping({"ratio": 0.3, "hires": {"method": "kth", "k": 4}}).second_pass
    assert (other.method, other.k, other.ratio) == ("kth", 4, None)


def test_without_keys_of_its_own_the_second_pass_is_as_the_first():
    config = ToMeConfig.from_mapping({"ratio": 0.3, "seed": 4})
    assert config.second_pass == config


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_a_ratio_of_0_switches_any_preset_off(name):
    keys = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    config = ToMeConfig.from_mapping(overlay(keys, {"ratio": 0}))
    assert config.is_off
    assert config.for_tokens(64 * 64).removed(64, 64) == 0
    second = ToMeConfig.from_mapping(overlay(keys, {"hires": {"ratio": 0}})).second_pass
    assert second.is_off
    assert second.for_tokens(128 * 128).removed(128, 128) == 0


def test_either_pass_can_be_off():
    first = ToMeConfig.from_mapping({"ratio": 0.5, "hires": {"ratio": 0}})
    assert (first.is_off, first.second_pass.is_off) == (False, True)
    second = ToMeConfig.from_mapping({"hires": {"ratio": 0.5}})
    assert (second.is_off, second.second_pass.is_off) == (True, False)
    assert not first.changes_nothing
    assert not second.changes_nothing
    assert not ToMeConfig.from_mapping({"context": "trim"}).changes_nothing
    assert ToMeConfig.from_mapping({"ratio": 0, "hires": {"ratio": 0}}).changes_nothing


def test_the_second_pass_beside_rules():
    rules = [{"min_tokens": 1024, "ratio": 0.6}]
    config = ToMeConfig.from_mapping({"rules": rules, "hires": {"window": 5}})
    assert config.for_tokens(4096).ratio == config.second_pass.for_tokens(4096).ratio == 0.6
    assert config.second_pass.for_tokens(4096).window == 5
    assert config.for_tokens(4096).window == 3


@pytest.mark.parametrize(
    ("hires", "message"),
    [
        (0.5, "ToMe hires=0.5: must be a mapping of other keys"),
        ({"ration": 0.5}, "ToMe has no key 'ration'"),
        ({"ratio": 0.9}, "can remove at most 0.75"),
        ({"hires": {}}, "cannot hold another 'hires'"),
        ({"r": 3, "k": 2}, "both set the amount"),
    ],
)
def test_the_second_pass_is_checked_like_the_rest(hires, message):
    with pytest.raises(InputError, match=message):
        ToMeConfig.from_mapping({"ratio": 0.25, "hires": hires})


def test_what_is_said_of_the_second_pass_is_laid_over_what_was():
    preset = {"ratio": 0.3, "hires": {"ratio": 0.5, "window": 5}}
    assert overlay(preset, {"ratio": 0.1})["hires"] == {"ratio": 0.5, "window": 5}
    assert overlay(preset, {"hires": {"r": 9}})["hires"] == {"r": 9, "window": 5}


def test_a_flag_for_the_second_pass():
    keys = parse_flag("hires", "ratio=0.6,apply_to=kv,mlp,stride=2x4")
    assert keys == {"ratio": 0.6, "apply_to": ["kv", "mlp"], "stride": [2, 4]}
