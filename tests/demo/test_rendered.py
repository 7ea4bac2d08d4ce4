"""Rendered scenes as a data set: items, the cache file, and what is drawn at random."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import ldm.data.growing as growing
import ldm.demo.rendered as rendered
from ldm.demo.rendered import RenderedScenes, SceneCaptions, picture_of, scene_of
from ldm.demo.scenes import Scene, attributes, is_held_out, mirror
from ldm.errors import InputError


@pytest.fixture
def draw_in_this_process(monkeypatch):
    """Replace the pool: starting processes takes seconds each."""

    class Pool:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return False

        def imap(self, function, items, chunksize):
            return map(function, items)

    monkeypatch.setattr(rendered, "_worker_pool", lambda n_workers: Pool())


def test_an_item_is_a_picture_with_its_caption_and_scene():
    item = RenderedScenes(3, size=32, flip=False, first_stage_key="picture")[2]
    assert set(item) == {"picture", "caption", "scene"}
    assert item["picture"].shape == (32, 32, 3)
    assert item["picture"].dtype == np.float32
    expected = picture_of(2, 0, "train", 32).astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(item["picture"], expected)
    assert item["scene"] == attributes(scene_of(2, 0, "train"))


def test_pictures_depend_on_seed_and_index():
    data = RenderedScenes(2, size=32, flip=False)
    np.testing.assert_array_equal(data[0]["image"], data[0]["image"])
    assert (data[0]["image"] != data[1]["image"]).any()
    assert (data[0]["image"] != RenderedScenes(2, size=32, seed=1, flip=False)[0]["image"]).any()


def test_a_flip_mirrors_picture_and_scene_alike():
    plain = RenderedScenes(6, size=32, flip=False)
    flipped = RenderedScenes(6, size=32)
    torch.manual_seed(0)
    seen = set()
    for index in range(6):
        for _ in range(6):
            item, original = flipped[index], plain[index]
            is_flipped = (item["image"] != original["image"]).any()
            scene = Scene(**original["scene"])
            assert Scene(**item["scene"]) == (mirror(scene) if is_flipped else scene)
            if is_flipped:
                np.testing.assert_array_equal(item["image"], original["image"][:, ::-1])
            seen.add(bool(is_flipped))
    assert seen == {True, False}


def test_randomness_comes_from_torch():
    data = RenderedScenes(1, size=32, crop=16)
    torch.manual_seed(5)
    first = [data[0] for _ in range(3)]
    torch.manual_seed(5)
    for expected in first:
        item = data[0]
        np.testing.assert_array_equal(item["image"], expected["image"])
        assert item["caption"] == expected["caption"]
    assert len({data[0]["caption"] for _ in range(10)}) > 1


def test_crops_are_parts_of_the_picture():
    whole = RenderedScenes(1, size=32, flip=False)[0]["image"]
    windows = np.lib.stride_tricks.sliding_window_view(whole, (24, 24), axis=(0, 1))
    crop = RenderedScenes(1, size=32, crop=24, flip=False)[0]["image"]
    assert crop.shape == (24, 24, 3)
    assert (windows == crop.transpose(2, 0, 1)).all(axis=(2, 3, 4)).any()
    with pytest.raises(InputError, match="crop 33"):
        RenderedScenes(1, size=32, crop=33)


def test_splits_reach_the_items():
    for split, expected in (("train", False), ("held_out", True)):
        data = RenderedScenes(8, size=16, split=split)
        assert {is_held_out(Scene(**data[i]["scene"])) for i in range(8)} == {expected}


def test_items_batch_as_upstream_expects():
    batch = next(iter(DataLoader(RenderedScenes(4, size=16), batch_size=4)))
    assert batch["image"].shape == (4, 16, 16, 3)
    assert len(batch["caption"]) == len(batch["scene"]["place"]) == 4


def test_the_cache_holds_the_same_pictures_and_is_reused(tmp_path):
    settings = {"size": 16, "flip": False, "cache_dir": str(tmp_path / "cache")}
    data = RenderedScenes(5, **settings, n_workers=1)
    for index in range(5):
        drawn = RenderedScenes(5, size=16, flip=False)[index]["image"]
        np.testing.assert_array_equal(data[index]["image"], drawn)
    (file,) = (tmp_path / "cache").glob("*.npy")
    stamp = file.stat().st_mtime_ns
    RenderedScenes(5, **settings)
    assert file.stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("draw_in_this_process")
@pytest.mark.parametrize("suffix", ["json", "npy"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\x93NUMPY\x01\x00v\x00{'descr"])
def test_a_damaged_cache_is_made_anew(tmp_path, suffix, content):
    RenderedScenes(3, size=16, flip=False, cache_dir=str(tmp_path))
    (file,) = tmp_path.glob(f"*.{suffix}")
    file.write_bytes(content)
    again = RenderedScenes(3, size=16, flip=False, cache_dir=str(tmp_path))
    drawn = RenderedScenes(3, size=16, flip=False)
    np.testing.assert_array_equal(again[1]["image"], drawn[1]["image"])


def test_a_longer_set_holds_a_shorter_one(tmp_path):
    longer = RenderedScenes(4, size=16, flip=False, cache_dir=str(tmp_path))
    shorter = RenderedScenes(3, size=16, flip=False, cache_dir=str(tmp_path))
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert len(shorter) == 3
    np.testing.assert_array_equal(shorter[2]["image"], longer[2]["image"])
    with pytest.raises(IndexError):
        shorter[3]
    RenderedScenes(5, size=16, cache_dir=str(tmp_path))
    assert len(list(tmp_path.glob("*.npy"))) == 2


@pytest.mark.usefixtures("draw_in_this_process")
def test_a_cache_of_other_settings_is_made_anew(tmp_path):
    RenderedScenes(2, size=16, cache_dir=str(tmp_path))
    (file,) = tmp_path.glob("*.npy")
    (label,) = tmp_path.glob("*.json")
    label.write_text(json.dumps(json.loads(label.read_text()) | {"style": 0}))
    np.save(file, np.zeros_like(np.load(file)))
    data = RenderedScenes(2, size=16, flip=False, cache_dir=str(tmp_path))
    assert data[0]["image"].max() > -1


def test_a_cache_is_whole_or_gone_on_with(tmp_path, monkeypatch, draw_in_this_process):
    drawn, stops = [], [3]

    def fail(index, **settings):
        if index in stops:
            stops.clear()
            raise RuntimeError("the machine stops")
        drawn.append(index)
        return picture_of(index, **settings)

    monkeypatch.setattr(rendered, "picture_of", fail)
    monkeypatch.setattr(growing, "KEPT_EVERY", 0)
    with pytest.raises(RuntimeError, match="machine stops"):
        RenderedScenes(4, size=16, cache_dir=str(tmp_path))
    assert list(tmp_path.glob("*.npy")) == []
    data = RenderedScenes(4, size=16, flip=False, cache_dir=str(tmp_path))
    assert drawn == [0, 1, 2, 3]
    for index in range(4):
        plain = picture_of(index, 0, "train", 16).astype(np.float32) / 127.5 - 1
        np.testing.assert_array_equal(data[index]["image"], plain)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]
    # what is left of other settings is not gone on with
    drawn.clear()
    stops.append(3)
    with pytest.raises(RuntimeError, match="machine stops"):
        RenderedScenes(4, size=16, seed=1, cache_dir=str(tmp_path))
    monkeypatch.setattr(rendered, "STYLE", 0)
    drawn.clear()
    stops.append(3)
    with pytest.raises(RuntimeError, match="machine stops"):
        RenderedScenes(4, size=16, seed=1, cache_dir=str(tmp_path))
    assert drawn == [0, 1, 2]


def test_captions_without_pictures():
    data = SceneCaptions(40, seed=2)
    assert len(data) == 40
    item = data[3]
    assert set(item) == {"caption", "scene"}
    assert item["scene"] == attributes(scene_of(3, 2, "train"))
    assert len({data[3]["caption"] for _ in range(20)}) > 3  # the phrasing varies
    with pytest.raises(IndexError):
        data[40]
