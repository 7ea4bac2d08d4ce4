"""Random command lines, up to where a model would be loaded."""

import argparse
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import ldm.checkpoint.convert
import ldm.pipeline
from ldm.checkpoint import program as convert
from ldm.cli import img2img, inpaint, txt2img
from ldm.evaluation import tome_grid, visualize
from ldm.web import program as webui
from tests.fuzz.fuzzing import Reached, cases, files_below, outcome, told, value

PROGRAMS = {
    **{"txt2img": txt2img, "img2img": img2img, "inpaint": inpaint, "convert": convert},
    **{"tome_grid": tome_grid, "visualize": visualize},
}
GOOD = {  # what a command line often begins with
    "img2img": ["--init-img", "x.png"],
    "inpaint": ["--init-img", "x.png", "--mask", "x_mask.png"],
}
FILES = ["x.png", "x_mask.png", "prompts.txt", "mine.yaml", "model.ckpt", "pipe", ".", "none"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with files of all kinds; loading a model is as far as a program gets."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in ("x.png", "x_mask.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "prompts.txt").write_text('hills\n{"prompt": "the sea", "steps": 9}\n')
    (tmp_path / "mine.yaml").write_text("method: kth\nk: 4\n")
    (tmp_path / "model.ckpt").write_bytes(b"PK\3\4" + bytes(99))

    def reached(*args, **kwargs):
        raise Reached

    monkeypatch.setattr(ldm.pipeline.Pipeline, "from_checkpoint", reached)
    monkeypatch.setattr(ldm.checkpoint.convert, "convert", reached)
    return tmp_path


def command_line(parser: argparse.ArgumentParser, chance: random.Random) -> list[str]:
    """Some of a program's flags, with values that are right, wrong or strange."""
    argv: list[str] = []
    actions = [action for action in parser._actions if action.dest not in ("help", "version")]
    needed = [action for action in actions if action.required and chance.random() < 0.9]
    for action in [*needed, *(chance.choice(actions) for _ in range(chance.randrange(6)))]:
        words = []
        if action.nargs != 0:
            n_words = chance.randrange(1, 4) if action.nargs == "+" else 1
            words = [_word(action, chance) for _ in range(n_words)]
        if not action.option_strings:
            argv += words
        elif len(words) == 1 and chance.random() < 0.6:
            argv.append(f"{chance.choice(action.option_strings)}={words[0]}")
        else:
            argv += [chance.choice(action.option_strings), *words]
    if chance.random() < 0.1:
        argv.insert(chance.randrange(len(argv) + 1), value(chance))
    if any(word in ("--help", "-h", "--version") for word in argv):
        return []  # these end a program by right
    return argv


def _word(action: argparse.Action, chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.25 and action.choices:
        return str(chance.choice(list(action.choices)))
    if kind < 0.5 and (action.type is not None or action.metavar == "N"):
        return chance.choice(["1", "2", "8", "0.5", "64"])
    return chance.choice(FILES) if kind < 0.65 else value(chance)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_command_line_works_or_is_refused_in_one_line(folder, name, caplog):
    program = PROGRAMS[name]
    before = files_below(folder)
    counts: Counter[str] = Counter()
    for number, chance in cases(100):
        argv = GOOD.get(name, []) if chance.random() < 0.7 else []
        argv = argv + command_line(program.build_parser(), chance)
        counts[outcome(lambda argv=argv: program.main(argv), (name, number, argv))] += 1
        caplog.clear()
    told(f"command lines of {name}", counts)
    assert counts["works"]
    assert counts["refused"]
    assert files_below(folder) == before


def test_a_command_line_of_the_page_is_checked_alike(folder):
    counts: Counter[str] = Counter()
    for number, chance in cases(100):
        argv = command_line(webui.build_parser(), chance)

        def check(argv=argv):
            args = webui.options.parse(webui.build_parser(), argv)
            webui.options.wishes(args).check()
            webui.options.model_arguments(args)

        counts[outcome(check, ("webui", number, argv))] += 1
    told("command lines of webui", counts)
    assert counts["works"]
    assert counts["refused"]
