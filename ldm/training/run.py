"""Train a model: first stage, diffusion model or classifier, from YAML configurations.

The interface is that of upstream's main.py: ``--base`` files are merged from left to right, and
``key.path=value`` arguments are merged over them. Everything is checked before the run's folder is
made; from then on a run ends with a checkpoint and a line that says how to go on.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from ldm.cli.program import leaving_at_once, said_when_stopped
from ldm.config import load_config
from ldm.errors import InputError, escaped, memory_advice
from ldm.training.check import check_sections
from ldm.training.flags import parse
from ldm.training.trainer import GONE, LESS_TO_TRAIN, OLD_KEYS, TRAINER
from ldm.util import allow_module

DEFAULT_SEED = 23  # upstream's


def main(argv: list[str] | None = None) -> None:
    """Parse, check, build, train."""
    options, overrides = parse(sys.argv[1:] if argv is None else argv)
    for name in options.allow_module:
        allow_module(name)
    checkpoint = None
    files = list(options.base)
    if options.resume:
        folder, checkpoint = run_of(options.resume)
        files = [*stored_settings(folder), *files]
    config = load_config(files, overrides)
    if options.finetune_from:
        ckpt_path = {"ckpt_path": options.finetune_from}
        config = _merged(config, {"model": {"params": ckpt_path}})
    flags = {
        name: getattr(options, name)
        for name in (*TRAINER, *OLD_KEYS, *GONE)
        if getattr(options, name) is not None
    }
    config = _merged(config, {"lightning": {"trainer": flags}})
    seed = options.seed if options.seed is not None else config.get("seed")
    config["seed"] = DEFAULT_SEED if seed is None else seed
    if not options.train:
        print(yaml.safe_dump(config, sort_keys=False))
        print("This is the configuration; add --train to train.")
        return
    check_sections(config)

    folder = folder if options.resume else new_folder(options)
    with memory_advice(LESS_TO_TRAIN):
        with leaving_at_once():
            from ldm.training.fit import fit

        with said_when_stopped(lambda: "no step was done"):
            fit(config, options, folder, checkpoint)


def run_of(resume: str) -> tuple[Path, Path | None]:
    """The folder of the run to go on with, and the checkpoint if one is named.

    Raises:
        InputError: there is no such run.
    """
    path = Path(resume)
    if os.path.isfile(path):
        above = path.absolute().parents
        runs = (folder.parent for folder in above if folder.name == "checkpoints")
        return next(runs, above[min(1, len(above) - 1)]), path
    if not os.path.isdir(path):
        raise InputError(f"--resume {escaped(resume)}: there is no such folder; name that of a run")
    return path, None


def stored_settings(folder: Path) -> list[str]:
    """The configurations that a run has kept; every start stores its own, the newest hold.

    Raises:
        InputError: it has kept none.
    """
    stored = sorted((folder / "configs").glob("*.yaml"))
    newest = {path.name.rsplit("-", 1)[1]: str(path) for path in stored if "-" in path.name}
    if not newest:
        raise InputError(f"--resume {escaped(folder)}: there is no YAML in {folder / 'configs'}")
    return list(newest.values())


def new_folder(options: argparse.Namespace) -> Path:
    """Where a new run is kept; the folder is not made yet."""
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    name = options.name or re.sub(r"[^\w.-]", "_", Path(options.base[0]).stem)[:100]
    return Path(options.logdir) / f"{now}_{name}{options.postfix}"


def _merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration with some values changed; where it has no mapping, it stays."""
    merged = dict(config)
    for name, value in changes.items():
        inner = merged.get(name)
        if inner is None:
            inner = {}
        if isinstance(value, dict) and isinstance(inner, dict):
            merged[name] = _merged(inner, value)
        elif not isinstance(value, dict):
            merged[name] = value
    return merged
