import json
import os
import pickle
import re
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.parsing import AttributeDict
from safetensors.torch import save_file

from ldm.checkpoint.files import INDEX, open_state_dict, stem_of
from ldm.errors import InputError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.half)}


def check(state_dict, expected=None):
    expected = WEIGHTS if expected is None else expected
    assert set(state_dict) == set(expected)
    assert len(state_dict) == len(expected)
    for name, tensor in expected.items():
        assert state_dict.entries[name].shape == tuple(tensor.shape)
        assert state_dict[name].dtype == tensor.dtype
        assert torch.equal(state_dict[name], tensor)


# --- formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin"])
@pytest.mark.parametrize(
    "wrap",
    [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"state_dict": {"state_dict": w}}],
    ids=["flat", "wrapped", "doubly"],
)
def test_files_of_torch_save(tmp_path, wrap, suffix, is_zip):
    path = tmp_path / f"model.{suffix}"
    torch.save(wrap(WEIGHTS), path, _use_new_zipfile_serialization=is_zip)
    state_dict = open_state_dict(path)
    check(state_dict)
    assert state_dict.metadata == {}


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_safetensors_whatever_its_suffix(tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    save_file(WEIGHTS, path, {"modelspec.prediction_type": "v"})
    state_dict = open_state_dict(str(path))
    check(state_dict)
    assert state_dict.metadata == {"modelspec.prediction_type": "v"}


def test_pickle_called_safetensors(tmp_path):
    torch.save(WEIGHTS, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"rename it to \.ckpt"):
        open_state_dict(tmp_path / "m.safetensors")


def test_folder_is_one_model(tmp_path):
    save_file({"a.weight": WEIGHTS["a.weight"]}, tmp_path / "one.safetensors", {"x": "1"})
    save_file({"b": WEIGHTS["b"]}, tmp_path / "two.safetensors", {"y": "2"})
    state_dict = open_state_dict(tmp_path)
    check(state_dict)
    assert state_dict.metadata == {"x": "1", "y": "2"}


def test_parameters_become_plain_tensors(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "m.ckpt")
    tensor = open_state_dict(tmp_path / "m.ckpt")["a"]
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad


def test_what_is_no_tensor_is_left_out(tmp_path):
    torch.save({**WEIGHTS, "epoch": 3, "name": "x", "nested": {"a": 1}}, tmp_path / "m.ckpt")
    check(open_state_dict(tmp_path / "m.ckpt"))


@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
def test_opening_reads_no_weights(tmp_path, name):
    """The pages of a large file stay on the disk until a tensor is used."""
    big = {"x": torch.ones(8_000_000)}  # 32 MB
    if name.endswith("ckpt"):
        torch.save(big, tmp_path / name)
    else:
        save_file(big, tmp_path / name)
    del big

    def resident():
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0])

    before = resident()
    state_dict = open_state_dict(tmp_path / name)
    assert state_dict.entries["x"].shape == (8_000_000,)
    assert resident() - before < 10_000
    assert state_dict["x"][-1] == 1


# --- training files ---------------------------------------------------------------------------


class OldNumpyNames:
    """Pickles numpy scalars as old releases of numpy did, under numpy.core."""

    def __init__(self, path):
        self.path = path

    def save(self, content):
        torch.save(content, self.path)
        with zipfile.ZipFile(self.path) as archive:
            parts = {info: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED) as archive:
            for info, data in parts.items():
                archive.writestr(info, data.replace(b"numpy._core.", b"numpy.core."))


