import json
import logging

import numpy as np
import pytest

from ldm.errors import InputError
from ldm.evaluation.appendix_f.plan import Plan, Setting
from ldm.evaluation.appendix_f.store import Store
from ldm.modules.tome.config import ToMeConfig
from ldm.settings import Settings

UNMERGED, HALF = Setting("unmerged"), Setting("half", ToMeConfig(ratio=0.5))
PLAN = Plan({16: (UNMERGED, HALF)}, ("a", "b"), 2, Settings(n_samples=2))
FIRST, SECOND = PLAN.batches()
ABOUT = {"steps": 2, "n_seeds": 2}


def add(store, setting, batch, value=0):
    pixels = [np.full((16, 16, 3), value, np.uint8)] * 2
    about = [{"steps": 2, "prompt": prompt, "seed": seed} for prompt, seed in batch.pictures]
    store.add(setting, batch, pixels, about, [{"psnr_db": 30.0}] * 2)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    store.claim(ABOUT, PLAN.prompts)
    for batch in (FIRST, SECOND):
        add(store, HALF, batch)
    return store


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_damaged_picture_counts_as_missing(store, content):
    path = store.path(HALF, 16, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert store.rows(HALF, FIRST) is None
    assert store.rows(HALF, SECOND) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"about": 3, "prompts": []}', "\0" * 20])
def test_a_damaged_note_is_written_anew_and_pictures_tell_how_they_were_made(store, text, caplog):
    (store.folder / "about.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        store.claim(ABOUT, PLAN.prompts)
    assert "is damaged and written anew" in caplog.text
    assert json.loads((store.folder / "about.json").read_text())["about"] == ABOUT
    assert store.rows(HALF, FIRST) is not None
    (store.folder / "about.json").write_text(text)
    store.claim({**ABOUT, "steps": 3}, PLAN.prompts)
    assert store.rows(HALF, FIRST) is None  # it says of itself that it took two


def test_a_folder_of_something_else_is_refused(store):
    with pytest.raises(InputError, match=r"steps 3: the pictures in .* were made with 2"):
        Store(store.folder).claim({**ABOUT, "steps": 3}, PLAN.prompts)
    with pytest.raises(InputError, match="prompt 1 'c': the pictures in"):
        Store(store.folder).claim(ABOUT, ("a", "c"))
    Store(store.folder).claim(ABOUT, ("a", "b", "c"))


def test_what_networks_say_is_of_the_pictures_as_they_are(store):
    store.add_judged(HALF, FIRST, {"lpips-1": np.array([[1.0], [2.0]])})
    store.add_judged(HALF, FIRST, {"clip-2": np.array([[3.0], [4.0]])})
    assert sorted(store.judged(HALF, FIRST)) == ["clip-2", "lpips-1"]
    assert store.judged(HALF, SECOND) == {}
    add(store, HALF, FIRST, value=9)
    assert store.judged(HALF, FIRST) == {}
    store.add_judged(HALF, FIRST, {"lpips-1": np.array([[1.0], [2.0]])})
    (file,) = (store.folder / "judged").rglob("*.npz")
    file.write_bytes(file.read_bytes()[:30])
    assert store.judged(HALF, FIRST) == {}


def test_leftovers_of_the_dead_are_removed(store):
    left = store.path(HALF, 16, 0).with_name(".00000.png.0123abcd.part")
    left.write_bytes(b"half")
    store.remove_leftovers()
    assert not left.exists()
