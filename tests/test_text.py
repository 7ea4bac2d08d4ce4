import json
import os

import pytest

from ldm import text
from ldm.errors import InputError


def written(tmp_path, data):
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    return path


def test_a_mark_at_the_beginning_is_no_part_of_the_text(tmp_path):
    assert text.read_text(written(tmp_path, "\ufeffé\n".encode())) == "é\n"
    path = written(tmp_path, b'\xef\xbb\xbf{"a": 1}')
    assert text.read_json(path) == {"a": 1}


def test_nor_is_one_that_came_there_twice_or_between_two_files(tmp_path):
    mark = b"\xef\xbb\xbf"
    read = text.read_text(written(tmp_path, mark + mark + b"a\r\n" + mark + b'{"b": 1}'))
    assert text.split_lines(read) == ["a", '{"b": 1}']


def test_nothing_but_a_newline_ends_a_line():
    lines = "a\u2028b\x0cc\x85d\x1ee\nf\r\ng\rh\n"
    assert text.split_lines(lines) == ["a\u2028b\x0cc\x85d\x1ee", "f", "g", "h"]
    assert text.split_lines("") == []
    assert text.split_lines("a\n\nb") == ["a", "", "b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("hüte".encode("utf-16"), r"t\.txt: this is UTF-16, .*save it as UTF-8"),
        ("hats".encode("utf-16-le"), r"t\.txt, line 1: not a text file in UTF-8; it has zero"),
        ("one\ntwo\nhüte".encode("latin-1"), r"t\.txt, line 3: not a text file in UTF-8 \(Latin"),
        (b"\xef\xbb\xbfa\n\xa2b", r"t\.txt, line 2: not a text file"),
        (b"x" * 101, r"t\.txt: larger than 100 bytes"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        text.read_text(written(tmp_path, data), limit=100)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "it is a pipe or a device"),
        ("/dev/zero", "it is a pipe or a device"),
        (tmp_path, "it is a folder"),
        (tmp_path / "none", "No such file"),
        ("a\0b", "null"),
    ):
        with pytest.raises(InputError, match=f"cannot be read .*{words}"):
            text.read_text(path)


def test_json_keeps_what_it_says():
    said = {"a": [1, -2.5, None, True, {"b": "日本 \u2028"}], "seed": 2**63 - 1}
    assert text.parse_json(json.dumps(said), "x") == said


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{a: 1}", "x, line 2: not a JSON object"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": %s}' % ("9" * 9999), "999.* is too large"),
        ('{"a": "\\ud800"}', "lone surrogate, U.D800"),
        ('{"\\udfff": 1}', "lone surrogate"),
        ('{"a": "\\u0000"}', "zero byte"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ("[" * 100_000, "nested deeper than 32"),
        ("[" * 40 + "]" * 40, "nested deeper than 32"),
        ('{"a": [' + "1," * 200_000 + "1]}", "more than 100000 values"),
        ('"' + "x" * 2**20 + '"', "is the limit"),
        ("[]", r"must be an object \{\.\.\.\}, not \[\]"),
        ("3", "must be an object"),
    ],
)
def test_json_that_cannot_be_used_is_one_clear_line(said, message):
    with pytest.raises(InputError, match=message) as error:
        text.parse_json(said, "x, line 2")
    assert str(error.value).startswith("x, line 2: ")
    assert len(str(error.value)) < 200


def test_kinds_are_checked():
    assert text.check_kind(3, float, "a") == 3.0
    with pytest.raises(InputError, match=r"a: the number .* is too large"):
        text.check_kind(10**400, float, "a")
    for value, kind in ((True, int), (True, float), (1, bool), (None, str), ("1", int)):
        with pytest.raises(InputError, match="a: must be"):
            text.check_kind(value, kind, "a")
    for value, kind in ((10**400, float), ([10**5000], int)):  # beyond floats, and beyond texts
        with pytest.raises(InputError):
            text.check_kind(value, kind, "a")