def lightning_content():
    return {
        "epoch": 7,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {
            ModelCheckpoint: {"monitor": "val/loss", "best_model_score": torch.tensor(0.1)}
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "lr_schedulers": [
            {"base_lrs": [np.float64(1e-4)], "last": np.float32(2), "n": np.int64(3)}
        ],
        "rng": np.arange(3),
        "hyper_parameters": OmegaConf.create({"a": [1, {"b": None}], "c": "x", "d": 1.5}),
        "state_dict": WEIGHTS,
    }


def test_lightning_file(tmp_path):
    torch.save(lightning_content(), tmp_path / "last.ckpt")
    check(open_state_dict(tmp_path / "last.ckpt"))


def test_lightning_file_with_numpys_old_names(tmp_path):
    path = tmp_path / "last.ckpt"
    OldNumpyNames(path).save(lightning_content())
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        assert b"numpy.core.multiarray" in archive.read(name)
    check(open_state_dict(path))


@pytest.mark.parametrize(
    "kept",
    [
        AttributeDict(lr=1e-4, heads=[1, 2]),
        defaultdict(list, a=[1]),
        AttributeDict(),
        Counter("aab"),
    ],
    ids=lambda kept: f"{type(kept).__name__} of {len(kept)}",
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_dictionaries_of_other_classes_are_read_as_plain_ones(tmp_path, kept, is_zip):
    content = {"hyper_parameters": kept, "state_dict": WEIGHTS}
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=is_zip)
    check(open_state_dict(tmp_path / "m.ckpt"))


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_of_a_newer_protocol_is_not_called_damaged(tmp_path, protocol, is_zip):
    path = tmp_path / "m.ckpt"
    torch.save(WEIGHTS, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError, match=f"m.ckpt is a pickle of protocol {protocol}, and up to 2"):
        open_state_dict(path)


def test_training_libraries_are_neither_called_nor_needed(tmp_path, monkeypatch):
    torch.save(lightning_content(), tmp_path / "last.ckpt")

    def refuse(*args, **kwargs):
        raise AssertionError("the pickle called something")

    # the module's name for it: a patched __new__ would stay behind in the class itself
    refusing = type("ModelCheckpoint", (), {"__new__": refuse, "__init__": refuse})
    monkeypatch.setattr(sys.modules[ModelCheckpoint.__module__], "ModelCheckpoint", refusing)
    monkeypatch.setattr(OmegaConf, "create", refuse)
    check(open_state_dict(tmp_path / "last.ckpt"))


def test_nothing_stays_allowed_afterwards(tmp_path):
    torch.save(lightning_content(), tmp_path / "last.ckpt")
    before = set(torch.serialization.get_safe_globals())  # torch keeps them in no order
    open_state_dict(tmp_path / "last.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before


# --- hostile and damaged files ----------------------------------------------------------------


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


class Foreign:
    pass


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("is_raw", [True, False])
def test_pickled_code_is_not_executed(tmp_path, is_zip, is_raw):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "executed"
    if is_raw:
        path.write_bytes(pickle.dumps({"state_dict": WEIGHTS, "x": Hostile(trace)}, protocol=2))
    else:
        content = {"state_dict": WEIGHTS, "x": Hostile(trace)}
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError) as caught:
        open_state_dict(path)
    assert not trace.exists()
    assert "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists(), "the payload would have worked"


def test_foreign_class_is_named(tmp_path):
    torch.save({"state_dict": WEIGHTS, "x": Foreign()}, tmp_path / "m.ckpt")
    with pytest.raises(InputError, match=r"Foreign', which no weights need; it was not executed"):
        open_state_dict(tmp_path / "m.ckpt")


def truncated(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated(tmp_path, kind, share):
    path = tmp_path / "m.ckpt"
    weights = {"x": torch.ones(1000)}
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    truncated(path, share)
    with pytest.raises(InputError, match=r"truncated|damaged") as caught:
        open_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"this is a readme\n" * 9, "is a text file"),
        ("für die Katz".encode(), "is a text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\x00\x01\x02" * 99, "is not a checkpoint, or it is damaged"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not a checkpoint, or it is damaged"),
        (pickle.dumps([1, 2], protocol=2), "is not a checkpoint|is a pickle"),
        (b"PK\x03\x04 and then nothing", "is truncated"),
    ],
)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_other_files(tmp_path, content, message, suffix):
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_state_dict(path)
    assert str(caught.value).startswith(str(path))


