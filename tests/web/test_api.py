import base64
import json
import threading

import numpy as np
import pytest
from PIL import Image

from ldm.cli.values import Wishes
from ldm.errors import InputError
from ldm.web.address import free_port
from ldm.web.api import Api
from ldm.web.bodies import Options, read_body
from ldm.web.server import Server
from ldm.web.uploads import file_of

webuiapi = pytest.importorskip("webuiapi")
gr = pytest.importorskip("gradio")
DRAW = {"steps": 2, "width": 16, "height": 16, "cfg_scale": 3, "eta": 0}


@pytest.fixture
def port(desk, base, pictures):
    """A server with the API alone."""
    port = free_port("127.0.0.1", None)
    with gr.Blocks() as blocks:
        gr.Markdown("nothing")
    routes = Api(desk, base, pictures).routes()
    server = Server(blocks, routes, "127.0.0.1", port, auth="me:secret")
    server.start()
    yield port
    desk.queue.close()
    server.close()


@pytest.fixture
def loopback(monkeypatch):
    """Connections to this machine are allowed; see tests/conftest.py."""
    import socket

    refuse = socket.socket.connect
    real = socket.socket.__mro__[1].connect

    def connect(self, address):
        own = isinstance(address, tuple) and address[0] in ("127.0.0.1", "localhost")
        return (real if own else refuse)(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def client(port, loopback):
    made = webuiapi.WebUIApi("127.0.0.1", port, username="me", password="secret")
    yield made
    made.session.close()


def settings_of(image):
    return json.loads(image.info["ldm"])


def test_a_client_draws(client):
    result = client.txt2img(prompt="a (red:1.2) house", seed=5, n_iter=2, **DRAW)
    assert [image.size for image in result.images] == [(16, 16)] * 2
    about = settings_of(result.image)
    assert (about["prompt"], about["seed"]) == ("a (red:1.2) house", 5)
    assert (about["sampler"], about["steps"], about["scale"]) == ("euler_a", 2, 3.0)
    assert about["emphasis"]
    assert settings_of(client.txt2img(prompt="", **DRAW).image)["prompt"] == ""
    assert result.info["all_seeds"] == [5, 6]
    assert result.info["infotexts"][0] == result.image.info["parameters"]


def test_samplers_go_by_the_names_that_clients_know():
    def read(**body):
        return read_body(
            body, Wishes(frozenset(("sampler", "schedule", "eta", "seed"))), Options(), {}
        )

    for name, sampler, schedule in (
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ SDE SGM Uniform", "dpmpp_sde", "sgm_uniform"),
        ("Euler a", "euler_a", None),
        ("heun", "heun", None),
    ):
        for said in ("automatic", schedule or ""):  # a name may end with what is said beside it
            given = read(sampler_name=name, scheduler=said, eta=1.0).wishes.given
            assert (given["sampler"], given.get("schedule")) == (sampler, schedule)
            assert "eta" not in given
    assert read(sampler_name="DDIM", eta=0.5).wishes.given["eta"] == 0.5
    assert read(sampler_name="Euler a", eta=0.5).not_used == ("eta",)


def test_what_a1111_has_by_default_asks_for_nothing(base):
    body = {
        **{"styles": [], "subseed": -1, "s_tmax": 0, "s_noise": 1, "refiner_switch_at": None},
        **{"script_args": [], "alwayson_scripts": {}, "resize_mode": 0, "image_cfg_scale": 1.5},
        **{"mask": None, "mask_blur_x": 4, "mask_blur_y": 4, "mask_round": True, "hr_upscaler": ""},
        **{"hr_sampler_name": "Use same sampler", "hr_scheduler": "Use same scheduler"},
        **{"hr_checkpoint_name": "Use same checkpoint", "hr_resize_x": 0, "hr_prompt": ""},
    }
    for is_on in (False, True, 0, 1, None):
        order = read_body({**body, "enable_hr": is_on}, base.wishes, Options(), {})
        given = {"seed": -1, **({"hires_scale": 2.0, "hires_upscaler": "latent"} if is_on else {})}
        assert (order.wishes, order.not_used) == (base.wishes.changed(given), ())
    body |= {"mask": "x", "resize_mode": 2, "denoising_strength": 0.4}
    painted = read_body(body, base.wishes, Options(), {})
    unused = ("resize_mode", "mask_blur_x", "mask_blur_y", "mask_round")
    assert painted.not_used == ("denoising_strength", *unused)


def test_what_other_clients_say_beside_it_asks_for_nothing(base):
    """SillyTavern's body, a Discord bot's, and Forge's names for what is as in the first pass."""
    body = {
        **{"prompt": "hills", "cfg_scale": 7, "url": "http://127.0.0.1:7860", "auth": "me:secret"},
        **{"clip_skip": 2, "subseed": 7, "subseed_strength": 0, "seed_enable_extras": True},
        **{"styles": ["None"], "distilled_cfg_scale": 3.5, "restore_faces": False},
        **{"enable_hr": True, "hr_additional_modules": ["Use same choices"], "hr_cfg": 7},
        **{"hr_prompt": "hills", "override_settings": {"CLIP_stop_at_last_layers": 2}},
    }
    order = read_body(body, base.wishes, Options(), {})
    given = {"prompt": "hills", "scale": 7, "seed": -1, "clip_skip": 2, "hires_scale": 2.0}
    assert (order.wishes, order.not_used) == (
        base.wishes.changed({**given, "hires_upscaler": "latent"}),
        (),
    )
    alone = read_body({"clip_skip": 2.0}, base.wishes, Options(clip_skip=1), {})
    assert alone.wishes.given["clip_skip"] == 2


def test_an_override_that_shall_outlive_its_request_does_not_and_that_is_said(base):
    body = {"override_settings": {"token_merging_ratio": 0.5}}
    for restores, not_used in (
        (False, ("override_settings_restore_afterwards",)),
        (True, ()),
        (None, ()),
    ):
        said = {**body, "override_settings_restore_afterwards": restores}
        assert read_body(said, base.wishes, Options(), {}).not_used == not_used


def test_a_name_of_two_files_stands_for_the_one_that_it_names_whole(base, tmp_path, monkeypatch):
    models = {"old/v1.safetensors": tmp_path / "old/v1.safetensors"}
    models |= {"v1.safetensors": tmp_path / "v1.safetensors", "v2": tmp_path / "v2.ckpt"}
    files = [tmp_path / "models" / "vae" / name for name in ("mine.pt", "old/mine.pt", "b/x.pt")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.chdir(tmp_path)

    def options(**said):
        order = read_body({"override_settings": said}, base.wishes, Options(), models)
        return order.options.model, order.options.vae

    for name in models:
        assert options(sd_model_checkpoint=f"{name} [0123456789]")[0] == name
    assert options(sd_model_checkpoint="v2.ckpt")[0] == "v2"
    with pytest.raises(InputError, match=r"'v1': choose one of old/v1.safetensors, v1.safetensors"):
        options(sd_model_checkpoint="v1")
    for name, said in (("mine", "mine"), ("old/mine", "old/mine"), ("b/x", "x.pt")):
        assert options(sd_vae=said)[1] == name
    with pytest.raises(InputError, match=r"sd_vae 'mine.pt': choose one of mine, old/mine"):
        options(sd_vae="mine.pt")


@pytest.mark.parametrize(
    ("stored", "override", "of_text", "of_picture"),
    [
        ({"token_merging_ratio_img2img": 0.5}, {}, None, 0.5),
        ({"token_merging_ratio": 0.25, "token_merging_ratio_img2img": 0.5}, {}, 0.25, 0.5),
        ({"token_merging_ratio_img2img": 0.5}, {"token_merging_ratio": 0.25}, 0.25, 0.25),
        ({}, {"token_merging_ratio": 0.25, "token_merging_ratio_img2img": 0}, 0.25, 0.25),
        ({}, {"token_merging_ratio": 0.25, "token_merging_ratio_hr": 0}, 0.25, 0.25),
    ],
)
def test_img2img_has_a_ratio_of_its_own(base, stored, override, of_text, of_picture):
    options = Options().changed(stored, {})
    body = {"override_settings": override}
    for has_picture, ratio in ((False, of_text), (True, of_picture)):
        wishes = read_body(body, base.wishes, options, {}, has_picture).wishes
        assert dict(wishes.tome.keys) == ({} if ratio is None else {"ratio": ratio})


def test_the_last_layer_can_be_asked_for_where_the_program_has_another():
    base = Wishes(frozenset(("clip_skip", "seed")), {"clip_skip": 2})
    for asked, layer in ((1, 1), (3.0, 3), (None, 2)):
        body = {"override_settings": {"CLIP_stop_at_last_layers": asked}}
        assert read_body(body, base, Options(), {}).wishes.given["clip_skip"] == layer


def test_merging_is_an_override_or_an_object_of_its_own(client):
    override = {"token_merging_ratio": 0.5, "token_merging_ratio_hr": 0.25}
    result = client.txt2img(enable_hr=True, hr_scale=2, override_settings=override, **DRAW)
    tome = settings_of(result.image)["tome"]
    assert (tome["ratio"], tome["hires"]["ratio"]) == (0.5, 0.25)
    assert result.image.size == (32, 32)
    own = {"tome": {"preset": "tomesd", "ratio": 0.25, "max_downsample": 2}}
    tome = settings_of(client.txt2img(override_settings=own, **DRAW).image)["tome"]
    assert (tome["ratio"], tome["max_downsample"], tome["random"]) == (0.25, 2, True)
    beside = client.custom_post("txt2img", {**DRAW, "tome": {"ratio": 0.5}}, baseurl=True)
    assert settings_of(beside.image)["tome"]["ratio"] == 0.5
    assert settings_of(client.txt2img(**DRAW).image)["tome"]["ratio"] is None


def test_options_hold_until_they_are_changed(client):
    client.set_options({"token_merging_ratio": 0.5, "sd_model_checkpoint": "tiny"})
    assert client.get_options()["token_merging_ratio"] == 0.5
    assert settings_of(client.txt2img(**DRAW).image)["tome"]["ratio"] == 0.5
    client.set_options({"token_merging_ratio": 0})
    assert settings_of(client.txt2img(**DRAW).image)["tome"]["ratio"] == 0
    answer = client.session.post(f"{client.baseurl}/options", json={"sd_model_checkpoint": "x"})
    assert answer.status_code == 422
    assert "choose one of tiny, broken" in answer.json()["detail"]


def test_what_others_draw_with_changes_no_choice_of_a_model(client, desk):
    desk.runner.models = {**desk.runner.models, "other": desk.runner.models["tiny"]}
    other = {"override_settings": {"sd_model_checkpoint": "other"}, **DRAW}

    def last():
        return desk.queue.jobs()[-1].task.model

    client.txt2img(**other)
    assert (last(), client.util_get_current_model()) == ("other", "tiny")
    client.txt2img(**DRAW)
    assert last() == "tiny"
    client.txt2img(**other)
    client.set_options({"sd_model_checkpoint": "other"})
    client.txt2img(override_settings={"sd_model_checkpoint": "tiny"}, **DRAW)
    client.txt2img(**DRAW)
    assert (last(), client.util_get_current_model()) == ("other", "other")


def test_options_that_are_read_and_sent_back_change_nothing(client):
    client.set_options({"tome": {"ratio": 0.5}})
    said = client.get_options()
    assert said["token_merging_ratio"] == 0.5
    client.set_options({**said, "sd_vae": "Automatic"})
    tome = settings_of(client.txt2img(**DRAW).image)["tome"]
    assert (tome["ratio"], tome["hires"]) == (0.5, None)
    client.set_options({**said, "tome": {}})
    assert settings_of(client.txt2img(**DRAW).image)["tome"]["ratio"] is None


def test_a_client_redraws_and_paints(client, tmp_path):
    start = Image.fromarray(np.full((16, 16, 3), 200, np.uint8))
    about = settings_of(client.img2img(images=[start], denoising_strength=0.5, **DRAW).image)
    assert (about["strength"], about["init_img"]) == (0.5, "init_images")
    wide = client.img2img(images=[start.resize((32, 16))], **DRAW)
    assert (wide.image.size, wide.info["not_used"]) == ((16, 16), ["resize_mode"])
    cropped = client.img2img(images=[start.resize((32, 16))], resize_mode=1, **DRAW)
    assert cropped.info["not_used"] == []
    mask = Image.fromarray(np.repeat([[0] * 8 + [255] * 8], 16, axis=0).astype(np.uint8))
    result = client.img2img(images=[start], mask_image=mask, **DRAW)
    pixels = np.asarray(result.image)
    assert (pixels[:, :8] == 200).all()
    assert (pixels[:, 8:] != 200).any()
    assert {"mask_blur", "denoising_strength"} <= set(result.info["not_used"])


def test_what_there_is(client):
    assert [one["title"] for one in client.get_sd_models()] == ["tiny", "broken"]
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= {one["name"] for one in client.get_samplers()}
    assert {"karras", "automatic"} <= {one["name"] for one in client.get_schedulers()}
    assert client.util_get_current_model() == "tiny"
    progress = client.get_progress()
    assert (progress["progress"], progress["state"]["job_count"]) == (0.0, 0)


def test_a_picture_says_how_it_was_made(client):
    image = client.txt2img(prompt="a house", seed=5, **DRAW).image
    result = client.png_info(image)
    assert result.info.startswith("a house\nSteps: 2, Sampler: Euler a")
    assert result.parameters["seed"] == 5
    image.info = {"parameters": "hills\nSteps: 2, Sampler: Euler, CFG scale: nan, Seed: 1"}
    odd = client.png_info(image)
    assert (odd.parameters["seed"], "scale" in odd.parameters) == (1, False)
    plain = client.png_info(Image.new("RGB", (4, 4)))
    assert (plain.info, plain.parameters) == ("", {})


def test_jobs_are_seen_and_stopped_from_elsewhere(client, desk):
    results = []
    ask = threading.Thread(target=lambda: results.append(client.txt2img(**{**DRAW, "steps": 999})))
    ask.start()
    while client.get_progress()["progress"] == 0:
        pass
    state = client.get_progress()["state"]
    assert (state["job_count"], state["sampling_steps"]) == (1, 999)
    client.interrupt()
    ask.join(60)
    assert results[0].images == []


def test_requests_are_drawn_in_the_order_in_which_they_came(client, desk):
    blocker = threading.Thread(target=lambda: client.txt2img(**{**DRAW, "steps": 900}))
    blocker.start()
    while desk.queue.running is None:
        pass
    threads = []
    for seed in range(10):
        threads.append(threading.Thread(target=lambda s=seed: client.txt2img(seed=s, **DRAW)))
        threads[-1].start()
        while len(desk.queue.jobs()) < seed + 2:
            pass
    desk.queue.stop()
    for thread in [blocker, *threads]:
        thread.join(120)
    drawn = [job.report.infos[0]["seed"] for job in desk.queue.jobs() if job.report.infos]
    assert drawn == list(range(10))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"steps": 0}, "steps 0: allowed is 1 to 1000"),
        ({"width": 0}, "width 0: allowed is 1 to "),
        ({"cfg_scale": "x"}, "cfg_scale: must be a number"),
        ({"steps": "--help"}, "must be a whole number"),
        ({"steps": 10**400}, "1000"),
        ({"width": 1e300}, "whole number"),
        ({"prompt": ["x"]}, "must be a text"),
        ({"prompt": "half \ud800"}, "surrogate"),
        ({"n_iter": 10**6}, "Pictures"),
        ({"comments": {"x": "half \ud800"}}, "surrogate"),
        ({"override_settings": {"\ud800": 1}}, "surrogate"),
        ({"enable_hr": "false"}, "enable_hr: must be true or false, not 'false'"),
        ({"denoising_strength": 2}, "denoising_strength 2.0: allowed is 0 to 1"),
        ({"enable_hr": True, "denoising_strength": 2}, "denoising_strength 2.0: allowed is 0 to 1"),
        ({"enable_hr": True, "hr_scale": 99}, "hr_scale 99.0: allowed is 1"),
        ({"enable_hr": True, "hr_second_pass_steps": -1}, "hr_second_pass_steps -1: allowed is 1"),
        ({"sampler_name": "DDIM", "scheduler": "Karras"}, "scheduler karras needs one of"),
        ({"sampler_name": {}}, "sampler_name: must be a text, not {}"),
        ({"scheduler": False}, "scheduler: must be a text, not False"),
        ({"override_settings": []}, "override_settings: must be an object"),
        ({"prompt": "<lora:x/../y:1>"}, "not in models/lora"),
        ({"sampler_name": "Euler z"}, "sampler_name 'Euler z': allowed is DDIM"),
        ({"scheduler": "x"}, "scheduler 'x'"),
        ({"script_name": "x/y"}, "'script_name' 'x/y': this cannot be done here"),
        ({"token_merging_ratio": 0.5}, "'token_merging_ratio' 0.5: put it into override_settings"),
        ({"alwayson_scripts": {"controlnet": {}}}, "'alwayson_scripts'"),
        ({"restore_faces": True}, "'restore_faces' True"),
        ({"subseed": 7, "subseed_strength": 0.5}, "'subseed' 7"),
        ({"enable_hr": True, "hr_cfg": 1, "cfg_scale": 7}, "'hr_cfg' 1"),
        ({"clip_skip": 2, "override_settings": {"CLIP_stop_at_last_layers": 1}}, "has another"),
        ({"clip_skip": "x"}, "must be a whole number, not 'x'"),
        ({"infotext": "hills\nSteps: 9"}, "'infotext' 'hills"),
        ({"enable_hr": True, "firstphase_width": 256}, "'firstphase_width' 256"),
        ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler"),
        ({"tome": {"preset": "/etc/passwd"}}, "there is no ToMe preset"),
        ({"tome": {"apply_to": ["kv", "--help"]}}, "must be one or more of"),
        ({"tome": []}, "tome"),
        ({"override_settings": "x"}, "override_settings"),
        ({"override_settings": {"token_merging_ratio": 0.9}}, "can remove at most"),
        ({"override_settings": {"sd_model_checkpoint": "/etc/passwd"}}, "choose one of"),
        ([], "the request"),
    ],
)
def test_what_cannot_be_used_is_named(client, body, words):
    answer = client.session.post(f"{client.baseurl}/txt2img", data=json.dumps(body))
    assert answer.status_code == 422
    assert words in answer.json()["detail"]
    assert "\n" not in answer.json()["detail"]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("tiny: cut short"), 422, "tiny: cut short"),
        (MemoryError(), 500, "not enough memory"),
        (RuntimeError("a fault"), 500, "RuntimeError: a fault (the terminal has more)"),
    ],
)
def test_a_job_that_fails_says_whose_fault_it_is(client, desk, monkeypatch, error, status, words):
    def load(*_):
        raise error

    monkeypatch.setattr(desk.runner, "load", load)
    answer = client.session.post(f"{client.baseurl}/txt2img", json={})
    assert answer.status_code == status
    assert words in answer.json()["detail"]


