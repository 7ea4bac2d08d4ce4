import dataclasses
import json

import pytest

from ldm.config import model_tome, preset_names
from ldm.errors import InputError
from ldm.infotext import understood
from ldm.modules.tome.config import ToMeWish
from ldm.web.form import NO_PRESET, OURS, Base, form_of, read_form
from ldm.web.limits import in_labels
from ldm.web.program import build_parser
from ldm.web.words import line_of

DEFAULTS = {"W": 16, "H": 24, "steps": 2, "scale": 4.0, "sampler": "ddim", "prompt": "hills"}


def start(*flags):
    base = Base.from_arguments(build_parser().parse_args(list(flags)))
    return base, base.first_form(DEFAULTS)


def resolve(tome):
    return model_tome({}, tome)


def test_flags_win_over_the_models_defaults():
    _, form = start("--steps", "9", "--tome-preset", "tomesd", "--tome-ratio", "0.3")
    assert (form["W"], form["H"], form["steps"], form["prompt"]) == (16, 24, 9, "hills")
    assert (form["preset"], form["ratio"]) == ("tomesd", 0.3)
    assert start()[1]["preset"] == NO_PRESET
    assert start("--tome-preset", "balanced")[1]["ratio"] == 0.9375
    assert start("--tome-ratio", "auto")[1]["more"] == "tome.ratio auto"


def test_the_page_chooses_a_seed_and_reads_emphasis_and_long_prompts():
    base, form = start()
    assert (form["seed"], form["emphasis"], form["long_prompt"]) == (-1, True, True)
    assert read_form(base, form).settings.seed >= 0
    assert start("--seed", "5")[1]["seed"] == 5


def test_presets_come_in_order_each_with_a_line():
    base, _ = start()
    assert tuple(base.presets)[:3] == OURS
    assert all(line_of(name) for name in (NO_PRESET, *preset_names()))


def test_fields_are_settings():
    base, form = start("--ddim_eta", "0.5")
    form |= {"prompt": "the sea", "steps": 7, "W": None, "ratio": 0.5, "hires_ratio": "0.25"}
    form |= {"hires_steps": 0}
    form |= {"more": "fixed_code\n\ntome.window 5\nscale 3\ntome-stride 2 2", "hires_scale": 2}
    draw = read_form(base, form)
    settings = draw.settings
    assert (settings.prompt, settings.steps, settings.W) == ("the sea", 7, None)
    assert (settings.eta, settings.fixed_code, settings.scale) == (0.5, True, 3.0)
    assert draw.tome.keys == {
        **{"ratio": 0.5, "window": 5, "stride": [2, 2]},
        "hires": {"ratio": 0.25},
    }


def test_no_preset_and_no_ratio_is_no_merging():
    base, form = start("--tome-ratio", "0.5")
    assert read_form(base, form).tome.keys == {"ratio": 0.5}
    assert read_form(base, {**form, "ratio": 0.0}).tome == ToMeWish(is_off=True)


