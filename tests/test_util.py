import errno
import io
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm import util
from ldm.errors import InputError
from ldm.util import (
    allow_module,
    get_obj_from_str,
    instantiate_from_config,
    part_of,
    remove_leftovers,
    whole_folder,
    word_list,
    written_whole,
)


def test_builds_with_plain_values():
    config = OmegaConf.create({"target": "torch.nn.Conv2d", "params": {"kernel_size": [3, 1]}})
    built = instantiate_from_config(config, nn.Module, in_channels=4, out_channels=2)
    assert built.weight.shape == (2, 4, 3, 1)


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
        ("nowhere.X", "is not in ldm, torch.nn"),
        ("ldm.util.X", "has no 'X'"),
        (
            "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion",
            "is of a Stable Diffusion 2 depth model; supported are Stable Diffusion 1.x and 2.x",
        ),
        ("own.LatentUpscaleDiffusion", "is not in ldm, torch.nn"),
        ("sgm.models.diffusion.DiffusionEngine", "is of an SDXL model; supported are"),
    ],
)
def test_bad_targets(path, message):
    with pytest.raises(InputError, match=message):
        get_obj_from_str(path)


# Each of these ran what it names, or could have, when any importable object would do.
HOSTILE = """
os.system os.popen posix.system subprocess.getoutput subprocess.Popen subprocess.run builtins.exec
builtins.eval builtins.dict builtins.__import__ runpy.run_path runpy.run_module code.interact
importlib.import_module pickle.loads pickle.Unpickler ctypes.CDLL shutil.rmtree pathlib.Path
socket.socket webbrowser.open urllib.request.urlopen tempfile.NamedTemporaryFile sys.exit
numpy.load numpy.memmap torch.load torch.hub.load torch.save torch.Tensor torch.jit.load
torch.utils.cpp_extension.load torch.utils.data.DataLoader yaml.unsafe_load omegaconf.OmegaConf
ldm.util.importlib.import_module ldm.util.sys.exit ldm.util.os.system ldm.util.Path
ldm.util.allow_module ldm.util.get_obj_from_str ldm.util.shutil ldm.distributed.os.kill
ldm.checkpoint.files.torch.load ldm.checkpoint.files.zipfile ldm.checkpoint.files.open_state_dict
ldm.checkpoint.files.Path ldm.images.Image ldm.config ldm.modules.attention.nn.Module.__init__
torch.nn.functional.relu torch.nn.init.normal_ torch.nn.modules.module.torch.load
torch.nn.utils.parametrize.copy torch.nn.Module.load_state_dict torch.nn.Module.__class__
torch.optim.Optimizer.step torch.optim.optimizer.functools.partial torch.optim.lr_scheduler.types
pytorch_lightning.Trainer.fit pytorch_lightning.seed_everything pytorch_lightning.os.system
pytorch_lightning.core.saving.torch pytorch_lightning.core.saving.load_hparams_from_yaml
pytorch_lightning.__main__.main ldm.__builtins__.eval ldm.util.__loader__.exec_module
torch.nn.__builtins__ ldmx.a torch.nnx.A torch.nn. .torch.nn.ReLU torch..nn.ReLU torch.nn/ReLU
__main__.X main.os main.Path ldm.data.rendered.os ldm.data.scenes.VOCABULARY
ldm.evaluation.attributes.load_file ldm.evaluation.demo.Path
""".split()  # noqa: SIM905 - one a line would be three pages


@pytest.mark.parametrize("path", [*HOSTILE, "", "a b.c", "torch.nn.ReLU\n", "ldm." + "x" * 500])
def test_a_configuration_names_nothing_but_classes_of_known_packages(path):
    with pytest.raises(InputError, match=r"^target ") as caught:
        instantiate_from_config({"target": path, "params": {}})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("path", [None, 3, ["torch.nn.ReLU"], {"a": 1}, True])
def test_a_target_is_a_text(path):
    with pytest.raises(InputError, match="not a dotted path"):
        instantiate_from_config({"target": path})


@pytest.mark.parametrize(
    "path", ["pytorch_lightning.Trainer", "torch.optim.SGD", "torch.nn.Linear"]
)
def test_a_class_must_fit_its_place(path):
    with pytest.raises(InputError, match="is no Dropout or ReLU, which is needed here"):
        instantiate_from_config({"target": path}, (nn.Dropout, nn.ReLU))