def test_bad_pictures_and_bad_requests_are_named(client):
    text = base64.b64encode(b"no picture").decode()
    for images in ([], [text], ["!"], [5], ["x", "y"], "x"):
        answer = client.session.post(f"{client.baseurl}/img2img", json={"init_images": images})
        assert answer.status_code == 422, images
        assert "init_images" in answer.json()["detail"]
    for data in (b"{", b"[" * 100_000, b'{"steps": NaN}', b'{"comments": 1e400}', b"\xff"):
        answer = client.session.post(f"{client.baseurl}/txt2img", data=data)
        assert answer.status_code == 422
        assert "the request" in answer.json()["detail"]


@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_base64_may_have_lines(encode):
    data = bytes(range(256))
    with file_of("data:image/png;base64," + encode(data).decode(), "mask") as path:
        assert path.read_bytes() == data


def test_nobody_without_the_password_draws(client, desk):
    client.session.auth = None
    assert client.session.post(f"{client.baseurl}/txt2img", json={}).status_code == 401
    client.session.auth = ("me", "wrong")
    assert client.session.get(f"{client.baseurl}/options").status_code == 401
    assert desk.queue.jobs() == []


def test_pages_elsewhere_cannot_ask(client, desk):
    elsewhere = {"origin": "http://elsewhere.example"}
    answer = client.session.post(f"{client.baseurl}/txt2img", json={}, headers=elsewhere)
    assert answer.status_code == 403
    assert desk.queue.jobs() == []
