import pytest

from ldm.distributed import Process
from ldm.errors import InputError


def test_groups_are_dealt_out_once_each(monkeypatch):
    sizes = [3, 3, 1]
    shares = [Process(rank, 2).share_numbers(sizes) for rank in (0, 1)]
    assert shares == [[0, 1, 2, 6], [3, 4, 5]]
    assert Process().share_numbers(sizes) == list(range(7))
    assert Process(5, 8).share_numbers(sizes) == []


def test_what_torchrun_says(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Process.from_environment() == Process(0, 1, 0)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Process.from_environment() == Process(3, 4, 1)
    assert Process.from_environment().device("cpu") == "cpu"
    for name, value in (("RANK", "4"), ("RANK", "-1"), ("WORLD_SIZE", "many"), ("RANK", "")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(InputError, match=name):
                Process.from_environment()
