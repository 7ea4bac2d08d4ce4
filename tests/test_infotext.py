"""Settings inside pictures: ours, and the web UIs' as they are found in the wild."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ldm.canvas import PictureNoise
from ldm.cli import img2img, options, txt2img
from ldm.config import load_preset, preset_names
from ldm.errors import InputError
from ldm.images import Picture, picture_texts, save_image
from ldm.infotext import plain, tome_keys, understood
from ldm.modules.tome.config import ToMeConfig, ToMeWish
from ldm.settings import Settings
from ldm.web_ui import web_ui_text

A1111 = """\
a (red:1.2) house, ((hills)) <lora:ink:0.8>
second line
Negative prompt: blurry, lowres
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, \
Model hash: 6ce0161689, Model: "v1-5, pruned", Denoising strength: 0.55, Clip skip: 2, \
Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, Token merging ratio: 0.5, \
Variation seed: 3, Lora hashes: "ink: aabbcc, x: dd", Version: v1.9.4"""


def test_the_web_ui_s_settings_are_understood_or_named():
    found = understood({"parameters": A1111}, "x.png")
    said = found.settings
    assert said["prompt"] == "a (red:1.2) house, ((hills)) <lora:ink:0.8>\nsecond line"
    assert said["negative_prompt"] == "blurry, lowres"
    assert (said["steps"], said["sampler"], said["schedule"]) == (20, "dpmpp_2m", "karras")
    assert (said["scale"], said["seed"], said["H"], said["W"]) == (7.0, 965400086, 768, 512)
    assert (said["hires_scale"], said["hires_steps"]) == (2.0, 10)
    assert (said["hires_strength"], said["hires_upscaler"]) == (0.55, "latent")
    assert (said["emphasis"], said["long_prompt"]) == (True, True)
    assert "strength" not in said
    assert found.tome == {**load_preset("tomesd"), "random": False, "ratio": 0.5}
    left_out = "\n".join(found.left_out)
    assert "Model hash '6ce0161689' (--ckpt)\nModel 'v1-5, pruned' (--ckpt)" in left_out
    for name in ("Variation seed '3' (has no counterpart here)", "Lora hash"):
        assert name in left_out
    assert "its second pass ran 10 steps; here strength x steps are run, so --hires_steps 19" in (
        left_out
    )
    assert "Version" not in left_out


def test_a_web_ui_s_picture_may_be_merged_in_its_second_pass_alone():
    text = A1111.replace("Token merging ratio:", "Token merging ratio hr:")
    config = ToMeConfig.from_mapping(understood({"parameters": text}, "x.png").tome)
    assert config.is_off
    assert (config.second_pass.ratio, config.second_pass.random) == (0.5, False)


BELOW = "a cat\nNegative prompt: fog\nSteps: 20, Sampler: Euler, Seed: 1, RNG: CPU"


@pytest.mark.parametrize(
    "below",
    [
        "Template: a {cat|dog}\nNegative Template: (fog:1.2), (rain:1.3)",
        "a dog\nNegative prompt: rain\nSteps: 9, Sampler: DDIM, Seed: 2",
    ],
)
def test_what_stands_below_the_settings_is_named(below):
    """Settings that are not in the last line were part of the negative prompt."""
    found = understood({"parameters": f"{BELOW}\n{below}"}, "x.png")
    assert (found.settings["prompt"], found.settings["negative_prompt"]) == ("a cat", "fog")
    assert (found.settings["steps"], found.settings["seed"]) == (20, 1)
    (one,) = found.left_out
    assert one.startswith(f"what stands below its settings: '{below.split()[0]}")


def test_of_two_settings_of_one_name_the_first_holds():
    """The second is inside of what another program put behind the settings."""
    found = understood(
        {"parameters": f'{BELOW}, Resources: [{{"name":"a, Steps: 9, b"}}]'}, "x.png"
    )
    assert found.settings["steps"] == 20


@pytest.mark.parametrize(
    ("rng", "is_other"),
    [("", True), (", RNG: NV", True), (", RNG: GPU", True), (", RNG: CPU", False)],
)
def test_noise_that_a_seed_does_not_give_here_is_said(rng, is_other):
    found = understood({"parameters": f"a cat\nSteps: 20, Sampler: Euler, Seed: 1{rng}"}, "x.png")
    assert any("a seed gives other noise" in line for line in found.left_out) == is_other
    assert is_other or not found.left_out


def test_noise_of_the_cpu_is_what_a_seed_gives_there():
    there = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(PictureNoise([7])(torch.Size((1, 4, 8, 8)))[0], there)
    assert "RNG: CPU" in web_ui_text({"rng": "image"})
    assert "RNG" not in web_ui_text({"rng": "upstream"})


@pytest.mark.parametrize(
    ("prompt", "is_other"),
    [("a (red:1.2) cat", True), ("a [red] cat", True), (r"a \(red\) cat BREAK sun", False)],
)
def test_weights_that_act_otherwise_here_are_said(prompt, is_other):
    found = understood({"parameters": f"{prompt}\nSteps: 20, Seed: 1, RNG: CPU"}, "x.png")
    assert any(line.startswith("how its weights act") for line in found.left_out) == is_other


def test_what_was_drawn_over_another_picture_is_said():
    plain = "a house\nSteps: 20, Sampler: Euler, Seed: 1"
    for more, is_said in (
        (", Denoising strength: 0.5", True),
        (", Denoising strength: 0.5, Hires upscale: 2", False),
        (", Denoising strength: 0.5, Hires resize: 1024x1024", False),
        ("", False),
    ):
        found = understood({"parameters": plain + more}, "x.png")
        assert any("over another picture" in one for one in found.left_out) == is_said
        assert ("strength" in found.settings) == is_said


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("a [cat:dog:0.5] <lora:ink:0.8>", "prompt editing"),
        ("a cat AND a dog", "AND"),
        ("a cat\nNegative prompt: [fog|rain]", "alternating words"),
        ("a cat\nNegative prompt: <lora:ink:0.8>", "LoRA in a negative prompt"),
    ],
)
def test_syntax_that_is_not_included_is_named_before_anything_is_drawn(prompt, kind):
    text = f"{prompt}\nSteps: 20, Sampler: Euler a, Seed: 1, RNG: CPU"
    found = understood({"parameters": text}, "x.png")
    (one,) = (line for line in found.left_out if "how its weights act" not in line)
    assert f"the web UIs' {kind} is not included" in one


@pytest.mark.parametrize(
    ("line", "left_out"),
    [
        ("Steps: 20, Sampler: Restart, Seed: 1, RNG: CPU, Size: 512x512", "Sampler 'Restart'"),
        ("Steps: many, Sampler: Euler a, Seed: 1, RNG: CPU", "Steps 'many'"),
        ("Steps: 20, Sampler: Euler a, Seed: 1, RNG: CPU, Size: 512", "Size '512'"),
        ("Steps: 20, Sampler: Euler a, Seed: 1, RNG: CPU, CFG scale: nan", "CFG scale 'nan'"),
        ("Steps: 20, Sampler: Euler a, Seed: 1, RNG: CPU, Hires upscale: inf", "Hires upscale"),
        ("Steps: 20, Seed: 1, RNG: CPU, Token merging ratio: nan", "Token merging ratio 'nan'"),
        (f"Steps: {'9' * 5000}, Sampler: Euler a, Seed: 1, RNG: CPU", "Steps '999"),
        (
            "Steps: 20, Sampler: Euler a, Seed: 1, RNG: CPU, Schedule type: Turbo",
            "Schedule type 'Turbo'",
        ),
    ],
)
def test_a_value_that_cannot_be_used_is_named_and_the_rest_stands(line, left_out):
    found = understood({"parameters": f"hills\n{line}"}, "x.png")
    assert found.settings["prompt"] == "hills"
    (one,) = found.left_out
    assert one.startswith(left_out)
    assert len(one) < 200


def read(line):
    return understood({"parameters": f"hills\n{line}"}, "x.png")


def test_merging_in_the_second_pass_alone_leaves_the_first_one_alone():
    line = "Steps: 20, Sampler: Euler, Seed: 1, Hires upscale: 2, Token merging ratio hr: 0.5"
    config = ToMeConfig.from_mapping(read(line).tome)
    assert config.is_off
    assert (config.second_pass.ratio, config.second_pass.random) == (0.5, False)


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [("DPM++ 2M", "karras"), ("DPM++ SDE", "karras"), ("Euler a", None), ("DDIM", None)],
)
def test_a_sampler_of_the_web_ui_has_a_schedule_of_its_own(sampler, schedule):
    line = f"Steps: 20, Sampler: {sampler}, Schedule type: Automatic, Seed: 1"
    assert read(line).settings.get("schedule") == schedule
    assert "schedule" not in read(f"Steps: 20, Sampler: {sampler}, Seed: 1").settings


def test_the_noise_of_ddim_has_a_name_of_its_own():
    found = read("Steps: 20, Sampler: DDIM, Seed: 1, RNG: CPU, Eta DDIM: 0.5")
    assert (found.settings["eta"], found.left_out) == (0.5, [])


def test_the_strength_of_a_second_pass_to_a_size_is_its_own():
    line = "Steps: 20, Sampler: DDIM, Seed: 1, Hires resize: 512x768, Denoising strength: 0.5"
    found = read(line)
    assert "strength" not in found.settings
    assert found.settings["hires_strength"] == 0.5
    assert found.left_out[0].startswith("Hires resize '512x768'")


@pytest.mark.parametrize("strength", ["1e-320", "nan", "-1", "0", "1", "inf", "0.001"])
def test_a_strength_that_tells_no_number_of_steps_is_left_alone(strength):
    line = f"Steps: 20, Sampler: DDIM, Seed: 1, Hires upscale: 2, Denoising strength: {strength}"
    assert not any("second pass" in said for said in read(line).left_out)


@pytest.mark.parametrize(
    ("run", "is_shared"),
    [
        ({"rng": "upstream", "n_samples": 1, "first_seed": 7}, False),
        ({"rng": "upstream", "n_samples": 2, "first_seed": 7}, True),
        ({"rng": "upstream", "n_samples": 1, "first_seed": 6}, True),
        ({"fixed_code": True, "n_samples": 2, "first_seed": 7}, False),
        ({"fixed_code": True, "n_samples": 2, "first_seed": 6}, True),
        ({"n_samples": 2, "first_seed": 6}, False),
    ],
)
def test_noise_that_pictures_shared_is_named(run, is_shared):
    found = understood({"ldm": json.dumps({"prompt": "x", "seed": 7, "rng": "image", **run})}, "x")
    said = f"(begun by --seed {run['first_seed']} --n_samples {run['n_samples']})"
    assert any(said in line for line in found.left_out) == is_shared


def test_what_else_a_picture_was_made_with_is_named():
    model = {"name": "a", "vae": "soft", "ema": True}
    nets = [{"name": "edges", "strength": 0.5, "canny": True}, {"name": "depth", "hash": "00"}]
    about = {"prompt": "x", "seed": 7, "model": model, "controlnets": nets}
    assert understood({"ldm": json.dumps(about)}, "x").left_out == [
        "its model, 'a' (--ckpt)",
        "its VAE, 'soft' (--vae)",
        "its averaged weights (--ema)",
        "'edges' (--controlnet --control_strength 0.5 --control_canny)",
        "'depth' (--controlnet)",
    ]


def test_a_negative_prompt_begins_a_line():
    text = (
        "a sign that says Negative prompt: none\n  Negative prompt: fog\nSteps: 2, Seed: 1, Eta: 0"
    )
    said = understood({"parameters": text}, "x.png").settings
    assert said["prompt"] == "a sign that says Negative prompt: none"
    assert said["negative_prompt"] == "fog"


def test_a_prompt_alone_is_a_prompt():
    choice = "{red|blue} hills\nSteps: 20, Sampler: DDIM, Seed: 1"
    assert understood({"parameters": choice}, "x").settings["prompt"] == "{red|blue} hills"
    assert understood({"parameters": "hills: a view"}, "x").settings["prompt"] == "hills: a view"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "x.png: this picture does not say how it was made"),
        ({"prompt": "{}", "workflow": "{}"}, "a ComfyUI graph"),
        ({"prompt": '{"3": {"class_type": "KSampler"}}'}, "a ComfyUI graph"),
        ({"parameters": '{"sui_image_params": {"prompt": "hills"}}'}, "JSON of another program"),
        ({"parameters": '{"base_model": "x"}', "fooocus_scheme": "fooocus"}, "Fooocus's settings"),
        ({"sd-metadata": "{}"}, "InvokeAI's settings"),
        ({"Software": "NovelAI", "Comment": '{"steps": 28}'}, "NovelAI's settings"),
        ({"prompt": "a house", "seed": "5"}, "another program's settings"),
        ({"ldm": "[" * 9999}, "x.png, its settings: JSON nested deeper"),
        ({"ldm": "[1]"}, "must be an object"),
        ({"ldm": '{"prompt": "\\ud800"}'}, "lone surrogate"),
    ],
)
def test_what_says_nothing_that_can_be_read_is_refused(texts, message):
    with pytest.raises(InputError, match=message):
        understood(texts, "x.png")


@pytest.mark.parametrize("name", preset_names())
def test_a_noted_configuration_comes_back(name):
    config = ToMeConfig.from_mapping(load_preset(name))
    noted = json.loads(json.dumps(dataclasses.asdict(config)))
    keys = tome_keys(noted)
    assert keys is not None
    assert plain(ToMeConfig.from_mapping(keys)) == noted
    assert tome_keys({**noted, "ratio": "a lot"}) is None
    assert tome_keys(plain(ToMeConfig())) == {}


# --- in files, and over flags -------------------------------------------------------------------


def save(path, text, **options):
    """A small picture that carries the web UI's text as that writes it."""
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    if path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", text)
        image.save(path, pnginfo=info)
        return path
    exif = Image.Exif()
    order = options.get("order", "be")
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(f"utf-16-{order}")
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "le.jpg"])
def test_png_jpeg_and_webp_carry_the_text(tmp_path, name):
    order = "le" if name.startswith("le") else "be"
    path = save(tmp_path / name, A1111.replace("house", "hüte 日本"), order=order)
    assert picture_texts(path)["parameters"].startswith("a (red:1.2) hüte 日本, ((hills))")


