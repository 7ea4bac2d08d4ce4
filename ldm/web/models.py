"""Which checkpoints the page offers."""

from __future__ import annotations

from pathlib import Path

from ldm.checkpoint.load import DEMO, default_checkpoint
from ldm.config import shipped

SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth")


def find_models(ckpt: str | None = None) -> dict[str, Path]:
    """Checkpoints by the names to show: first the one to begin with, then those in ``models/``.

    They are looked for below the working folder and the project, without looking into them.

    Args:
        ckpt: the one to begin with; None: the scripts' default.
    """
    demo = shipped(DEMO)
    folders = list(dict.fromkeys([Path("models").resolve(), shipped("models").resolve()]))
    found = [Path(ckpt) if ckpt is not None else default_checkpoint()[0]]
    for folder in folders:
        files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
        found += [path for path in files if demo.resolve() not in path.resolve().parents]
    if any(demo.glob("*.safetensors")):
        found.append(demo)
    models: dict[str, Path] = {}
    for path in {path.resolve(): path for path in reversed(found)}.values():
        models[_name(path.resolve(), folders, models)] = path
    return dict(reversed(models.items()))


def _name(path: Path, folders: list[Path], taken: dict[str, Path]) -> str:
    """A path as the page shows it: from the folder of models on, elsewhere the file's name."""
    inside = [folder for folder in folders if folder in path.parents]
    name = str(path.relative_to(inside[0])) if inside else path.name
    return str(path) if name in taken else name
