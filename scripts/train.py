"""Train a model; see ldm/training/run.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli.flags import run
from ldm.training.run import main

if __name__ == "__main__":
    run(main)
