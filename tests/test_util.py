import errno
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from omegaconf import OmegaConf

from ldm.errors import InputError
from ldm.util import (
    get_obj_from_str,
    instantiate_from_config,
    remove_leftovers,
    whole_folder,
    written_whole,
)


def test_builds_with_plain_values():
    config = OmegaConf.create({"target": "builtins.dict", "params": {"a": [1, 2], "b": {"c": 3}}})
    built = instantiate_from_config(config, d=4)
    assert built == {"a": [1, 2], "b": {"c": 3}, "d": 4}
    assert type(built["a"]) is list
    assert type(built["b"]) is dict


def test_placeholders_and_missing_target():
    assert instantiate_from_config("__is_first_stage__") is None
    assert instantiate_from_config("__is_unconditional__") is None
    with pytest.raises(KeyError, match="target"):
        instantiate_from_config({"params": {}})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("plain", "not a dotted path"),
        ("ldm.models.nothing.X", r"no module 'ldm\.models\.nothing'"),
        ("nowhere.X", "no module 'nowhere'"),
        ("ldm.util.X", "has no 'X'"),
    ],
)
def test_bad_targets(path, message):
    with pytest.raises(InputError, match=message):
        get_obj_from_str(path)


def test_upstreams_names_resolve():
    assert get_obj_from_str("main.DataModuleFromConfig").__module__ == "ldm.training.data"
    inpainting = get_obj_from_str("ldm.models.diffusion.ddpm.LatentInpaintDiffusion")
    assert inpainting.__name__ == "LatentDiffusion"


# --- files that appear whole --------------------------------------------------------------------

HOLD = """
import sys
from ldm.util import written_whole
with written_whole(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("open", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_writer(path):
    """Another process that is in the middle of writing the file."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"open\n"
        yield process
        process.kill()


def test_a_file_appears_whole_with_the_umasks_mode(tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    with written_whole(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [target]


def test_text_is_utf8_with_plain_newlines(tmp_path):
    with written_whole(tmp_path / "a", "w") as file:
        file.write("ä\n")
    assert (tmp_path / "a").read_bytes() == "ä\n".encode()


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail():
        with written_whole(target) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(InputError, match="cannot be written: No space"),
        written_whole(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nowhere/file", "."])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="cannot be written"), written_whole(tmp_path / name):
        pass


@pytest.mark.parametrize("has_links", [True, False])
def test_an_exclusive_name_is_taken_once(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(1, "no links")))
    target = tmp_path / "file"

    def race():
        with written_whole(target, exclusive=True) as slow:
            slow.write(b"slow")
            with written_whole(target, exclusive=True) as fast:
                fast.write(b"fast")

    with pytest.raises(FileExistsError):
        race()
    assert target.read_bytes() == b"fast"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_keeps_pointing_to_the_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with written_whole(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_leftovers_go_when_their_owner_is_gone(tmp_path):
    target = tmp_path / "file"
    with other_writer(target) as process:
        (part,) = tmp_path.iterdir()
        with written_whole(tmp_path / "other"):
            pass
        assert part.exists()  # its writer lives
        process.kill()
        process.wait()
        (tmp_path / ".mine.part").touch()  # another program's
        with written_whole(tmp_path / "other"):
            pass
    assert {file.name for file in tmp_path.iterdir()} == {"other", ".mine.part"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "folder"
    for name in ("a", "b"):
        with whole_folder(target) as part:
            (part / name).write_text(name)
            assert not (target / name).exists()
        assert [file.name for file in target.iterdir()] == [name]
    with pytest.raises(RuntimeError), whole_folder(target) as part:
        raise RuntimeError
    assert [file.name for file in target.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_old_folder_goes_only_where_the_new_one_is_there(tmp_path):
    old = tmp_path / ".folder.0123abcd.old"
    old.mkdir()
    remove_leftovers(tmp_path)
    assert old.exists()
    (tmp_path / "folder").mkdir()
    remove_leftovers(tmp_path)
    assert not old.exists()
