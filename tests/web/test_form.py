import dataclasses
import json

import pytest

from ldm.errors import InputError
from ldm.modules.tome.config import ToMeConfig
from ldm.web import program
from ldm.web.form import NO_PRESET, first_form, form_of, preset_ratio, read_form

DEFAULTS = {"W": 16, "H": 24, "steps": 2, "scale": 4.0, "sampler": "ddim", "prompt": "hills"}


def start(*flags):
    args = program.build_parser().parse_args(list(flags))
    return args, first_form(args, DEFAULTS)


def resolve(tome):
    return ToMeConfig.from_mapping(tome or {})


def test_flags_win_over_the_models_defaults():
    _, form = start("--steps", "9", "--tome-preset", "tomesd", "--tome-ratio", "0.3")
    assert (form["W"], form["H"], form["steps"], form["prompt"]) == (16, 24, 9, "hills")
    assert (form["preset"], form["ratio"]) == ("tomesd", 0.3)
    assert start()[1]["preset"] == NO_PRESET
    assert start("--tome-preset", "balanced")[1]["ratio"] == 0.9375


def test_fields_are_settings():
    args, form = start("--ddim_eta", "0.5")
    form |= {"prompt": "the sea", "steps": 7, "W": None, "ratio": 0.5}
    form["more"] = "emphasis\n\ntome.window 5\nscale 3"
    job = read_form(args, form)
    assert (job.settings.prompt, job.settings.steps, job.settings.W) == ("the sea", 7, None)
    assert (job.settings.eta, job.settings.emphasis, job.settings.scale) == (0.5, True, 3.0)
    assert job.tome == {"ratio": 0.5, "window": 5}


def test_no_preset_and_no_ratio_is_no_merging():
    args, form = start("--tome-ratio", "0.5")
    assert read_form(args, form).tome == {"ratio": 0.5}
    assert read_form(args, {**form, "ratio": 0.0}).tome is False


def test_a_preset_keeps_its_amount_until_the_ratio_is_moved():
    args, form = start("--tome-preset", "tomesd")
    assert read_form(args, form).tome["ratio"] == 0.5
    assert read_form(args, {**form, "ratio": 0.25}).tome["ratio"] == 0.25
    assert preset_ratio("birch_kth") is None
    kth = {**form, "preset": "birch_kth", "ratio": 0.0}
    assert read_form(args, kth).tome["k"] == 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("W", 0, "W 0: allowed is a number of pixels above 0"),
        ("steps", 0, "steps 0: allowed is 1 to 1000"),
        ("more", "ckpt x", "'ckpt' is no setting of a picture"),
        ("more", 'prompt "x', "No closing quotation"),
        ("sampler", "x", "sampler x: allowed is ddim"),
    ],
)
def test_what_cannot_be_used_is_named(field, value, message):
    args, form = start()
    with pytest.raises(InputError, match="(?s)" + message.replace("'", ".")):
        read_form(args, {**form, field: value})


@pytest.mark.parametrize(
    ("preset", "ratio", "more"),
    [
        (NO_PRESET, 0.0, ""),
        (NO_PRESET, 0.5, "emphasis true\nschedule karras"),
        ("tomesd", 0.25, ""),
        ("birch_schedule", 0.0, ""),
        (NO_PRESET, 0.0, "tome.method kth\ntome.k 4\ntome.apply_to kv"),
        (NO_PRESET, 0.0, "sampler ddim\nddim-eta 0.5"),
        (NO_PRESET, 0.5, "tome.stride 2 4\ntome.window 5"),
    ],
)
def test_a_pictures_settings_come_back(preset, ratio, more):
    args, form = start("--sampler", "euler")
    form |= {"preset": preset, "ratio": ratio, "more": more, "seed": 7}
    job = read_form(args, form)
    config = resolve(job.tome)
    settings = dataclasses.asdict(job.settings.filled(DEFAULTS))
    about = json.loads(json.dumps({**settings, "tome": dataclasses.asdict(config)}))
    found, note = form_of(args, about, resolve)
    assert note == ""
    again = read_form(args, found)
    assert resolve(again.tome) == config
    assert again.settings == job.settings.filled(DEFAULTS)
    if not more.startswith("tome"):
        assert (found["preset"], found["ratio"]) == (preset, ratio)


def test_what_the_fields_cannot_say_is_said():
    args, _ = start()
    config = resolve({"ratio": 0.5, "hires": {"ratio": 0.25}})
    about = json.loads(json.dumps({"prompt": "x", "tome": dataclasses.asdict(config)}))
    found, note = form_of(args, about, resolve)
    assert "more than the fields can say" in note
    assert found["prompt"] == "x"
