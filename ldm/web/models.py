"""Which checkpoints the page offers. Only what is offered can be named."""

from __future__ import annotations

from pathlib import Path

from ldm.addons import KINDS, files_below, folders, named
from ldm.checkpoint.load import DEMO, default_checkpoint
from ldm.config import shipped


def find_models(ckpt: str | None = None) -> dict[str, Path]:
    """Checkpoints by the names to show: first the one to begin with, then those in ``models/``.

    They are looked for below the working folder and the project, without looking into them.

    Args:
        ckpt: the one to begin with; None: the scripts' default.
    """
    demo = shipped(DEMO)
    first = Path(ckpt) if ckpt is not None else default_checkpoint()[0]
    others = [
        path
        for folder in folders()
        for path in files_below(folder)
        if demo.resolve() not in path.resolve().parents
        and path.relative_to(folder).parts[0] not in KINDS
        and not path.stem.endswith(".vae")  # which belongs to the checkpoint beside it
    ]
    if any(demo.glob("*.safetensors")):
        others.append(demo)
    return named([first, *others], folders())
