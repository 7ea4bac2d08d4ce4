"""Fixtures of all tests: known randomness, no network, a small checkpoint."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

from ldm.cli.program import run as run_main
from tests.tiny_models import tiny_config, tiny_weights, write_safetensors


@pytest.fixture(autouse=True)
def _known_randomness() -> None:
    """Every test starts from the same state of the global generators."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what this is about
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _can_be_interrupted() -> None:
    """A shell starts background jobs with Ctrl+C ignored, and what tests start would inherit it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def terminal() -> Iterator[None]:
    """A terminal that can close: with nohup, which tests may be started with, it says nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting to anything but a local socket fails, unless the test is marked ``network``."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", refuse)


def _write_checkpoint(folder: Path, **kind: object) -> Path:
    config = tiny_config(**kind)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return write_safetensors(folder / "tiny.safetensors", tiny_weights(config))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, for pictures of 16 x 16, with its YAML beside it."""
    return _write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_inpainting_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Likewise, with the 9 input channels of an inpainting model."""
    return _write_checkpoint(tmp_path_factory.mktemp("tiny_inpainting"), inpainting=True)


@pytest.fixture
def run_program() -> Callable[..., int]:
    """Run a script as its process would, but in this one; the result is the exit code."""

    def run(program: ModuleType, *argv: object) -> int:
        try:
            run_main(lambda: program.main([str(argument) for argument in argv]))
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run
