import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ldm import device
from ldm.errors import InputError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(
    ("has_cuda", "has_mps", "chosen"),
    [(True, False, "cuda"), (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_there_is(monkeypatch, has_cuda, has_mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(has_cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert device.choose_device().type == chosen


def test_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(InputError, match="device cuda:1: torch sees 1 CUDA devices"):
        device.choose_device("cuda:1")
    with pytest.raises(InputError, match="device mps: torch sees no Apple GPU"):
        device.choose_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device cuda: torch sees 0 CUDA devices; try cpu"):
        device.choose_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "cpu:1", "", torch.device("meta")])
def test_a_device_that_is_none_is_named(name):
    with pytest.raises(InputError, match=f"device {name}: allowed is auto, cpu, mps, cuda or"):
        device.choose_device(name)


@pytest.mark.parametrize("name", ["half", "nn", "load", "", torch.int8, None])
def test_a_type_that_is_none_is_named(name):
    with pytest.raises(InputError, match=r"dtype .*: allowed is auto, float32, bfloat16, float16"):
        device.choose_dtype(name, CUDA)


def test_torchs_own_device_and_type_are_taken():
    assert device.choose_device(torch.device("cpu", 0)) == torch.device("cpu", 0)
    assert device.choose_dtype(torch.bfloat16, CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("where", "flags", "dtype"),
    [
        (CUDA, {"amx_bf16"}, torch.float16),
        (MPS, {"amx_bf16"}, torch.float32),
        (CPU, {"fpu", "amx_bf16"}, torch.bfloat16),
        (CPU, {"avx512_bf16"}, torch.bfloat16),
        (CPU, {"avx512f", "avx2"}, torch.float32),
        (CPU, set(), torch.float32),
    ],
)
def test_auto_takes_the_type_that_is_fast_there(monkeypatch, where, flags, dtype):
    monkeypatch.setattr(device, "processor_says", {"flags": " ".join(flags)}.get)
    assert device.choose_dtype("auto", where) == dtype
    assert device.choose_dtype("float32", where) == torch.float32


FIRST, SECOND = (torch.device("cuda", i) for i in range(2))


def test_random_states_are_those_of_the_device_that_is_meant(monkeypatch):
    states = {0: torch.tensor(10), 1: torch.tensor(11)}

    class Cuda:
        @staticmethod
        def get_rng_state(device=FIRST):
            return states[device.index]

        @staticmethod
        def set_rng_state(state, device=FIRST):
            states[device.index] = state

    monkeypatch.setattr(torch, "get_device_module", lambda _: Cuda)
    found = device.random_states(SECOND)
    assert found[1] == 11
    states[1] = torch.tensor(12)
    device.restore_random_states(SECOND, found)
    assert (states[0], states[1]) == (10, 11)


@pytest.mark.parametrize(("function", "is_new"), [("manual_seed", True), ("get_rng_state", False)])
def test_a_stream_that_fails_lets_others_go_on(monkeypatch, function, is_new):
    def fail(*_):
        raise RuntimeError("out of order")

    stream = device.NoiseStream(0, CPU)
    monkeypatch.setattr(torch, function, fail)
    with pytest.raises(RuntimeError, match="out of order"), stream:
        assert not is_new
    monkeypatch.undo()

    def draw():
        with device.NoiseStream(1, CPU):
            drawn.append(torch.rand(1).item())

    drawn: list[float] = []
    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    thread.join(10)
    assert drawn


def test_float16_needs_a_gpu():
    assert device.choose_dtype("float16", CUDA) == torch.float16
    with pytest.raises(InputError, match="use bfloat16 or float32"):
        device.choose_dtype("float16", CPU)


@pytest.mark.parametrize(
    ("where", "dtype", "is_last"),
    [
        (CPU, torch.float32, True),
        (CPU, torch.bfloat16, True),
        (CUDA, torch.float32, False),
        (CUDA, torch.float16, True),
        (MPS, torch.float32, False),
        (MPS, torch.float16, False),
    ],
)
def test_layout_of_convolutions(where, dtype, is_last):
    wanted = torch.channels_last if is_last else torch.contiguous_format
    assert device.memory_format(dtype, where) == wanted


MEMORY = """
import re, torch
from pathlib import Path
from ldm.device import returned_memory, reused_memory

def resident():
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\\s*(\\d+) kB", status)[1]) / 1024

def use():
    torch.ones(64 * 2**20, dtype=torch.uint8)

use()
before = resident()
with reused_memory():
    use()
    print(resident() - before)
    with returned_memory():
        use()
        print(resident() - before)
    use()
    print(resident() - before)
print(resident() - before)
"""


@pytest.mark.skipif(not device._has_glibc(), reason="another C library")
def test_freed_memory_is_kept_meanwhile_and_given_back():
    """In a process of its own, where the heap has no room yet; in MiB."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    kept, returned, kept_again, afterwards = map(float, done.stdout.split())
    assert min(kept, kept_again) > 48
    assert max(returned, afterwards) < 32


HOST = """
import ctypes, os, torch
from ldm.device import _MallocInfo, reused_memory
library = ctypes.CDLL(None)
library.mallinfo2.restype = _MallocInfo

def is_mapped():
    before = library.mallinfo2().hblks
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    return library.mallinfo2().hblks > before

if "HOST" in os.environ:
    library.mallopt(-4, 0)
print(int(is_mapped()))
with reused_memory(torch.device("meta")):
    print(int(is_mapped()))
with reused_memory(torch.device("cpu")):
    print(int(is_mapped()))
print(int(is_mapped()))
"""


@pytest.mark.skipif(
    not device._has_glibc() or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="another C library, or an old one",
)
@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "1 1 0 1"), ({"HOST": "1"}, "0 0 0 0"), ({"MALLOC_MMAP_MAX_": "0"}, "0 0 0 0")],
)
def test_what_the_host_program_had_set_is_left(environment, expected):
    """Whether large blocks come from the system: elsewhere than on the processor, in, and after."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", HOST],
        capture_output=True,
        text=True,
        cwd=root,
        check=True,
        env={**os.environ, **environment},
    )
    assert done.stdout.split() == expected.split()
