"""A run that is stopped and resumed is the run that was never stopped."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import pytest
import torch

from ldm.training.order import EpochBatches, shuffled
from ldm.training.run import main, run_of
from tests.training.toy import diffusion_config, pictures, toy_config, train, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
N_STEPS = 8  # of 3 batches an epoch


def losses(run: Path, ending: str) -> dict[int, list[str]]:
    """Losses of each step, to the last digit."""
    found: dict[int, list[str]] = {}
    for path in sorted(run.rglob("metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                values = [
                    v for k, v in sorted(row.items()) if k.endswith((ending, f"{ending}_ema")) and v
                ]
                if values:
                    found.setdefault(int(row["step"]), []).append(",".join(values))
    return {step: sorted(set(values)) for step, values in found.items()}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def check_same(run: Path, other: Path, ending: str = "loss") -> None:
    assert losses(run, ending) == losses(other, ending)
    kept = weights(other)
    assert all(torch.equal(value, kept[name]) for name, value in weights(run).items())


@pytest.mark.parametrize(
    ("kind", "n_first"),
    [("first stage", 3), ("diffusion", 2), ("buckets", 4), ("workers", 2), ("adversarial", 2)],
)
def test_losses_are_those_of_the_unbroken_run(kind: str, n_first: int, tmp_path: Path) -> None:
    data = pictures(tmp_path / "pictures")
    config = toy_config(data, max_steps=N_STEPS, val_check_interval=2)
    if kind == "diffusion":
        config = diffusion_config(data, max_steps=N_STEPS, check_val_every_n_epoch=1)
    if kind == "buckets":
        bucket = config["data"]["params"]["train"]
        config["data"]["params"]["train"] = {
            "target": "ldm.data.buckets.ResolutionBuckets",
            "params": {"buckets": [bucket, bucket], "batch_sizes": [2, 4]},
        }
    if kind == "adversarial":
        loss = {"disc_start": 1, "disc_num_layers": 1, "disc_channels": 8, "perceptual_weight": 0.0}
        target = "ldm.modules.losses.LPIPSWithDiscriminator"
        config["model"]["params"]["lossconfig"] = {"target": target, "params": loss}
    if kind == "workers":
        config["data"]["params"]["num_workers"] = 1
    path = write(tmp_path / "toy.yaml", config)
    unbroken = train(path, tmp_path / "unbroken")
    stopped = train(path, tmp_path / "stopped", "--max_steps", str(n_first))
    main(["--resume", str(stopped), "--train", "--max_steps", str(N_STEPS)])
    check_same(unbroken, stopped)


def test_a_stream_that_begins_again_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = toy_config(tmp_path, max_steps=2)
    config["data"]["params"] |= {"train": {"target": "tests.training.toy.Stream"}}
    del config["data"]["params"]["validation"]
    run = train(write(tmp_path / "toy.yaml", config), tmp_path / "logs")
    assert "a stream" not in caplog.text
    main(["--resume", str(run), "--train", "--max_steps", "3"])
    assert "this run may read them from the beginning again" in caplog.text


@pytest.mark.parametrize("has_schedule", [False, True])
def test_a_run_goes_on_with_the_rate_that_it_is_given(has_schedule: bool, tmp_path: Path) -> None:
    config = toy_config(pictures(tmp_path / "pictures"), max_steps=1)
    schedule = {"f_start": [0.1], "f_max": [1.0], "f_min": [1.0]}
    schedule |= {"warm_up_steps": [4], "cycle_lengths": [100]}
    if has_schedule:
        scheduler = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": schedule}
        config["model"]["params"]["scheduler_config"] = scheduler
    run = train(write(tmp_path / "toy.yaml", config), tmp_path / "logs")
    change = ["--max_steps", "2", "model.base_learning_rate=0.00001"]
    main(["--resume", str(run), "--train", *change])
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (group,) = kept["optimizer_states"][0]["param_groups"]
    factor = 0.1 + 0.9 * 2 / 4 if has_schedule else 1
    assert group["lr"] == pytest.approx(2e-5 * factor)  # of batches of two


def test_each_epoch_begins_anew_where_only_some_batches_are_taken() -> None:
    """Lightning's epoch has three batches then, not three and the two that are left."""
    draw = partial(shuffled, 10, 2)
    whole = EpochBatches(draw, 0, lambda: 5)
    for limit in (3, 0.7):
        some = EpochBatches(draw, 0, lambda: 3, limit=limit)
        assert list(some) == list(whole)
        assert [len(some), len(list(some))] == [5, 5]
        assert list(EpochBatches(draw, 0, lambda: 4, limit=limit)) == list(whole)[1:]


def test_the_run_of_a_checkpoint_is_above_its_checkpoints(tmp_path):
    """However deep they are kept: upstream's trainstep_checkpoints are a folder below."""
    for name in ("last.ckpt", "trainstep_checkpoints/a.ckpt"):
        path = tmp_path / "run" / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert run_of(str(path)) == (tmp_path / "run", path)
