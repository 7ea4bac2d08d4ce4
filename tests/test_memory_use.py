"""Memory of whole runs with models of the real size; the weights are zeros."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden_util import load_golden_keys
from tests.tiny_models import write_header

PROGRAM = """
import re, sys, threading, time
from pathlib import Path
from ldm.pipeline import Pipeline

peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(re.search(r"RssAnon:\\s*(\\d+) kB", status)[1]))
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
pipeline = Pipeline.from_checkpoint(sys.argv[1], device="cpu", dtype="bfloat16")
[picture] = pipeline.txt2img("a house", H=int(sys.argv[2]), W=int(sys.argv[2]), steps=1)
assert picture.settings["dtype"] == "bfloat16"
print(peak * 1024 / 1e9)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
@pytest.mark.parametrize(("size", "limit"), [(512, 3.5)])
def test_anonymous_memory_of_sd1_in_bfloat16(size: int, limit: float, tmp_path: Path) -> None:
    """Loading, text encoder, guided U-Net and decoder; in GB."""
    checkpoint = write_header(tmp_path / "sd1.safetensors", load_golden_keys("sd1"))
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), str(size)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    peak = float(done.stdout.splitlines()[-1])
    print(f"{peak:.2f} GB")
    assert 2.1 < peak < limit  # the weights alone are 2.1 GB


CACHES = """
import sys
from ldm.cli.program import run_program

sys.modules["many_sizes"] = sys.modules["__main__"]

def main():
    import os
    assert os.environ["LRU_CACHE_CAPACITY"] == "128"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"  # the user's own

run_program("many_sizes")
"""


def test_programs_bound_the_caches_that_torch_keeps_for_each_size() -> None:
    environment = {"PATH": "", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", CACHES]
    subprocess.run(command, cwd=root, env=environment, check=True)
