"""Following the recipe: stages of training in order, each gone on with where it stopped.

A state folder holds everything between an empty folder and finished weights:

    scenes/, latents/           renders and encoded pictures
    STAGE/                      key.json, checkpoints/, and the runs' logs and pictures
    weights/STAGE.safetensors   what a finished stage hands on, with its configuration as .yaml
    made.json                   steps, seconds, pictures and losses of every stage
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from ldm.config import load_config, shipped
from ldm.demo.export import export_stage, level_latents
from ldm.demo.recipe import FOLDER, Recipe, Stage
from ldm.demo.rendered import STYLE
from ldm.errors import InputError
from ldm.text import read_json
from ldm.util import written_whole

# What may be changed in the middle of a stage: how it is trained, not what comes of it.
TUNING = (
    "scheduler_config",
    "lossconfig",
    "ckpt_path",
    "monitor",
    "min_snr_gamma",
    "timestep_power",
    "timestep_logit_normal",
)
# Two threads that wait by spinning slow other programs and each other.
QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
# torchrun, which would show a traceback when it is stopped; train.py says what is saved.
LAUNCHER = """
import sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main
try:
    main()
except SignalException as stop:
    sys.exit(128 + stop.sigval)
"""


def stage_config(
    recipe: Recipe, stage: Stage, state: Path, device: str
) -> tuple[list[str], list[str], dict[str, Any]]:
    """Files, overrides and the resulting configuration of a stage."""
    files = [f"{FOLDER}/{name}" for name in stage.files]
    overrides = [f"shared.state={state}", *(stage.cuda if device == "cuda" else ())]
    if stage.starts_from:
        overrides += [f"model.params.ckpt_path={weights_of(state, stage.starts_from)}"]
    overrides += [*recipe.overrides.get("all", ()), *recipe.overrides.get(stage.name, ())]
    return files, overrides, load_config(files, overrides)


def stage_key(config: Mapping[str, Any], before: str) -> str:
    """A digest of what decides what a stage's weights are and mean.

    Args:
        config: its configuration.
        before: the key of the stage before it.
    """
    params = {k: v for k, v in config["model"]["params"].items() if k not in TUNING}
    text = json.dumps([config["model"]["target"], params, STYLE, before], sort_keys=True)
    text = text.replace(config["shared"]["state"], "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_keys(recipe: Recipe, state: Path, device: str) -> dict[str, str]:
    """The key of every stage.

    Raises:
        InputError: a stage in the state folder has another key.
    """
    keys: dict[str, str] = {}
    before = ""
    for stage in recipe.stages:
        before = stage_key(stage_config(recipe, stage, state, device)[2], before)
        keys[stage.name] = before
        file = state / stage.name / "key.json"
        if (stored := _stored(file).get("key", before)) != before:
            raise InputError(
                f"--state {state}: its stage {stage.name!r} is of another recipe ({stored}, not "
                f"{before}); name another folder, or delete {file.parent} and what comes after it"
            )
    return keys


def checkpoint_of(state: Path, stage: Stage) -> Path | None:
    """The last checkpoint of a stage, in its run's folder; None before the first."""
    found = (state / stage.name).glob("*/checkpoints/last.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def progress_of(state: Path, stage: Stage) -> dict[str, Any]:
    """Steps, seconds, pictures and losses of a stage so far; empty before its first checkpoint."""
    checkpoint = checkpoint_of(state, stage)
    if checkpoint is None:
        return {}
    return _stored(checkpoint.with_name("progress.json"))


def is_done(state: Path, stage: Stage) -> bool:
    """Whether a stage has handed on its weights."""
    return weights_of(state, stage.name).is_file()


def weights_of(state: Path, name: str) -> Path:
    """Where a stage's finished weights lie."""
    return state / "weights" / f"{name}.safetensors"


def seconds_for(recipe: Recipe, stage: Stage, state: Path, hours: float) -> float:
    """A stage's time in all: its share of what the finished ones have left."""
    left, shares = hours * 3600, 0.0
    for other in recipe.stages:
        if is_done(state, other):
            left -= progress_of(state, other).get("seconds", 0.0)
        else:
            shares += other.share
    return max(left, 60.0) * stage.share / shares


def train_stage(
    recipe: Recipe,
    stage: Stage,
    state: Path,
    device: str,
    seconds: float,
    this_call: float,
    lock: IO[str],
) -> None:
    """Run train.py on a stage, from its checkpoint if there is one.

    Args:
        recipe: that it belongs to.
        stage: which.
        state: the state folder.
        device: ``cpu`` or ``cuda``.
        seconds: of training for the stage, in all.
        this_call: seconds after which the run should stop in any case.
        lock: the open lock file.

    Raises:
        InputError: the training failed.
    """
    files, overrides, config = stage_config(recipe, stage, state, device)
    clock: dict[str, Any] = {"this_call": min(this_call, 1e9)}
    if "max_epochs" not in config["lightning"]["trainer"]:
        clock["seconds"] = seconds
    prefix = "lightning.callbacks.clock"
    overrides += [f"{prefix}.target=ldm.training.clock.Clock"]
    overrides += [f"{prefix}.params.{name}={value}" for name, value in clock.items()]
    kept = {"save_last": "false", "save_top_k": 0}  # the clock saves
    overrides += [f"lightning.modelcheckpoint.params.{k}={v}" for k, v in kept.items()]
    overrides += ["lightning.trainer.enable_progress_bar=false"]
    if "max_epochs" not in config["lightning"]["trainer"]:
        overrides += ["lightning.trainer.max_epochs=-1"]
    command = ["--train", "--no-test"]
    n = stage.processes if device == "cpu" else 1
    command += ["--accelerator", device, "--devices", str(n), "--base", *files, *overrides]
    if checkpoint := checkpoint_of(state, stage):
        command += ["--resume", str(checkpoint.parent.parent)]
    else:
        command += ["--logdir", str(state / stage.name), "--name", "run"]
    if code := launch(command, device, lock, n):
        raise InputError(f"stage {stage.name!r} ended with exit code {code}, see above")


def launch(arguments: list[str], device: str, lock: IO[str], n: int) -> int:
    """Run train.py in n processes of its own, which hold the lock as well; its exit code."""
    environment = os.environ | (QUIET_THREADS if device == "cpu" else {})
    program = "from ldm.cli.program import run_program; run_program('ldm.training.run')"
    command = [sys.executable, "-c", program, *arguments]
    if n > 1:
        environment |= {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // n, 1))}
        start = ["-c", LAUNCHER, "--standalone", "--nproc-per-node", str(n), "--no-python"]
        command = [sys.executable, *start, *command]
    with subprocess.Popen(command, env=environment, pass_fds=[lock.fileno()]) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # it saves first
            raise


def run_stages(
    recipe: Recipe, state: Path, device: str, hours: float, this_call: float, lock: IO[str]
) -> bool:
    """Train what is not finished yet, stage by stage.

    Args:
        recipe: the recipe.
        state: the state folder.
        device: ``cpu`` or ``cuda``.
        hours: of training in all.
        this_call: seconds after which to stop in any case.
        lock: the open lock file.

    Returns: whether all stages are finished.
    """
    end = time.monotonic() + this_call
    keys = check_keys(recipe, state, device)
    for stage in recipe.stages:
        if is_done(state, stage):
            continue
        (state / stage.name).mkdir(exist_ok=True)
        note_start(state / stage.name / "key.json", keys[stage.name])
        seconds = seconds_for(recipe, stage, state, hours)
        print(f"== {stage.name}: {seconds / 60:.0f} minutes in all ==", flush=True)
        left = end - time.monotonic()
        if left <= 0:
            return False
        train_stage(recipe, stage, state, device, seconds, left, lock)
        if not progress_of(state, stage).get("is_over"):
            return False
        carried = [weights_of(state, name) for name in stage.carries]
        checkpoint = checkpoint_of(state, stage)
        assert checkpoint is not None, "its progress is known"
        finished = weights_of(state, stage.name)
        made = finished.with_name(f"{stage.name}_unlevelled.safetensors")
        export_stage(stage.export, checkpoint, carried, made)
        if stage.levels_latents:
            config = stage_config(recipe, stage, state, device)[2]
            level_latents(made, config, stage.levels_latents)
        with written_whole(finished.with_suffix(".yaml"), "w") as file:
            yaml.safe_dump(stage_config(recipe, stage, state, device)[2], file, sort_keys=False)
        made.replace(finished)
        note(recipe, state, device)
    return True


def note(recipe: Recipe, state: Path, device: str) -> dict[str, Any]:
    """What was done so far, stage by stage; also written to the recipe's log in the state."""
    made = {
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "renderer": STYLE,
        "device": device,
        "stages": {
            s.name: {
                "commits": _stored(state / s.name / "key.json").get("commits", []),
                **progress_of(state, s),
                "is_over": is_done(state, s),
            }
            for s in recipe.stages
        },
    }
    write_json(state / recipe.log, made)
    return made


def note_start(file: Path, key: str) -> None:
    """Store a stage's key, and the commits that have trained it."""
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=shipped("."), capture_output=True, text=True).stdout.strip()
    commits = [c for c in _stored(file).get("commits", []) if c != commit]
    write_json(file, {"key": key, "commits": [*commits, commit] if commit else commits})


def _stored(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    with written_whole(path, "w") as file:
        json.dump(content, file, indent=2)
