import socket

import numpy as np
import pytest

from ldm.checkpoint.controlnet import UNUSED
from ldm.errors import InputError
from ldm.images import read_settings, save_image
from ldm.modules.controlnet import ControlNet
from ldm.web.address import free_port
from ldm.web.live import Live
from ldm.web.uploads import KEPT, tidy
from tests.golden_util import fill_parameters
from tests.tiny_models import write_safetensors

gr = pytest.importorskip("gradio")


@pytest.fixture
def page(desk, base, pictures, tmp_path, monkeypatch):
    from ldm.web.page import Page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    return Page(desk, base, Live(desk.queue, pictures))


@pytest.fixture
def address(page, desk, monkeypatch):
    from ldm.web.server import Server

    refuse = socket.socket.connect

    def connect(self, address):
        own = isinstance(address, tuple) and address[0] in ("127.0.0.1", "localhost")
        return (socket.socket.__mro__[1].connect if own else refuse)(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    live = Live(desk.queue, page.side.pictures)
    port = free_port("127.0.0.1", None)
    server = Server(page.blocks, live.routes(), "127.0.0.1", port)
    server.start()
    yield server.address
    desk.queue.close()
    server.close()


def test_gradios_own_client_draws_by_name(address, tmp_path):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    names = set(client.view_api(return_format="dict")["named_endpoints"])
    assert names == {"/draw", "/jobs", "/stop", "/skip", "/models", "/presets"}
    answer = client.predict("a house", {"steps": 2, "seed": 7}, {"ratio": 0.5}, api_name="/draw")
    (name,) = answer["pictures"]
    about = read_settings(tmp_path / "out" / name)
    assert (about["seed"], about["tome"]["ratio"]) == (7, 0.5)
    assert client.predict(api_name="/models") == ["tiny", "broken"]
    assert client.predict(api_name="/jobs")[0]["state"] == "done"
    with pytest.raises(AppError, match="steps 0: allowed is 1 to 1000"):
        client.predict("a house", {"steps": 0}, api_name="/draw")
    with pytest.raises(AppError, match="'ckpt' is no setting"):
        client.predict("a house", {"ckpt": "/etc/passwd"}, api_name="/draw")


def said(page, update):
    return update.get(page.side.said)


def loaded(page, **stored):
    from ldm.web.page import STORED

    names = [*STORED, *page.fields.by_name]
    first = {"model": "tiny", "mode": "txt2img", "what": "draw", "compare": False}
    values = {**first, **page.fields.first, **stored}
    return page._on_load([values[name] for name in names])


def test_what_the_browser_has_kept_fills_the_form(page):
    by_name = page.fields.by_name
    update = loaded(page, steps=9, preset="quality", ratio=0.5, what="inpaint", prompt="hills")
    assert (update[by_name["steps"]], update[by_name["prompt"]]) == (9, "hills")
    assert update[by_name["preset"]] == "quality"
    assert update[page.tabs].selected == "inpaint"


def test_what_the_browser_has_kept_is_not_believed(page):
    by_name = page.fields.by_name
    hostile = {"steps": "x", "preset": "/etc/passwd", "model": ["x"], "ratio": 7, "prompt": {}}
    update = loaded(page, **hostile)
    for name in ("steps", "preset", "prompt"):
        assert by_name[name] not in update
    assert page.fields.model not in update
    for stored in (None, {}, "x", [1, 2]):
        assert page._on_load(stored) == {page.side.said: ""}


@pytest.fixture
def controlnet(tmp_path, tiny_checkpoint, runner):
    """A ControlNet among the offered ones, and the file of a picture."""
    unet = runner.info("tiny").config["model"]["params"]["unet_config"]["params"]
    net = fill_parameters(ControlNet(**{k: v for k, v in unet.items() if k not in UNUSED}), seed=4)
    path = tmp_path / "models" / "controlnet" / "scribble.safetensors"
    path.parent.mkdir(parents=True)
    write_safetensors(path, {f"control_model.{k}": v for k, v in net.state_dict().items()})
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[4:10, 4:10] = 255
    save_image(picture, tmp_path / "control.png")
    return str(tmp_path / "control.png")


def test_a_controlnet_guides_a_job_and_not_the_next(page, desk, controlnet):
    form = {**page.fields.first, "prompt": "a house", "steps": 2, "seed": 3}
    chosen = {**form, "controlnet": "scribble", "control_strength": 1, "control_canny": True}
    for one in (form, chosen, {**form, "reuse_deep": 2}):
        page.draw_tab.draw("tiny", one, False, controlnet, "txt2img", None)
    desk.queue.wait(desk.queue.jobs()[-1], 120)
    plain, guided, reused = (job.report.infos[0] for job in desk.queue.jobs())
    assert [one["name"] for one in guided["controlnets"]] == ["scribble"]
    assert "controlnets" not in {**plain, **reused}
    assert (plain["reuse_deep"], reused["reuse_deep"]) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controlnet": "../scribble"}, "not in models/controlnet, where there are: scribble"),
        ({"controlnet": ["scribble"]}, "not in models/controlnet"),
        ({"control_strength": 3}, "control_strength 3: allowed is 0 to 2"),
        ({"control_strength": float("nan")}, "control_strength nan"),
        ({"control_strength": "1"}, "control_strength: must be a number"),
        ({"control_strength": None}, "control_strength: must be a number"),
        ({"control_canny": "yes"}, "control_canny: must be true or false"),
        ({"picture": None}, "needs a control picture"),
        ({"picture": "/etc/hostname"}, "hostname: not a picture"),
    ],
)
def test_what_a_controlnet_cannot_use_is_named(page, controlnet, changes, message):
    form = {**page.fields.first, "controlnet": "scribble", **changes}
    with pytest.raises(InputError, match=message):
        page.fields.guide(form, form.get("picture", controlnet))
    assert page.fields.guide({**form, "controlnet": ""}, None) is None


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, MemoryError, RecursionError])
def test_nothing_that_a_request_raises_ends_the_server(page, kind):
    from ldm.web.page import _safe

    def handler():
        raise kind("what happened")

    assert "error: " in said(page, _safe(handler, page.side.said)())


def test_a_dropped_picture_is_read_and_removed(page, desk, base, tmp_path):
    from ldm.images import Picture

    about = {"prompt": "hills", "seed": 3, "steps": 5, "tome": {"apply_to": ["kv", "--help"]}}
    path = tmp_path / "dropped.png"
    Picture(np.zeros((8, 8, 3), np.uint8), about | {"W": 8, "H": 8}).save(path)
    update = page.side._on_drop(str(path))
    by_name = page.fields.by_name
    assert (update[by_name["seed"]], update[by_name["prompt"]]) == (3, "hills")
    assert "These are the settings of dropped.png" in said(page, update)
    assert "Token Merging settings" in said(page, update)
    assert not path.exists()
    assert desk.queue.jobs() == []


def test_uploads_do_not_pile_up(tmp_path):
    for i in range(3 * KEPT):
        path = tmp_path / f"{i}" / "x.png"
        path.parent.mkdir()
        path.touch()
    tidy(tmp_path)
    assert len(list(tmp_path.rglob("*.png"))) == KEPT
    assert len(list(tmp_path.iterdir())) == KEPT
