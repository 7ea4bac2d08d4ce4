from collections.abc import Callable
from functools import partial

import pytest


@pytest.fixture
def run(request: pytest.FixtureRequest, run_program: Callable[..., int]) -> Callable[..., int]:
    """Run the module's PROGRAM with arguments; the result is its exit code."""
    return partial(run_program, request.module.PROGRAM)


@pytest.fixture
def refused(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run it with arguments that it refuses; the result is the one line that says why."""

    def refuse(*argv: object) -> str:
        capsys.readouterr()  # what earlier runs said
        assert run(*argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return refuse
