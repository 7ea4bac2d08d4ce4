"""Signals, losses that are no numbers, damaged checkpoints: what a run leaves, and what it says."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import ldm.training.stop as module
from ldm.errors import InputError
from ldm.training.checkpoints import Diverged, WholeCheckpoints, newest_checkpoint
from ldm.training.run import main
from ldm.util import locked
from tests.training.test_resume import check_same
from tests.training.toy import Interrupting, pictures, toy_config, train, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def interrupted(tmp_path: Path, name: str, step: int, when: str, **trainer: object) -> dict:
    """A configuration that sends itself a signal."""
    config = toy_config(pictures(tmp_path / "pictures"), **trainer)
    config["lightning"]["callbacks"] = {
        "signal": {
            "target": f"{Interrupting.__module__}.Interrupting",
            "params": {"name": name, "step": step, "when": when},
        }
    }
    config["lightning"]["modelcheckpoint"]["params"] = {"every_n_train_steps": 100}
    return config


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("name", "code", "when"),
    [
        ("SIGTERM", 143, "batch"),
        ("SIGINT", 130, "batch"),
        ("SIGTERM", 143, "validation"),
        ("SIGHUP SIGTERM", 129, "batch"),  # a terminal closes, and the launcher tells it, too
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(
    name: str, code: int, when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every: dict = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    step = 2
    if name == "SIGINT":  # in the first of the two batches of its step
        every, step = {"accumulate_grad_batches": 2}, 3
    config = interrupted(tmp_path, name, step, when, **every)
    logs = tmp_path / "logs"
    with pytest.raises(SystemExit) as end:
        train(write(tmp_path / "toy.yaml", config), logs)
    assert end.value.code == code
    (run,) = logs.iterdir()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"saved after step {step}; go on with --resume {run} --train" in said
    assert newest_checkpoint(run) == (run / "checkpoints" / "last.ckpt", step)
    main(["--resume", str(run), "--train", "lightning.callbacks=null"])
    config["lightning"]["callbacks"] = None
    unbroken = train(write(tmp_path / "toy.yaml", config), tmp_path / "unbroken")
    check_same(unbroken, run, "train/loss")


def test_sigusr1_before_the_first_step_saves_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ldm")
    config = interrupted(tmp_path, "SIGUSR1", 0, "setup", max_steps=2)
    run = train(write(tmp_path / "toy.yaml", config), tmp_path / "logs")
    assert f"Saved step 1 in {run / 'checkpoints' / 'last.ckpt'}" in caplog.messages
    assert newest_checkpoint(run)[1] == 2


def test_a_second_signal_some_seconds_later_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "TOGETHER", 0.0)
    config = interrupted(tmp_path, "SIGINT SIGINT", 1, "batch")
    with pytest.raises(SystemExit):
        train(write(tmp_path / "toy.yaml", config), tmp_path / "logs")
    assert "no step was finished, nothing was saved" in capsys.readouterr().err


def test_a_terminal_that_closes_does_not_stop_what_nohup_started(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        config = interrupted(tmp_path, "SIGHUP", 1, "batch", max_steps=2)
        run = train(write(tmp_path / "toy.yaml", config), tmp_path / "logs")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert newest_checkpoint(run)[1] == 2


def test_a_signal_before_the_first_step_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = interrupted(tmp_path, "SIGTERM", 0, "setup")
    with pytest.raises(SystemExit) as end:
        train(write(tmp_path / "toy.yaml", config), tmp_path / "logs")
    assert end.value.code == 143
    assert "nothing was saved" in capsys.readouterr().err
    assert not any((tmp_path / "logs").iterdir())


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    config = toy_config(pictures(tmp_path / "pictures"), max_steps=30)
    config["model"]["base_learning_rate"] = 900.0
    with pytest.raises(Diverged, match=r"step \d+: the loss is .*holds step \d+: lower") as caught:
        train(write(tmp_path / "toy.yaml", config), tmp_path / "logs")
    assert caught.value.exit_code == 1
    (run,) = (tmp_path / "logs").iterdir()
    for path in (run / "checkpoints").iterdir():
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


def test_checkpoints_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    endless = {"sqrt_recip_alphas_cumprod": torch.tensor([1.0, torch.inf])}  # of zero_snr
    WholeCheckpoints().save_checkpoint({"state_dict": endless, "global_step": 3}, path)
    path.write_bytes(b"before")
    state = {"weight": torch.tensor([1.0, torch.nan])}
    with pytest.raises(Diverged, match="after step 3 the weights weight are no numbers"):
        WholeCheckpoints().save_checkpoint({"state_dict": state, "global_step": 3}, path)
    with pytest.raises(AttributeError):  # a local function cannot be stored
        WholeCheckpoints().save_checkpoint({"state_dict": {}, "bad": lambda: 0}, path)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_newest_whole_checkpoint_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    content = {"state_dict": {"w": torch.ones(1000)}, "loops": {}, "optimizer_states": []}
    for name, step in {"last": 3, "a": 7, "b": 9, "c": 8}.items():
        WholeCheckpoints().save_checkpoint(
            {**content, "global_step": step}, folder / f"{name}.ckpt"
        )
    whole = (folder / "b.ckpt").read_bytes()
    (folder / "b.ckpt").write_bytes(whole[: len(whole) // 2])  # cut short
    flipped = bytearray((folder / "c.ckpt").read_bytes())
    middle = flipped.index(torch.ones(100).numpy().tobytes())
    flipped[middle + 80] ^= 1
    (folder / "c.ckpt").write_bytes(flipped)
    (folder / "d.ckpt").write_text("<html>")
    assert newest_checkpoint(tmp_path) == (folder / "a.ckpt", 7)
    assert sum("passed over" in message for message in caplog.messages) == 3
    for name in ("a", "last"):
        (folder / f"{name}.ckpt").unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_run_that_went_on_from_an_earlier_checkpoint_goes_on_with_what_came_of_it(
    tmp_path: Path,
) -> None:
    config = write(tmp_path / "toy.yaml", toy_config(pictures(tmp_path / "p"), max_steps=3))
    run = train(config, tmp_path / "logs")
    (early,) = (run / "checkpoints").glob("*step=000000001.ckpt")
    main(["--resume", str(early), "--train", "--max_steps", "2"])
    assert newest_checkpoint(run) == (run / "checkpoints" / "last.ckpt", 2)


def test_two_processes_do_not_go_on_with_one_run(tmp_path: Path) -> None:
    config = write(tmp_path / "toy.yaml", toy_config(pictures(tmp_path / "p"), max_steps=1))
    run = train(config, tmp_path / "logs")
    more = ["--resume", str(run), "--train", "--max_steps", "2"]
    with locked(run, wait=False), pytest.raises(InputError, match="another process trains in"):
        main(more)
    assert newest_checkpoint(run)[1] == 1
    main(more)
    assert newest_checkpoint(run)[1] == 2


def test_two_runs_of_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.training import run as module

    monkeypatch.setattr(module, "new_folder", lambda options: tmp_path / "logs" / "now_toy")
    config = write(tmp_path / "toy.yaml", toy_config(pictures(tmp_path / "p"), max_steps=1))
    train(config, tmp_path / "logs")
    train(config, tmp_path / "logs")
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["now_toy", "now_toy_2"]