@pytest.mark.parametrize("order", ["be", "le"])
@pytest.mark.parametrize("begin", ["日本の家", "\U0001f3e0", "\ufeffhills"])
def test_a_comment_may_begin_with_any_letter(tmp_path, order, begin):
    text = f"{begin}\nSteps: 20, Sampler: Euler a, Seed: 1"
    path = save(tmp_path / "x.jpg", text, order=order)
    assert picture_texts(path)["parameters"] == text.lstrip("\ufeff")


def parse(program, *argv):
    return options.parse(program.build_parser(), [str(word) for word in argv])


def test_flags_win_over_the_picture_also_where_they_say_the_default(tmp_path, caplog):
    caplog.set_level("INFO", "ldm")
    path = save(tmp_path / "x.png", A1111)
    args = parse(txt2img, "--from_picture", path, "--seed", 42, "--tome-window", 5)
    settings = options.settings(args)
    assert (settings.seed, settings.steps, settings.schedule) == (42, 20, "karras")
    merged = {**load_preset("tomesd"), "random": False, "ratio": 0.5, "window": 5}
    assert options.wishes(args).tome.keys == merged
    assert "From " in caplog.text
    assert "Token Merging" in caplog.text
    assert "Model hash '6ce0161689' (--ckpt)" in caplog.text
    plain_args = parse(txt2img, "--from_picture", path, "--tome-preset", "fast")
    assert options.wishes(plain_args).tome.keys == load_preset("fast")


