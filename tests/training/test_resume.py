"""A run that is stopped and resumed is the run that was never stopped."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

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


def test_the_run_of_a_checkpoint_is_above_its_checkpoints(tmp_path):
    """However deep they are kept: upstream's trainstep_checkpoints are a folder below."""
    for name in ("last.ckpt", "trainstep_checkpoints/a.ckpt"):
        path = tmp_path / "run" / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert run_of(str(path)) == (tmp_path / "run", path)
