"""The recipe of the demo model, and what must be right before it is followed."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ldm.cli.options import check_writable
from ldm.config import load_config
from ldm.errors import InputError, escaped
from ldm.training.check import check_arguments, pairs

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FOLDER = "configs/demo"
_OWN_FILE = re.compile(r"(first_stage|text|unet)(-\d+)?\.safetensors")


@dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
        name: of its folder and weights.
        files: of ``configs/demo``, merged in order.
        share: of the whole time.
        export: which weights it hands on (see ldm.demo.export).
        carries: earlier stages whose weights are handed on with them.
        cuda: changes of the configuration on a GPU, as ``key.path=value``.
        processes: how many share a training step on a CPU, each on its part of the cores.
        levels_latents: the scale factor that its latents are made for; 0 leaves them as they are.
        starts_from: an earlier stage, whose weights are loaded at the beginning.
    """

    name: str
    files: Sequence[str]
    share: float
    export: str
    carries: Sequence[str] = ()
    cuda: Sequence[str] = ()
    processes: int = 1
    levels_latents: float = 0.0
    starts_from: str | None = None


@dataclass(frozen=True)
class Recipe:
    """All stages in order.

    Attributes:
        hours: of training in all, on a CPU.
        hours_cuda: likewise on a GPU.
        disk_gb: what the state folder needs, in 10^9 bytes.
        stages: in order.
        nice: how far training on a CPU steps back behind other programs, 0 to 19.
        check: flags of scripts/check_demo.py, once all is trained; without any it is not run.
        pictures: flags of scripts/txt2img.py, likewise.
        log: file of the state folder that says what was done.
        writes_model: whether the stages make one model folder in the end; without, their weights
            are all that comes of them.
        overrides: changes for ``all`` stages or for one by its name, as ``key.path=value``.
    """

    hours: float
    hours_cuda: float
    disk_gb: float
    stages: Sequence[Stage]
    nice: int = 0
    check: Sequence[str] = ()
    pictures: Sequence[str] = ()
    log: str = "made.json"
    writes_model: bool = True
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | os.PathLike[str] = f"{FOLDER}/recipe.yaml") -> Recipe:
        """Read a recipe's YAML.

        Raises:
            InputError: an entry is missing, unknown, or not of its kind.
        """
        content = load_config(path)
        where = f"{path} is no recipe: "
        stages = []
        for name, entry in pairs(content.pop("stages", None), f"{where}stages").items():
            entry = {"name": name, **pairs(entry, f"{where}{name}")}
            check_arguments(Stage, entry, f"{where}{name}")
            stages.append(Stage(**entry))
        content["stages"] = stages
        check_arguments(cls, content, f"{where}its settings")
        return cls(**content)


def check_hours(hours: float) -> float:
    """The number of hours, if it is one to train for.

    Raises:
        InputError: it is not finite or below a minute.
    """
    if not math.isfinite(hours) or hours < 1 / 60:
        raise InputError(f"--hours {hours:g}: give at least a minute, such as 0.02")
    return hours


def check_output(output: str, flag: str) -> None:
    """See whether a model folder can be written, before hours of training.

    Args:
        output: the folder, whose weights are replaced.
        flag: that names it.

    Raises:
        InputError: it cannot be written to, or holds weights of others.
    """
    check_writable(output, flag)
    for file in Path(output).glob("*.safetensors"):
        if not _OWN_FILE.fullmatch(file.name):
            raise InputError(
                f"{flag} {escaped(output)} holds other weights, too ({escaped(file.name)}), which "
                "would be removed; name another folder"
            )


def check_state(state: Path, disk_gb: float) -> None:
    """Make the state folder and see whether it can hold everything.

    Raises:
        InputError: it cannot be written to, or the disk has too little room.
    """
    try:
        state.mkdir(parents=True, exist_ok=True)
        probe = state / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--state {state} cannot be written to: {error.strerror}") from error
    used = sum(path.stat().st_blocks * 512 for path in state.rglob("*") if path.is_file())
    missing = disk_gb * 1e9 - used - shutil.disk_usage(state).free
    if missing > 0:
        raise InputError(
            f"--state {state}: needs {disk_gb:g} GB, {missing / 1e9:.1f} GB more than its disk has "
            "free; make room or name a folder on another disk"
        )


@contextmanager
def alone(state: Path) -> Iterator[IO[str]]:
    """Hold the state folder; a training run that outlives this process goes on holding it.

    Raises:
        InputError: another process has it.
    """
    with (state / ".lock").open("a+") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"--state {state} is in use by another run; let it end") from error
        os.set_inheritable(file.fileno(), True)
        yield file