def test_another_sampler_does_without_what_it_does_not_have(tmp_path, caplog):
    caplog.set_level("INFO", "ldm")
    path = save(tmp_path / "x.png", A1111)
    settings = options.settings(parse(txt2img, "--from_picture", path, "--sampler", "plms"))
    assert (settings.sampler, settings.schedule, settings.steps) == ("plms", "uniform", 20)
    assert "schedule 'karras' (not with this sampler)" in caplog.text
    own = parse(txt2img, "--from_picture", path, "--sampler", "euler", "--schedule", "sgm_uniform")
    assert options.settings(own).schedule == "sgm_uniform"
    with pytest.raises(InputError, match="schedule karras needs"):
        options.settings(parse(txt2img, "--from_picture", path, "--dpm", "--schedule", "karras"))


@pytest.mark.parametrize("argv", [["--interactive"], ["--from-file", "prompts.txt"]])
def test_a_picture_s_prompt_gives_way_to_others(tmp_path, caplog, argv):
    caplog.set_level("INFO", "ldm")
    path = save(tmp_path / "x.png", A1111.replace("<lora:ink:0.8>", ""))
    args = parse(txt2img, "--from_picture", path, *argv)
    assert (args.prompt, args.steps) == (None, 20)
    assert "its prompt: others are drawn" in caplog.text


