"""Hostile training configurations and command lines: each trains, or ends with one line.

The model is tiny, and training itself is left out; see `fuzzing` for how to try more.
"""

from __future__ import annotations

import copy
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml

from ldm.errors import InputError
from ldm.training.flags import build_parser
from ldm.training.run import main
from tests.fuzz.fuzzing import cases, told
from tests.training.toy import diffusion_config, pictures, toy_config

USUAL = 12  # cases of each kind
SECONDS = 60  # for one case
pytestmark = pytest.mark.filterwarnings("ignore")
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-30, 1e30, float("nan"), float("inf"), 2**31,
    2**63, 10**40, -5, 4096, 65537, "", " ", "0", "-1", "nan", "null", "a", "a.b", "../..", "\0",
    "/etc/passwd", "/dev/zero", "\u2028", "\x1b[2J", "x" * 5000, "${model}", "${oc.env:HOME}",
    "${model.params.embed_dim}", "é", "!!python/object/apply:os.system ['true']", "os.system",
    "builtins.exec", "torch.load", "torch.nn.Linear", "torch.nn.Identity", "torch.optim.Adam",
    "subprocess.Popen", "main.X", "ldm.data.folder.FolderPictures", "ldm.util.shown",
    "ldm.models.autoencoder.AutoencoderKL", "pytorch_lightning.Trainer", "__is_first_stage__",
    "pytorch_lightning.callbacks.EarlyStopping", [], [0], [1, 2, 3], ["a"], [None], [[]], {},
    {"a": 1}, {1: 2}, {"target": "os.system"}, {"target": "torch.nn.Identity", "params": {}},
    {"params": {}}, {"target": None},
]  # fmt: skip


class TooSlow(Exception):
    """A case took longer than it may."""


def paths(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to each value."""
    inner = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(inner):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*path, key))


def mutate(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A configuration with up to three values changed, removed, added or copied elsewhere."""
    config = copy.deepcopy(config)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(paths(config))
        if not found:
            return config
        *parents, last = rng.choice(found)
        node: Any = config
        for key in parents:
            node = node[key]
        how = rng.random()
        value = node[last]
        if how < 0.3 and isinstance(value, int | float):
            near = (value + 1, value - 1, value * 2, value / 3, float(value), str(value), -value)
            node[last] = rng.choice(near)
        elif how < 0.6:
            node[last] = copy.deepcopy(rng.choice(VALUES))
        elif how < 0.75:
            del node[last]
        elif how < 0.9 and isinstance(node, dict):
            node[rng.choice(("x", f"{last}s", "target", "params", 7))] = rng.choice(VALUES)
        else:
            other: Any = config
            for key in rng.choice(found):
                if not isinstance(other, dict | list) or (
                    isinstance(other, dict) and key not in other
                ):
                    break
                try:
                    other = other[key]
                except (IndexError, KeyError):
                    break
            node[last] = copy.deepcopy(other)
    return config


def run(arguments: list[str], logs: Path) -> str:
    """Whether it works or is refused; anything else fails."""

    def too_slow(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        main([*arguments, "--logdir", str(logs)])
    except InputError as error:
        line = str(error)
        assert line, arguments
        assert all(c.isprintable() for c in line), repr(line)
        assert len(line) < 1500, line
        assert not list(logs.glob("*")), f"{line}: left a folder"
        return "refused"
    except SystemExit as end:  # --help
        if end.code:
            raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    for folder in logs.glob("*"):
        folder.rename(logs.parent / f"done-{folder.name}-{random.random()}")
    return "works"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pictures; training itself is left out."""
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: None)
    monkeypatch.setattr(pl.Trainer, "test", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    return pictures(tmp_path / "pictures")


@pytest.mark.parametrize("kind", ["first stage", "diffusion"])
def test_configurations(kind: str, data: Path, tmp_path: Path) -> None:
    config = toy_config(data) if kind == "first stage" else diffusion_config(data)
    config["lightning"]["callbacks"] = {
        "image_logger": {"target": "main.ImageLogger", "params": {"log_images_kwargs": {"N": 2}}}
    }
    counts: Counter[str] = Counter()
    for case, rng in cases(USUAL):
        text = yaml.dump(mutate(config, rng))
        if rng.random() < 0.1:  # bytes, too
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice("\t:{}[]&*!|>%@\x07\ud800é") + text[place + 1 :]
        path = tmp_path / "case.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            counts[run(["--base", str(path), "--train"], tmp_path / "logs")] += 1
        except BaseException as error:
            error.add_note(f"case {case}:\n{text}")
            raise
    told(f"training configurations ({kind})", counts)


def test_command_lines(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.dump(toy_config(data)))
    actions = [a for a in build_parser()._actions if a.option_strings]
    flags = [flag for a in actions for flag in a.option_strings if a.dest != "logdir"]
    keys = [".".join(map(str, keys)) for keys in paths(toy_config(data))]
    counts: Counter[str] = Counter()
    for case, rng in cases(USUAL):
        arguments = ["--base", str(path)]
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = str(rng.choice(VALUES)).replace("\0", "\\0")
            how = rng.random()
            if how < 0.45:
                arguments += [rng.choice(flags), value]
            elif how < 0.6:
                arguments.append(rng.choice(flags))
            elif how < 0.7:
                arguments.append(f"{rng.choice(flags)}={value}")
            elif how < 0.95:
                arguments.append(f"{rng.choice(keys)}={value}")
            else:
                arguments.append(value)
        try:
            counts[run([*arguments, "--train"], tmp_path / "logs")] += 1
        except BaseException as error:
            error.add_note(f"case {case}: {arguments}")
            raise
    told("training command lines", counts)
