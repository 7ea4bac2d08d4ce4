import io

import pytest

from ldm.cli import txt2img
from ldm.cli.drawing import Progress, duration, how_to_go_on
from ldm.cli.jobs import Job, check_skip, without_first
from ldm.errors import InputError
from ldm.settings import Settings


class Terminal(io.StringIO):
    def __init__(self, is_one=True):
        super().__init__()
        self.is_one = is_one

    def isatty(self):
        return self.is_one


def lines(n_pictures, seconds_each, is_terminal):
    now = [0.0]
    stream = Terminal(is_terminal)
    progress = Progress(n_pictures, stream, lambda: now[0])
    for _ in range(n_pictures):
        now[0] += seconds_each
        progress.step()
    return stream.getvalue().splitlines()


def test_a_terminal_hears_of_each_picture_and_a_log_now_and_then():
    shown = lines(600, 10, is_terminal=True)
    assert len(shown) == 599
    assert shown[36] == "picture 37 of 600, about 1 h 34 min left"
    shown = lines(600, 10, is_terminal=False)
    assert shown[0] == "picture 3 of 600, about 1 h 40 min left"
    assert len(shown) == 199
    assert lines(1, 100, is_terminal=True) == []


def test_the_steps_of_a_long_run_are_for_terminals():
    assert Progress(1, Terminal(False)).shows_steps
    assert Progress(9, Terminal(True)).shows_steps
    assert not Progress(9, Terminal(False)).shows_steps


def test_durations():
    assert [duration(s) for s in (4, 100, 5000, 90000)] == ["4 s", "2 min", "83 min", "25 h 0 min"]


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ([], "the same command with --skip 2 goes on"),
        (["--skip", "3"], "the same command with --skip 5 goes on"),
        (["--seed", "-1"], "the same command with --seed 99 --skip 2 goes on"),
        (["--fixed_code"], "the same command draws all of them again"),
    ],
)
def test_how_to_go_on(flags, advice):
    args = txt2img.build_parser().parse_args(["--outdir", "o", *flags])
    progress = Progress(9, Terminal())
    progress.n_done = 2
    assert how_to_go_on(progress, 99, args) == f"2 of 9 pictures are in o; {advice}"
    args.skip_save = True
    assert how_to_go_on(progress, 99, args).startswith("2 of 9 pictures are drawn, and not saved; ")


def test_the_rest_of_a_run_has_the_prompts_and_seeds_that_it_would_have_had():
    jobs = [
        Job(Settings(("a", "b"), n_iter=2, seed=5), None),
        Job(Settings("c", n_samples=2), None),
    ]
    everything = [one for job in jobs for batch in job.settings.batches() for one in batch]
    for n in range(6):
        left = without_first(jobs, n)
        assert [one for job in left for batch in job.settings.batches() for one in batch] == (
            everything[n:]
        )
    with pytest.raises(InputError, match="--skip: there are not so many"):
        without_first(jobs, 6)
    with pytest.raises(InputError, match="--skip 1: with --rng upstream"):
        check_skip(txt2img.build_parser().parse_args(["--rng", "upstream", "--skip", "1"]))