def test_a_setting_of_another_program_is_named(tmp_path, caplog):
    caplog.set_level("INFO", "ldm")
    path = save(tmp_path / "x.png", A1111)
    args = parse(img2img, "--init-img", "y.png", "--from_picture", path)
    assert options.settings(args).steps == 20
    assert "Not from" in caplog.text
    assert "hires_scale" in caplog.text


def test_our_own_pictures_come_back_whole(tmp_path):
    made = {
        **dataclasses.asdict(Settings("hills", seed=7, steps=9, sampler="euler", H=64, n_iter=3)),
        "model": {"name": "demo"},
        "tome": plain(ToMeConfig.from_mapping({"ratio": 0.5})),
    }
    Picture(np.zeros((8, 8, 3), np.uint8), made).save(tmp_path / "x.png")
    args = parse(txt2img, "--from_picture", tmp_path / "x.png")
    settings = options.settings(args)
    assert (settings.prompt, settings.seed, settings.steps, settings.H) == ("hills", 7, 9, 64)
    assert (settings.sampler, settings.n_iter) == ("euler", 1)
    assert options.wishes(args).tome.keys == {"ratio": 0.5}
    grid = understood({"ldm": json.dumps({**made, "grid": 4})}, "x.png")
    assert "it is a grid; the settings are those of its first picture" in grid.left_out
    made["tome"] = plain(ToMeConfig())
    Picture(np.zeros((8, 8, 3), np.uint8), made).save(tmp_path / "x.png")
    args = parse(txt2img, "--from_picture", tmp_path / "x.png")
    assert options.wishes(args).tome == ToMeWish(is_off=True)
    args = parse(txt2img, "--from_picture", tmp_path / "x.png", "--tome-ratio", 0.25)
    assert options.wishes(args).tome.keys == {"ratio": 0.25}


