"""Values of any kind in the page's fields and in the API's bodies, and dropped pictures."""

import base64
import json
from collections import Counter

import numpy as np
import pytest

from ldm.images import Gallery, save_image
from ldm.web.desk import Desk
from ldm.web.form import SETTINGS, Base, read_form
from ldm.web.live import Live
from ldm.web.pictures import Pictures
from ldm.web.program import build_parser
from ldm.web.queue import Queue
from ldm.web.runner import Runner
from tests.fuzz.fuzzing import cases, damaged, json_value, outcome, told, value

pytest.importorskip("gradio")
from ldm.web.api import Api, _png_info
from ldm.web.bodies import SAME
from ldm.web.page import STORED, Page

NAMES = ["prompt", "steps", "seed", "W", "H", "scale", "sampler", "tome", "model", "loras", "eta"]
NAMES += ["negative_prompt", "emphasis", "rng", "hires_scale", "init_img", "C", "--help", "ckpt"]
BODY = [*SAME, "sampler_name", "scheduler", "enable_hr", "hr_scale", "hr_upscaler", "eta", "tome"]
BODY += ["override_settings", "denoising_strength", "init_images", "mask", "script_name", "styles"]
OPTIONS = ["token_merging_ratio", "token_merging_ratio_hr", "tome", "sd_model_checkpoint", "x"]


@pytest.fixture
def page(tiny_checkpoint, tmp_path, monkeypatch):
    """A page whose jobs are accepted, but not drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    names = {"config": None, "device": "cpu", "dtype": "float32", "ema": False, "vae": None}
    runner = Runner(
        {"tiny": tiny_checkpoint}, {**names, "parameterization": None}, Gallery(tmp_path / "out")
    )
    queue = Queue(lambda job: None)
    live = Live(queue, Pictures(tmp_path / "out"))
    yield Page(Desk(runner, queue), Base.from_arguments(build_parser().parse_args([])), live)
    queue.close()


def anything(chance):
    """What a field might send."""
    if chance.random() < 0.1:
        return chance.choice([float("nan"), float("inf"), 10**400, "half \ud800", b"x", object()])
    return json_value(chance)


def test_fields_of_any_kind_are_a_job_or_one_line(page, tmp_path):
    counts = Counter()
    fields = page.fields
    for number, chance in cases(300):
        form = dict(fields.first)
        for _ in range(chance.randrange(3)):
            form[chance.choice([*SETTINGS, "preset", "ratio", "hires_ratio", "more"])] = anything(
                chance
            )
        axes = [anything(chance) if chance.random() < 0.3 else "Steps" for _ in range(4)]
        model = anything(chance) if chance.random() < 0.1 else "tiny"
        what = chance.choice(["draw", "inpaint", "compare", ""])
        picture = value(chance) if chance.random() < 0.3 else None
        mode = chance.choice(["txt2img", "img2img"])
        control = value(chance) if chance.random() < 0.2 else None
        values = (what, model, chance.random() < 0.2, mode, picture, picture, control, *axes)
        mask = value(chance)
        ask = lambda: page._on_draw(mask, *values, *(form[n] for n in fields.by_name))  # noqa: B023, E731
        counts[outcome(ask, (number, form, values))] += 1
        fields.tome_says(form, "tiny")
        page._on_load([anything(chance) for _ in [*STORED, *form]])
    told("forms", counts)
    assert counts["works"]
    assert counts["refused"]


def test_bodies_of_any_kind_are_a_job_or_one_line(page, tmp_path):
    api = Api(page.desk, page.fields.base, page.side.pictures)
    path = tmp_path / "x.png"
    save_image(np.zeros((8, 8, 3), np.uint8), path)
    counts = Counter()
    for number, chance in cases(300):
        body = {chance.choice(BODY): anything(chance) for _ in range(chance.randrange(4))}
        if chance.random() < 0.3:
            body["override_settings"] = {chance.choice(OPTIONS): anything(chance)}
        if chance.random() < 0.5:
            file = damaged(path.read_bytes(), chance) if chance.random() < 0.5 else b"x"
            body["init_images"] = [base64.b64encode(file).decode()]
        if chance.random() < 0.05:
            body = anything(chance)
        has_picture = chance.random() < 0.4
        counts[outcome(lambda: api._order(body, has_picture), (number, body))] += 1  # noqa: B023
        counts[outcome(lambda: api._set_options(body), (number, body))] += 1  # noqa: B023
        counts[outcome(lambda: _png_info(body), (number, body))] += 1  # noqa: B023
    told("bodies", counts)
    assert counts["works"]
    assert counts["refused"]


def about(chance):
    """Settings as a picture of ours has them, some of them others."""
    good = {"prompt": "hills", "seed": 7, "steps": 9, "tome": {"ratio": 0.5}, "sampler": "euler"}
    return {**good, **{chance.choice(NAMES): json_value(chance) for _ in range(3)}}


def parameters(chance):
    """The text of the web UIs, some of it other."""
    pairs = {"Steps": "20", "Sampler": "Euler a", "CFG scale": "7", "Seed": "1", "Size": "64x64"}
    for _ in range(3):
        pairs[chance.choice([*pairs, "Eta", "Clip skip", "Hires upscale"])] = value(chance)
    line = ", ".join(f"{name}: {text}" for name, text in pairs.items())
    return f"a house\nNegative prompt: {value(chance)}\n{line}".encode("utf-8", "ignore").decode()


def test_dropped_pictures_fill_the_form_or_are_named(page, tmp_path):
    counts = Counter()
    before = sorted(tmp_path.rglob("*"))
    for number, chance in cases(150):
        texts = {}
        if chance.random() < 0.7:
            texts["ldm"] = json.dumps(about(chance))
            if chance.random() < 0.2:
                texts["ldm"] = texts["ldm"].replace(*chance.choice([("}", ""), ("7", "[" * 99)]))
        if chance.random() < 0.5:
            texts["parameters"] = parameters(chance)
        path = tmp_path / "dropped.png"
        save_image(np.zeros((8, 8, 3), np.uint8), path, texts)
        if chance.random() < 0.3:
            path.write_bytes(damaged(path.read_bytes(), chance))
        update = page.side._on_drop(str(path))
        said = update[page.side.said]
        assert "error: " in said or "These are the settings of dropped.png" in said, (number, texts)
        assert said.count("<script") == 0
        counts["refused" if "error: " in said else "works"] += 1
        values = {name: update.get(field) for name, field in page.fields.by_name.items()}
        if "error: " not in said:
            form = {**page.fields.first, **{k: v for k, v in values.items() if k in SETTINGS}}
            outcome(lambda: read_form(page.fields.base, form), number)  # noqa: B023
    told("dropped pictures", counts)
    assert counts["works"]
    assert counts["refused"]
    assert page.desk.queue.jobs() == []
    assert sorted(tmp_path.rglob("*")) == before
