"""Pictures of a folder: both ways to give captions, and what is said when one is missing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.folder import FolderPictures
from ldm.errors import InputError


def write_picture(path, width=40, height=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255  # red on the left
    Image.fromarray(pixels).save(path)


def test_captions_beside_the_pictures(tmp_path):
    for name in ("b.png", "a.PNG", "more/c.png"):
        write_picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f" picture {name}\n", encoding="utf-8")
    data = FolderPictures(str(tmp_path), size=16, first_stage_key="jpg")
    assert [data[i]["caption"] for i in range(len(data))] == [
        "picture a.PNG",
        "picture b.png",
        "picture more/c.png",
    ]
    picture = data[0]["jpg"]
    assert picture.shape == (16, 16, 3)
    assert picture.dtype == np.float32
    # the middle square of the picture: red to its own middle, black after
    np.testing.assert_allclose(picture[8, 1], [1, -1, -1], atol=0.02)
    np.testing.assert_allclose(picture[8, 14], [-1, -1, -1], atol=0.02)


def test_pictures_that_are_not_read_are_told_and_hidden_files_are_none(tmp_path, caplog):
    for name in ("a.png", "._a.png", ".thumbnails/a.png"):
        write_picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("a house")
    assert len(FolderPictures(str(tmp_path), size=8)) == 1
    assert not caplog.messages
    for name in ("b.TIFF", "c.gif"):
        write_picture(tmp_path / name)
    assert len(FolderPictures(str(tmp_path), size=8)) == 1
    (said,) = caplog.messages
    assert "2 pictures are left out, such as b.TIFF; read are .bmp, .jpeg" in said


def test_captions_in_a_list(tmp_path):
    write_picture(tmp_path / "one.png")
    write_picture(tmp_path / "unlisted.png")
    line = json.dumps({"file_name": "one.png", "text": "ein Bild für uns"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(line + "\n\n", encoding="utf-8")
    data = FolderPictures(str(tmp_path), size=8)
    assert len(data) == 1
    assert data[0]["caption"] == "ein Bild für uns"


def test_a_mark_at_the_beginning_is_no_caption_and_only_newlines_end_a_line(tmp_path):
    write_picture(tmp_path / "one.png")
    caption = "one\u2028two\x0cthree"
    line = json.dumps({"file_name": "one.png", "text": caption}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8-sig")
    assert FolderPictures(str(tmp_path), size=8)[0]["caption"] == caption
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "one.txt").write_text("a house", encoding="utf-8-sig")
    assert FolderPictures(str(tmp_path), size=8)[0]["caption"] == "a house"


def test_other_pictures_have_another_version(tmp_path):
    """So that latents of those before are not taken for theirs, also where there are as many."""
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a house")
    before = FolderPictures(str(tmp_path)).version
    assert FolderPictures(str(tmp_path)).version == before
    write_picture(tmp_path / "b.png", width=60)
    assert FolderPictures(str(tmp_path)).version != before
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to("none.png")
    with pytest.raises(InputError, match=r"b\.png: cannot be read"):
        FolderPictures(str(tmp_path))


def test_a_flip_mirrors_half_of_the_items(tmp_path):
    write_picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    data = FolderPictures(str(tmp_path), size=16, flip=True)
    torch.manual_seed(0)
    left = [data[0]["image"][8, 1, 0] > 0 for _ in range(40)]
    assert 8 < sum(left) < 32


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no pictures"),
        ({"notes.txt": "a"}, "no pictures"),
        ({"a.png": None}, "no caption"),
        ({"metadata.jsonl": "{"}, "line 1: not a JSON object"),
        ({"metadata.jsonl": "[1]"}, "line 1: must be an object"),
        (
            {"metadata.jsonl": '\n{"file_name": 7, "text": "a"}'},
            "line 2: file_name: must be a text",
        ),
        ({"metadata.jsonl": '{"file_name": "a", "text": ["b"]}'}, "line 1: text: must be a text"),
        ({"metadata.jsonl": '{"file_name": "../a", "text": "b"}'}, "leads out of the folder"),
        ({"metadata.jsonl": '{"file_name": "/a", "text": "b"}'}, "leads out of the folder"),
        ({"metadata.jsonl": "sch\u00f6n".encode("latin-1")}, "line 1: not a text file in UTF-8"),
        ({"metadata.jsonl": "a".encode("utf-16")}, "UTF-16"),
        ({"a.png": None, "a.txt": "a".encode("utf-16")}, "a.txt: this is UTF-16"),
        ({"a.png": None, "a.txt": "a\nsch\u00f6n".encode("latin-1")}, "a.txt, line 2: not a text"),
        ({"metadata.jsonl": '{"file_name": "a.png"}'}, "line 1: not of the form"),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "a"}'}, "line 1: there is no"),
        ({"metadata.jsonl": ""}, "no pictures"),
    ],
)
def test_what_is_missing_is_named(tmp_path, files, message):
    for name, content in files.items():
        if content is None:
            write_picture(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
    with pytest.raises(InputError, match=message):
        FolderPictures(str(tmp_path))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        FolderPictures(str(tmp_path / "nowhere"))


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"a\.png"):
        FolderPictures(str(tmp_path))[0]