@pytest.mark.parametrize(
    "hostile",
    [
        {"prompt": "x", "ckpt": "/etc/passwd", "outdir": "/"},
        {"prompt": "x", "steps": ["--help"], "sampler": "--help"},
        {"prompt": "x", "tome": {"apply_to": ["kv", "--help"]}},
        {"prompt": "x", "tome": {"preset": "/etc/passwd"}, "from_file": "/etc/passwd"},
        {"prompt": "x", "n_samples": 10**9, "H": 10**9, "seed": -5},
        {"prompt": "x", "tome": [1], "model": "x", "loras": 3, "embeddings": {"a": 1}},
    ],
)
def test_a_hostile_picture_sets_nothing_but_settings(tmp_path, hostile):
    path = tmp_path / "x.png"
    save_image(np.zeros((8, 8, 3), np.uint8), path, {"ldm": json.dumps(hostile)})
    args = parse(txt2img, "--from_picture", path)
    assert (args.ckpt, args.outdir, args.from_file) == (None, "outputs/txt2img-samples", None)
    settings = options.settings(args)
    assert (settings.prompt, settings.steps, settings.n_samples) == ("x", None, 1)


@pytest.mark.parametrize(
    ("words", "sampler", "left_out"),
    [
        ("DDIM, Schedule type: Karras", "ddim", "schedule 'karras'"),
        ("DPM++ 2M SDE, Schedule type: Karras", None, "schedule 'karras'"),
        ("Euler a, Eta: 0.67", "euler_a", "eta 0.67"),
        ("Restart, Eta: 0.67", None, "eta 0.67"),
    ],
)
def test_what_its_sampler_does_not_have_here_is_left_out(
    tmp_path, caplog, words, sampler, left_out
):
    caplog.set_level("INFO", "ldm")
    line = f"Steps: 9, Sampler: {words}, Seed: 1, Size: 64x64"
    args = parse(txt2img, "--from_picture", save(tmp_path / "x.png", f"hills\n{line}"))
    settings = options.settings(args)
    assert (settings.sampler, settings.schedule, settings.steps) == (sampler, "uniform", 9)
    assert settings.eta == 0
    assert f"{left_out} (not with this sampler)" in caplog.text
    settings.filled({"sampler": "ddim", "scale": 3.0, "H": 64, "W": 64})


def test_what_was_added_is_named_in_the_prompt_again(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name in ("lora/sub/ink.safetensors", "lora/oil.pt", "embeddings/cat.pt"):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    added = [{"name": "ink", "weight": 0.123456789}, {"name": "oil", "weight": 2}, {"name": "pen"}]
    about = {
        "prompt": "a cat<lora:oil:2>",
        "seed": 3,
        "loras": [*added, {"name": "oil", "weight": [1]}, 7],
        "embeddings": [{"name": "cat"}, {"name": "dog"}],
    }
    found = understood({"ldm": json.dumps(about)}, "x.png")
    assert found.settings["prompt"] == "a cat<lora:oil:2><lora:sub/ink:0.123456789>"
    named = [f"{name} (--lora)" for name in ("'pen'", "'oil'", "7")]
    assert found.left_out == [*named, "'dog' (--embedding)"]
    prompt = "a <lora:pen:1>house <lora:oil:0.5>"
    path = tmp_path / "x.png"
    Picture(np.zeros((8, 8, 3), np.uint8), {"prompt": prompt, "seed": 3, "W": 8, "H": 8}).save(path)
    args = options.parse(txt2img.build_parser(), ["--from_picture", str(path)])
    assert args.prompt == "a house <lora:oil:0.5>"
    options.settings(args)
    lora = ["--lora", str(tmp_path / "models/lora/oil.pt")]
    args = options.parse(txt2img.build_parser(), ["--from_picture", str(path), *lora])
    assert args.prompt == "a house "
