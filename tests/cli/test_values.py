import pytest

from ldm.cli import img2img, options, txt2img
from ldm.cli.values import Wishes, typed
from ldm.errors import InputError
from ldm.modules.tome.config import ToMeWish


def wishes(*argv, program=txt2img):
    own = ["--init-img", "x.png"] if program is img2img else []
    return options.wishes(program.build_parser().parse_args([*own, *argv]))


def test_values_are_laid_over_those_of_the_command_line():
    before = wishes("--steps", "9", "--tome-ratio", "0.5")
    after = before.changed({"ddim_steps": 20, "plms": True, "tome": {"ratio": 0.25, "window": 5}})
    settings = after.settings()
    assert (settings.steps, settings.sampler, after.tome.keys) == (
        20,
        "plms",
        {"ratio": 0.25, "window": 5},
    )
    assert (before.settings().steps, before.tome.keys) == (9, {"ratio": 0.5})
    back = after.changed({"steps": None, "tome.window": None, "dpm_solver": False})
    assert (back.settings().steps, back.settings().sampler) == (None, None)
    assert back.tome.keys == {"ratio": 0.25}


@pytest.mark.parametrize(("key", "preset"), [("window", "quality"), ("similarity", "ca_tome")])
def test_none_is_a_value_of_the_keys_that_have_it(key, preset):
    before = wishes("--tome-preset", preset)
    said = wishes("--tome-preset", preset, f"--tome-{key}", "none").tome
    assert said.keys[key] is None
    name = f"tome.{key}"
    for changes in ({"tome": {key: None}}, {name: "none"}, {name: typed(name, ["none"])}):
        assert before.changed(changes).tome == said
    assert before.changed({"tome": {key: None}}).changed({name: None}).tome == before.tome
    assert before.changed({"tome": {"ratio": None}}).tome == before.tome
    assert typed("tome.hires_ratio", ["none"]) is None


def test_one_program_s_settings_are_not_another_s():
    assert wishes(program=img2img).changed({"strength": 0.3}).settings().strength == 0.3
    for name, program in (("strength", txt2img), ("hires_scale", img2img)):
        with pytest.raises(InputError, match=f"'{name}' is no setting of a picture"):
            wishes(program=program).changed({name: 0.5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "20"}, "steps: must be a whole number, not '20'"),
        ({"steps": 20.5}, "steps: must be a whole number"),
        ({"steps": True}, "steps: must be a whole number"),
        ({"scale": [1]}, "scale: must be a number"),
        ({"prompt": ["a", "b"]}, "prompt: must be a text"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": {"a": 1}}, "prompt: must be a text"),
        ({"emphasis": "yes"}, "emphasis 'yes': allowed is true or false"),
        ({"plms": 1}, "plms 1: allowed is true or false"),
        ({"tome": {"apply_to": ["kv", "--help"]}}, "--tome-apply-to .*must be one or more of"),
        ({"tome": {"apply_to": {"--help": 1}}}, "--tome-apply-to .*must be"),
        ({"tome": {"ratio": "0.5"}}, "--tome-ratio 0.5: must be auto or a number"),
        ({"tome": {"ratio": [[[0.5]]]}}, "--tome-ratio .*must be auto or a number"),
        ({"tome": [0.5]}, r"tome \[0.5\]: must be a preset's name, or keys with their values"),
        ({"tome": 0.5}, "tome 0.5: must be a preset's name, or keys"),
        ({"tome": "quick"}, "there is no ToMe preset 'quick'"),
        ({"tome": {"preset": "/etc/passwd"}}, "there is no ToMe preset '/etc/passwd'"),
        ({"tome_preset": "mine.yaml"}, "there is no ToMe preset 'mine.yaml'"),
        ({"tome_preset": ["fast"]}, "there is no ToMe preset"),
        ({"plms": True, "sampler": "ddim"}, "plms and sampler: this is said twice"),
        ({"ddim_steps": 20, "steps": 30}, "ddim_steps and steps: this is said twice"),
        ({"tome": {"ratio": 0.5}, "tome.ratio": 0.4}, "tome_ratio: this is said twice"),
        ({"--help": None}, "'__help' is no setting"),
        ({"help": True}, "'help' is no setting"),
        ({"ckpt": "/etc/passwd"}, "'ckpt' is no setting"),
        ({"outdir": "/tmp"}, "'outdir' is no setting"),
        ({"from_file": "/etc/passwd"}, "'from_file' is no setting"),
        ({"prompt --ckpt=/etc/passwd": "x"}, "is no setting"),
        ({"a\nb\x1b[31m": 1}, r"'a\\nb\\x1b"),
        ({"x" * 5000: 1}, "is no setting"),
    ],
)
def test_what_is_no_setting_or_no_value_is_one_short_line(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("ratio: 0.5\n")
    with pytest.raises(InputError, match=message) as error:
        wishes().changed(changes).check()
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


def test_text_that_looks_like_flags_is_text():
    prompt = "--help --ckpt=/etc/passwd @file {x}"
    assert wishes().changed({"prompt": prompt}).settings().prompt == prompt


def test_a_shipped_preset_has_a_name():
    tome = wishes("--tome-window", "5").changed({"tome_preset": "tomesd"}).tome.keys
    assert (tome["ratio"], tome["window"]) == (0.5, 5)
    assert wishes("--tome-window", "5").changed({"tome": "tomesd"}).tome.keys == tome
    assert wishes("--tome-preset", "tomesd").changed({"tome_preset": None}).tome == ToMeWish()
    assert wishes().changed({"no_tome": True}).tome == ToMeWish(is_off=True)


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [
        ("steps", ["30"], 30),
        ("scale", ["7.5"], 7.5),
        ("emphasis", [], True),
        ("emphasis", ["false"], False),
        ("prompt", ["3"], "3"),
        ("negative_prompt", ["grey,", "blurry"], "grey, blurry"),
        ("tome.ratio", ["0.4"], 0.4),
        ("tome-stride", ["2", "4"], [2, 4]),
        ("tome.steps", ["0:0.6,0.7:0"], [[0, 0.6], [0.7, 0]]),
        ("tome.apply-to", ["[kv,", "q]"], ["kv", "q"]),
        ("tome.hires_ratio", ["0.6"], 0.6),
        ("tome_preset", ["fast"], "fast"),
        ("tome", ["fast"], "fast"),
    ],
)
def test_typed_words_stand_for_values(name, words, value):
    assert typed(name, words) == value


def test_what_is_said_on_the_command_line_stays_said():
    flags = ["--prompt", "x", "--seed", "7", "--tome-k", "4", "--tome-method", "kth"]
    assert dict(wishes(*flags).shown()) == {
        **{"prompt": "x", "seed": 7},
        **{"tome-method": "kth", "tome-k": 4},
    }
    assert Wishes(frozenset()).tome == ToMeWish()
