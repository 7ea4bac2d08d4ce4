import re
from functools import partial

import pytest

from scripts import compare_samplers


@pytest.fixture
def run(run_program):
    return partial(run_program, compare_samplers)


def test_more_steps_come_nearer(run, tiny_checkpoint, capsys):
    argv = ["--ckpt", tiny_checkpoint, "--device", "cpu", "--dtype", "float32", "--prompt", "a"]
    argv += ["--n_pictures", 3, "--n_samples", 2, "--reference", 40, "--steps", "2,8,40"]
    assert run(*argv, "--samplers", "ddim,plms") == 0
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0] == "| steps | 2 | 8 | 40 |"
    ddim, plms = ([float(x) for x in re.findall(r"\| (\d[\d.]*) \[", line)] for line in lines[2:])
    assert ddim[0] < ddim[1] < ddim[2] == 100
    assert plms[0] < plms[1] < plms[2] < 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samplers", "euler_a"], "--samplers euler_a: "),
        (["--steps", "0"], "--steps 0: allowed are whole numbers above 0"),
        (["--n_pictures", "0"], "--n_pictures 0: allowed is at least 1"),
    ],
)
def test_what_cannot_be_done_is_said(run, capsys, flags, message):
    assert run(*flags) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
