"""The console commands that ``pip install`` makes; scripts/ has doors to the same programs."""

from __future__ import annotations

from ldm.cli.program import run_program


def txt2img() -> None:
    """``sd-txt2img``."""
    run_program("ldm.cli.txt2img")


def img2img() -> None:
    """``sd-img2img``."""
    run_program("ldm.cli.img2img")


def inpaint() -> None:
    """``sd-inpaint``."""
    run_program("ldm.cli.inpaint")


def webui() -> None:
    """``sd-webui``."""
    run_program("ldm.web.program")


def convert() -> None:
    """``sd-convert``."""
    run_program("ldm.checkpoint.program")


def train() -> None:
    """``sd-train``."""
    run_program("ldm.training.run")


def benchmark() -> None:
    """``sd-benchmark``."""
    run_program("ldm.evaluation.benchmark.program")
