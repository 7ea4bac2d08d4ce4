"""Which checkpoints, LoRAs and embeddings the page offers. Only what is offered can be named."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ldm.checkpoint.load import DEMO, default_checkpoint
from ldm.config import shipped
from ldm.errors import InputError, shown

SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
ADDONS = ("lora", "embeddings", "vae", "controlnet")  # folders below models/ with other things


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
        for folder in _folders()
        for path in _files(folder)
        if demo.resolve() not in path.resolve().parents
        and path.relative_to(folder).parts[0] not in ADDONS
        and not path.stem.endswith(".vae")  # which belongs to the checkpoint beside it
    ]
    if any(demo.glob("*.safetensors")):
        others.append(demo)
    return _named([first, *others], _folders())


def find_addons(kind: str) -> dict[str, Path]:
    """The files of ``models/KIND`` by the names to show, which have no ending.

    Args:
        kind: ``lora``, ``embeddings`` or ``vae``.
    """
    folders = [folder / kind for folder in _folders()]
    files = [path for folder in folders for path in _files(folder)]
    return {name.removesuffix(path.suffix): path for name, path in _named(files, folders).items()}


def offered(kind: str, name: object) -> Path:
    """One of them, by its name.

    Raises:
        InputError: there is none of that name.
    """
    files = find_addons(kind)
    if not isinstance(name, str) or name not in files:
        have = ", ".join(files) or "none yet"
        raise InputError(f"{kind} {shown(name)}: not in models/{kind}, where there are: {have}")
    return files[name]


def _folders() -> list[Path]:
    return list(dict.fromkeys([Path("models").resolve(), shipped("models").resolve()]))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _named(paths: Iterable[Path], folders: list[Path]) -> dict[str, Path]:
    """Paths by their names, each file once, at its first place.

    A name is the path from the folder on, elsewhere the file's own; the whole path where that is
    taken.
    """
    once: dict[Path, Path] = {}
    for path in paths:
        once.setdefault(path.resolve(), path)
    named: dict[str, Path] = {}
    for real, path in once.items():
        inside = [folder for folder in folders if folder in real.parents]
        name = str(real.relative_to(inside[0])) if inside else path.name
        named[str(path) if name in named else name] = path
    return named