@pytest.mark.parametrize("params", [[1], "a", {1: 2}, {"depth": 3}, {"p": 1, "expected": 2}])
def test_params_must_fit_the_class(params):
    with pytest.raises(InputError, match=r"torch\.nn\.Dropout"):
        instantiate_from_config({"target": "torch.nn.Dropout", "params": params})


def test_a_module_can_be_opened_by_hand(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("class Model: pass\ndef run(): raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ldm.util._PACKAGES", ["ldm"])
    with pytest.raises(InputError, match="is not in ldm"):
        get_obj_from_str("mine.Model")
    allow_module("mine")
    assert get_obj_from_str("mine.Model").__name__ == "Model"
    with pytest.raises(InputError, match="is no class"):
        get_obj_from_str("mine.run")
    with pytest.raises(InputError, match="not the name of a Python module"):
        allow_module("mine; x")


def test_words_come_from_published_lists_alone():
    assert "house" in word_list("ldm.demo.scenes.VOCABULARY")
    assert word_list("ldm.data.scenes.VOCABULARY") is word_list("ldm.demo.scenes.VOCABULARY")
    for path in ("os.environ", "ldm.util.ALIASES", 3, None):
        with pytest.raises(InputError, match="is none of"):
            word_list(path)


PUBLISHED = """
main.DataModuleFromConfig main.WrappedDataset main.ImageLogger main.SetupCallback main.CUDACallback
ldm.training.DataModuleFromConfig ldm.training.lightning.ImageLogger
ldm.data.rendered.RenderedScenes
ldm.models.captions.CaptionReader ldm.evaluation.attributes.AttributeClassifier
ldm.data.latents.EncodedPictures ldm.data.buckets.ResolutionBuckets main.LearningRateMonitor
ldm.models.diffusion.ddpm.LatentDiffusion ldm.models.autoencoder.AutoencoderKL torch.nn.Identity
torch.optim.AdamW ldm.lr_scheduler.LambdaLinearScheduler
""".split()  # noqa: SIM905 - likewise


@pytest.mark.parametrize("path", PUBLISHED)
def test_published_names_resolve(path):
    assert get_obj_from_str(path).__name__ == path.rpartition(".")[2]


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


def test_a_writer_may_replace_its_file(tmp_path):
    """As safetensors does, which makes a file of its own with another mode."""
    with part_of(tmp_path / "a.bin") as part:
        assert part.suffix == ".bin"
        (part.parent / "own").write_bytes(b"new")
        (part.parent / "own").chmod(0o600)
        (part.parent / "own").replace(part)
        (part.parent / "left over").touch()
    (tmp_path / "b").touch()
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "b"]


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


def test_a_full_disk_is_seen_behind_other_errors(tmp_path):
    """torch.save fails at the disk, and then again when it ends the file."""

    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def save(path, file):
        with written_whole(path):
            torch.save({"a": torch.ones(1000)}, file)

    with pytest.raises(InputError, match=r"a\.ckpt cannot be written: No space left on device"):
        save(tmp_path / "a.ckpt", Full())
    with pytest.raises(ValueError, match="of its own"), written_whole(tmp_path / "b"):
        raise ValueError("of its own")
    assert list(tmp_path.iterdir()) == []


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
        with part_of(target, exclusive=True) as slow:
            slow.write_bytes(b"slow")
            with part_of(target, exclusive=True) as fast:
                fast.write_bytes(b"fast")

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


def test_a_stop_signal_during_the_clean_up_leaves_nothing_behind(tmp_path, monkeypatch):
    remove = shutil.rmtree

    def stopped(folder, **kwargs):
        monkeypatch.setattr(shutil, "rmtree", remove)
        raise KeyboardInterrupt

    def write():
        with written_whole(tmp_path / "a") as file:
            file.write(b"all of it")
            monkeypatch.setattr(shutil, "rmtree", stopped)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"all of it"


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


def test_a_temporary_folder_that_another_writer_removed_is_made_anew(tmp_path, monkeypatch):
    lock, seen = util.locked, []

    def late(path, wait):
        if wait and not seen:
            seen.append(path)
            shutil.rmtree(path)  # by another writer, between its making and its locking
        return lock(path, wait)

    monkeypatch.setattr(util, "locked", late)
    with util.written_whole(tmp_path / "a.txt", "w") as file:
        file.write("whole")
    assert len(seen) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "whole"
