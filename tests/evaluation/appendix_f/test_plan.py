import pytest

from ldm.cli import options, txt2img
from ldm.config import preset_names
from ldm.errors import InputError
from ldm.evaluation.appendix_f.plan import (
    CONTROLS,
    Plan,
    Setting,
    amount,
    control_setting,
    flags_of,
    preset_settings,
    read_settings,
    unique,
)
from ldm.modules.tome.config import ToMeConfig
from ldm.settings import Settings

MINE = """
plain: {ratio: 0.5}
changed preset: {preset: tomesd, stride: [4, 4], ratio: 0.9, apply_to: [attn, mlp]}
over the run: {steps: [[0.0, 0.6], [0.7, 0.0]], proportional: true}
by size:
  rules: [{min_tokens: 4096, method: kth, k: 8, apply_to: [kv]}, {min_tokens: 64, ratio: 0.25}]
no window: {ratio: 0.5, window: null}
random, much: {control: random, ratio: 0.75}
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return path


def test_flags_stand_for_the_configuration(mine):
    settings = [*read_settings(mine), *preset_settings(preset_names(), [0.25, 0.5])]
    assert len(settings) > len(preset_names()) + 5
    for setting in settings:
        if not setting.control:
            args = txt2img.build_parser().parse_args(list(setting.flags))
            assert ToMeConfig.from_mapping(options.wishes(args).tome.keys) == setting.config


def test_a_ratio_is_given_where_the_method_can_have_it():
    assert amount({"method": "kth", "k": 8, "apply_to": ["kv"]}, 0.75) == {"k": 4}
    assert amount({"method": "kth", "k": 8, "apply_to": ["kv"]}, 0.4) is None
    assert amount({"method": "bipartite", "ratio": 0.3}, 0.5) == {"ratio": 0.5}
    assert amount({"method": "bipartite", "ratio": 0.3}, 0.6) is None
    assert amount({"method": "downsample", "stride": [2, 2]}, 0.5) is None
    assert amount({"context": "trim"}, 0.5) is None


def test_the_same_setting_is_drawn_once_and_names_are_unique():
    twice = [Setting("a", ToMeConfig(ratio=0.5)), Setting("b", ToMeConfig(ratio=0.5))]
    assert [s.name for s in unique(twice)] == ["unmerged", "a"]
    other = [twice[0], Setting("a", ToMeConfig(ratio=0.25))]
    with pytest.raises(InputError, match="setting 'a': two different ones"):
        unique(other)
    keys = {control_setting(name).key for name in CONTROLS if name != "steps"}
    assert len(keys) == len(CONTROLS) - 1


def test_picture_i_has_seed_plus_i_and_batches_are_cut_alike():
    settings = (Setting("unmerged"),)
    plan = Plan({64: settings, 128: settings}, ("a", "b", "c"), 2, Settings(seed=10, n_samples=4))
    batches = plan.batches()
    assert [(b.size, b.first, len(b.pictures)) for b in batches] == [
        *((64, 0, 4), (64, 4, 2), (128, 0, 4), (128, 4, 2))
    ]
    assert batches[0].pictures == (("a", 10), ("a", 11), ("b", 12), ("b", 13))


def test_what_is_wrong_in_a_file_is_said(tmp_path):
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("bad: {ratio: 2}", "mine.yaml: bad: ToMe ratio=2"),
        ("bad: 3", "mine.yaml: bad: must be a mapping"),
        ("bad: {control: magic}", "mine.yaml: bad: control 'magic': the controls are again"),
        ("bad: {reuse_deep: 0}", "mine.yaml: bad: .*reuse_deep.* 0: allowed is 1 to 1000"),
        ("bad: {control: none, reuse_deep: 2}", "mine.yaml: bad: a control takes no reuse_deep"),
        ("bad: {control: none, ratio: 0.3}", "mine.yaml: bad: a control takes no ratio"),
        ("bad: {control: random, ratio: auto}", "mine.yaml: bad: ratio 'auto': a control takes"),
        ("bad: {control: drop, ratio: 0}", "mine.yaml: bad: ratio 0: a control takes a number"),
        ("bad: {control: drop, ratio: null}", "mine.yaml: bad: ratio None: a control takes"),
        ("bad: {control: none, window: 3}", "mine.yaml: bad: a control takes no window"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_settings(path)


def test_deep_features_may_be_reused_alone_and_with_merging(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("a: {reuse_deep: 2}\nb: {preset: todo, reuse_deep: 2}\nc: {preset: todo}")
    a, b, c = read_settings(path)
    assert a.sampling == b.sampling == {"reuse_deep": 2}
    assert (a.config.is_off, c.sampling) == (True, {})
    assert b.config == c.config
    assert len({Setting("unmerged").key, a.key, b.key, c.key}) == 4
    assert a.flags == ("--reuse_deep", "2")
    assert b.flags == ("--tome-preset", "todo", "--reuse_deep", "2")


def test_a_long_name_fits_the_name_of_a_folder():
    one, other = (Setting("n" * 300 + end, ToMeConfig(ratio=0.5)) for end in ("a", "b"))
    assert len(one.folder) < 120
    assert one.folder == other.folder  # which do the same
    assert Setting("ToDo 2x2").folder.startswith("todo-2x2-")


def test_flags_of_nothing_are_none():
    assert flags_of({}) == ()