def test_the_index_of_a_folder(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("{}")
    with pytest.raises(InputError, match=f"name its folder, {re.escape(str(tmp_path))}"):
        open_state_dict(path)


def test_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.ckpt", "w") as archive:
        archive.writestr("word/document.xml", "hello")
    with pytest.raises(InputError, match="is not a checkpoint"):
        open_state_dict(tmp_path / "m.ckpt")


def test_no_tensors(tmp_path):
    torch.save({"state_dict": {"epoch": 1}}, tmp_path / "m.ckpt")
    with pytest.raises(InputError, match="holds no tensors"):
        open_state_dict(tmp_path / "m.ckpt")


def test_a_tensor_alone(tmp_path):
    torch.save(torch.ones(3), tmp_path / "m.pt")
    with pytest.raises(InputError, match="holds a Tensor, not a dictionary"):
        open_state_dict(tmp_path / "m.pt")


def test_missing(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint"):
        open_state_dict(tmp_path / "nowhere.ckpt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    torch.save(WEIGHTS, tmp_path / "m.ckpt")
    (tmp_path / "m.ckpt").chmod(0)
    with pytest.raises(InputError, match="cannot be read"):
        open_state_dict(tmp_path / "m.ckpt")


# --- folders ----------------------------------------------------------------------------------


def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without \.safetensors files$"):
        open_state_dict(tmp_path)


def test_folder_of_other_checkpoints_lists_them(tmp_path):
    (tmp_path / "model.ckpt").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"name one of its files: model\.ckpt$"):
        open_state_dict(tmp_path)


def test_folder_of_a_training_run_lists_its_checkpoints(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(InputError, match=r"name one of its files: checkpoints/last\.ckpt$"):
        open_state_dict(tmp_path)


def test_folder_of_several_models(tmp_path):
    save_file(WEIGHTS, tmp_path / "one.safetensors")
    save_file(WEIGHTS, tmp_path / "two.safetensors")
    message = "more than one model: .* is in one.safetensors and in two.safetensors"
    with pytest.raises(InputError, match=message):
        open_state_dict(tmp_path)


def test_damaged_file_in_a_folder_is_named(tmp_path):
    save_file({"x": torch.ones(9)}, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").touch()
    with pytest.raises(InputError, match=r"two\.safetensors is empty"):
        open_state_dict(tmp_path)


# --- hostile tensors --------------------------------------------------------------------------


def holding_itself():
    content = {"x": torch.ones(1)}
    content["state_dict"] = content
    return content


@pytest.mark.parametrize(
    "content",
    [
        {"w": torch.zeros(1).expand(10**9)},
        {"w": torch.zeros(1).as_strided((10**5, 10**5), (0, 0))},
        {f"w{i}": torch.zeros(1).expand(10**6) for i in range(1000)},
        {f"w{i}": whole for whole in [torch.zeros(10**6)] for i in range(200)},
    ],
    ids=["expanded", "strided", "many", "one for all"],
)
def test_a_small_file_does_not_become_a_large_model(tmp_path, content):
    torch.save(content, tmp_path / "m.ckpt")
    with pytest.raises(InputError, match="tensors repeat"):
        open_state_dict(tmp_path / "m.ckpt")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(3, dtype=torch.int8), "int8"),
        (torch.ones(3, dtype=torch.bool), "bool"),
        (torch.ones(3, dtype=torch.complex64), "complex64"),
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.empty(3, device="meta"), "meta"),
    ],
)
def test_what_is_no_weight_is_named(tmp_path, tensor, kind):
    torch.save({"w": tensor, "x": torch.ones(3)}, tmp_path / "m.ckpt")
    with pytest.raises(InputError, match=rf"w is {kind}.*, and a weight must be"):
        open_state_dict(tmp_path / "m.ckpt").require_weights(["x", "w"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_and_in_safetensors(tmp_path, dtype):
    save_file({"w": torch.ones(3).to(dtype)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="and a weight must be"):
        open_state_dict(tmp_path / "m.safetensors").require_weights("w")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_floating_point_numbers_are_weights(tmp_path, dtype, suffix):
    path = tmp_path / f"m.{suffix}"
    content = {"w": torch.ones(3, dtype=dtype)}
    torch.save(content, path) if suffix == "ckpt" else save_file(content, path)
    open_state_dict(path).require_weights("w")


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    torch.save(holding_itself(), tmp_path / "m.ckpt")
    assert list(open_state_dict(tmp_path / "m.ckpt")) == ["x"]


@pytest.mark.parametrize("suffix", [b"ckpt", b"safetensors"])
def test_a_file_name_that_is_no_text_is_not_called_damage(tmp_path, suffix):
    path = tmp_path / os.fsdecode(b"m\xff." + suffix)
    try:
        path.write_bytes(b"PK")
    except OSError:
        pytest.skip("this disk has no such names")
    with pytest.raises(InputError, match=r"m\\udcff\.\w+: its name is no text in UTF-8; rename it"):
        open_state_dict(path)


def test_long_names_are_refused_and_shown_short(tmp_path):
    save_file({"w\n\x1b[31m" + "x" * 10**4: torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"a name in it is w\\n\\x1b\[31mx+\.\.\.$") as caught:
        open_state_dict(tmp_path / "m.safetensors")
    assert len(str(caught.value)) < 300


def test_pipes_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    for path in (tmp_path / "m.safetensors", tmp_path, "/dev/zero"):
        with pytest.raises(InputError, match="is a pipe or a device"):
            open_state_dict(path)


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    torch.save({"w": torch.zeros(10**6)}, tmp_path / "a.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "a.ckpt") as source,
        zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(InputError, match="compressed archive"):
        open_state_dict(tmp_path / "b.ckpt")


# --- folders of one conversion ----------------------------------------------------------------


def split(folder, value=0.0, **files):
    """A folder as `convert --split` writes it."""
    folder.mkdir()
    index = {}
    for file, names in files.items():
        tensors = {name: torch.full((2,), value) for name in names.split()}
        save_file(tensors, folder / f"{file}.safetensors", {"split_id": f"id {value}"})
        index |= dict.fromkeys(tensors, f"{file}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def test_a_folder_is_checked_against_its_index(tmp_path):
    whole = split(tmp_path / "a", one="x y", two="z")
    assert set(open_state_dict(whole)) == {"x", "y", "z"}
    other = split(tmp_path / "b", value=1.0, one="x y", two="z")
    (whole / "two.safetensors").write_bytes((other / "two.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"holds files of two models: one.* and two"):
        open_state_dict(whole)
    (whole / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"z is in no file, not in two.safetensors"):
        open_state_dict(whole)
    (whole / INDEX).write_text("[]")
    with pytest.raises(InputError, match="must be an object"):
        open_state_dict(whole)


def test_a_clone_that_holds_a_whole_file_is_told_to_name_it(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "sd-v1.safetensors").touch()
    with pytest.raises(InputError, match=r"name one of its files, such as .*sd-v1\.safetensors"):
        open_state_dict(tmp_path)


def test_a_folder_has_no_ending(tmp_path):
    (tmp_path / "sd1.5").mkdir()
    assert stem_of(tmp_path / "sd1.5") == stem_of(tmp_path / "sd1.5.ckpt") == "sd1.5"