def test_a_preset_keeps_its_amount_until_the_ratio_is_moved():
    base, form = start("--tome-preset", "tomesd")
    assert read_form(base, form).tome.keys["ratio"] == 0.5
    assert read_form(base, {**form, "ratio": 0.25}).tome.keys["ratio"] == 0.25
    assert base.preset_ratio("birch_kth") is None
    kth = {**form, "preset": "birch_kth", "ratio": 0.0}
    assert read_form(base, kth).tome.keys["k"] == 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("W", 0, "Width 0: allowed is "),
        ("W", 16.5, "Width: must be a whole number, not 16.5"),
        ("W", "x", "Width: must be a whole number"),
        ("steps", 0, "Steps 0: allowed is 1 to 1000"),
        ("steps", True, "Steps: must be a whole number, not True"),
        ("scale", float("nan"), "Guidance scale nan: "),
        ("seed", 2**63, "Seed 9223372036854775808: allowed is"),
        ("prompt", 5, "Prompt: must be a text"),
        ("prompt", "half \ud800", "Prompt: "),
        ("emphasis", "yes", "emphasis 'yes': "),
        ("sampler", "--help", "Sampler --help: allowed is ddim, plms"),
        ("sampler", ["ddim"], "Sampler: must be a text"),
        ("preset", "/etc/passwd", "ToMe preset '/etc/passwd': choose one of none, quality"),
        ("preset", ["none"], "ToMe preset ['none']: choose"),
        ("ratio", [0.5], "ToMe ratio [0.5]: must be auto or a number"),
        ("more", "ckpt x", "'ckpt' is no setting of a picture"),
        ("more", "--help", "'__help' is no setting of a picture"),
        (
            "more",
            "tome.apply_to kv --help",
            "ToMe apply to ['kv', '--help']: must be one or more of",
        ),
        ("more", "tome.preset /etc/passwd", "there is no ToMe preset '/etc/passwd'"),
        ("more", 'prompt "x', "No closing quotation"),
        ("more", "steps 1" + "0" * 30, "Steps 1000000"),
        ("more", "scale x", "Guidance scale: must be a number, not 'x'"),
    ],
)
def test_what_cannot_be_used_is_named_in_the_labels_words(field, value, message):
    base, form = start()
    with pytest.raises(InputError) as error:
        read_form(base, {**form, field: value})
    assert message in in_labels(str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("preset", "ratio", "more"),
    [
        (NO_PRESET, 0.0, ""),
        (NO_PRESET, 0.5, "fixed_code true"),
        ("tomesd", 0.25, ""),
        ("birch_schedule", 0.0, ""),
        (NO_PRESET, 0.0, "tome.method kth\ntome.k 4\ntome.apply_to kv"),
        (NO_PRESET, 0.0, "sampler ddim\nddim-eta 0.5"),
        (NO_PRESET, 0.5, "tome.stride 2 4\ntome.window 5"),
        (NO_PRESET, 0.5, "tome.metric hidden\ntome.window none"),
    ],
)
def test_a_pictures_settings_come_back(preset, ratio, more):
    base, form = start("--sampler", "euler")
    form |= {"preset": preset, "ratio": ratio, "more": more, "seed": 7, "schedule": "uniform"}
    draw = read_form(base, form)
    config = resolve(draw.tome)
    settings = dataclasses.asdict(draw.settings.filled(DEFAULTS))
    about = json.dumps({**settings, "tome": dataclasses.asdict(config)})
    picture = understood({"ldm": about}, "x.png")
    found, notes = form_of(base, picture, resolve, base.first_form(DEFAULTS))
    assert notes == []
    again = read_form(base, found)
    assert resolve(again.tome) == config
    assert again.settings == draw.settings.filled(DEFAULTS)
    if not more.startswith("tome"):
        assert (found["preset"], found["ratio"]) == (preset, ratio)


def test_what_the_fields_cannot_say_is_said():
    base, usual = start()
    config = resolve({"ratio": 0.5, "hires": {"ratio": 0.25}})
    about = json.dumps({"prompt": "x", "tome": dataclasses.asdict(config)})
    found, notes = form_of(base, understood({"ldm": about}, "x.png"), resolve, usual)
    assert notes == ["its Token Merging settings are more than the fields can say"]
    assert found["prompt"] == "x"


@pytest.mark.parametrize(
    "about",
    [
        {"tome": {"apply_to": ["kv", "--help"], "ratio": 0.5}},
        {"tome": {"method": "grid\nsteps 999", "ratio": 0.5}},
        {"tome": {"ratio": 1e99, "rules": [{"a": [[[]]]}]}},
        {"steps": "--ckpt=/etc/passwd", "seed": [1], "prompt": {"a": 1}, "W": -1},
        {"rng": "image\nsteps 999", "eta": True, "sampler": "x"},
    ],
)
def test_nothing_of_a_picture_is_believed(about):
    base, usual = start()
    found, notes = form_of(base, understood({"ldm": json.dumps(about)}, "x.png"), resolve, usual)
    assert notes
    assert all("\n" not in note for note in notes)
    draw = read_form(base, found)
    assert draw.settings.steps == 2


def test_open_fields_show_0_and_leave_the_choice_to_the_model(base):
    form = base.first_form({"prompt": "x"})
    assert (form["reuse_deep"], form["hires_steps"]) == (0, 0)
    for empty in (0, None):
        settings = read_form(base, {**form, "reuse_deep": empty, "hires_steps": empty}).settings
        assert (settings.reuse_deep, settings.hires_steps) == (None, None)
    assert read_form(base, {**form, "reuse_deep": 3}).settings.reuse_deep == 3
