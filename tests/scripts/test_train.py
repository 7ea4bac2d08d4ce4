"""The training script on a first stage of a few thousand parameters."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ldm.errors import InputError
from ldm.training.run import as_bool, main

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"


@pytest.fixture
def config(tmp_path):
    stage = yaml.safe_load((SCRIPT.parents[1] / "configs/demo/first_stage.yaml").read_text())
    ddconfig = stage["model"]["params"]["ddconfig"]
    ddconfig |= {"ch": 8, "ch_mult": [1, 1], "resolution": 16}
    stage["model"]["params"]["monitor"] = None
    pictures = {"n_pictures": 8, "size": 16, "crop": None}
    data = stage["data"]["params"]
    data["batch_size"] = 2
    for split in ("train", "validation"):
        data[split]["params"] |= {**pictures, "cache_dir": None}
    stage["lightning"]["trainer"] |= {"max_steps": 2, "precision": "32-true", "accelerator": "cpu"}
    stage["lightning"]["trainer"] |= {"val_check_interval": 1, "enable_progress_bar": False}
    stage["lightning"]["modelcheckpoint"]["params"]["every_n_train_steps"] = 1
    stage["lightning"]["callbacks"]["image_logger"]["params"]["batch_frequency"] = 2
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(stage))
    return path


def run_of(folder):
    (run,) = folder.iterdir()
    return run


def test_trains_logs_and_resumes(config, tmp_path, capsys):
    logs = tmp_path / "logs"
    arguments = ["--base", str(config), "--logdir", str(logs)]
    main([*arguments, "--train", "--name", "tiny", "--scale_lr", "false"])
    run = run_of(logs)
    assert run.name.endswith("_tiny")
    assert "Learning rate: 1.00e-04" in capsys.readouterr().out
    assert len(list((run / "configs").glob("*-project.yaml"))) == 1
    assert list((run / "images" / "train").glob("reconstructions_gs-000002_*.png"))
    assert list((run / "images" / "val").glob("inputs_gs-*.png"))
    first = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert first["global_step"] == 2

    # four steps are an epoch: the run goes on in the middle of one and ends in the next
    change = "model.base_learning_rate=0.002"
    main(["--resume", str(run), "--train", "--max_steps", "5", change])
    second = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert second["global_step"] == 5
    changed = [
        not torch.equal(first["state_dict"][name], second["state_dict"][name])
        for name in first["state_dict"]
    ]
    assert any(changed)
    stored = sorted((run / "configs").glob("*-project.yaml"))[-1]
    assert yaml.safe_load(stored.read_text())["model"]["base_learning_rate"] == 0.002


def test_without_train_the_configuration_is_shown(config, tmp_path, capsys):
    main(["--base", str(config), "--logdir", str(tmp_path / "logs"), "model.params.x=7"])
    shown = capsys.readouterr().out
    assert "x: 7" in shown
    assert "add --train to train" in shown
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to train: give --base YAML"),
        (["--resume", "nowhere"], r"--resume nowhere: there is no .*last\.ckpt"),
        (["--name", "a", "--resume", "b"], "exclude each other"),
        (["--base", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        main(arguments)


def test_a_missing_section_is_named(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {target: torch.nn.Identity}\n")
    with pytest.raises(InputError, match="no section 'data'"):
        main(["--base", str(path), "--train"])


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("T", True), ("0", False)])
def test_upstreams_spellings_of_truth(text, value):
    assert as_bool(text) is value


def test_other_spellings_are_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe'"):
        as_bool("maybe")


def test_help_needs_no_torch():
    code = "import runpy, sys; sys.argv = ['train.py', '--help']; sys.modules['torch'] = None\n"
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "key.path=value" in done.stdout
