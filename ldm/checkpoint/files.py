"""Reading weight files: one lazy mapping for every format, and nothing in them is executed."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its shape, and how to get at it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class StateDict(Mapping[str, Tensor]):
    """Name -> tensor, read when asked for; shapes are known without reading any.

    Attributes:
        path: the file or folder.
        entries: name -> Entry.
        metadata: text of the safetensors header, else empty.
    """

    def __init__(self, path: Path, entries: dict[str, Entry], metadata: dict[str, str]) -> None:
        """Hold what a file's header says."""
        self.path = path
        self.entries = entries
        self.metadata = metadata

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor; it may share memory with the file's pages."""
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        """Names, in the file's order."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.entries)


def open_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Open a checkpoint file, or a folder of safetensors files that make up one model.

    The content decides about the format, not the suffix.

    Raises:
        InputError: there is nothing to load there; the message says what is there instead.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    kind = _kind(path)
    state_dict = _open_safetensors(path) if kind == "safetensors" else _open_pickle(path, kind)
    if not state_dict:
        raise InputError(f"{path} holds no tensors")
    return state_dict


def read_content(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """All that a small weight file holds, as it is nested in there.

    Raises:
        InputError: as for ``open_state_dict``.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    kind = _kind(path)
    return _open_safetensors(path) if kind == "safetensors" else _unpickle(path, kind)


def _kind(path: Path) -> str:
    """The file's format, as of ``_sniff``; InputError where it cannot be read."""
    if not path.exists():
        raise InputError(f"there is no checkpoint {str(path)!r}")
    try:
        return _sniff(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _sniff(path: Path) -> str:
    """``safetensors``, ``zip`` or ``pickle`` (torch before 1.6)."""
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise InputError(f"{path} is empty")
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path} is truncated: its end is missing; fetch it again")
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull'")
    if head.lstrip()[:1] == b"<":
        raise InputError(f"{path} is a web page, not a checkpoint; the download went wrong")
    if min(head) >= ord("\t"):
        raise InputError(f"{path} is a text file, not a checkpoint")
    raise InputError(f"{path} is not a checkpoint, or it is damaged")


# --- safetensors ------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> StateDict:
    """Names and shapes from the header; tensors are views of the mapped file."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        reason = f"{error}".removeprefix("Error while deserializing header: ")
        raise InputError(f"{path} is damaged or truncated ({reason}); fetch it again") from error

    def entry(name: str) -> Entry:
        return Entry(tuple(file.get_slice(name).get_shape()), lambda: file.get_tensor(name))

    names = file.keys()  # the handle is no mapping
    return StateDict(path, {name: entry(name) for name in names}, file.metadata() or {})


def _open_folder(path: Path) -> StateDict:
    """All safetensors files of a folder as one model."""
    if (path / "model_index.json").exists():
        raise InputError(f"{path} is a diffusers folder; give a single checkpoint file instead")
    parts = [open_state_dict(file) for file in sorted(path.glob("*.safetensors"))]
    if not parts:
        others = sorted(f.name for f in path.iterdir() if f.suffix in SUFFIXES)
        hint = f"; name one of its files: {', '.join(others)}" if others else ""
        raise InputError(f"{path} is a folder without .safetensors files{hint}")
    owner: dict[str, Path] = {}
    for part in parts:
        for name in part:
            if name in owner:
                raise InputError(
                    f"{path} holds more than one model: {name} is in {owner[name].name} and in "
                    f"{part.path.name}; name one file"
                )
            owner[name] = part.path
    return StateDict(
        path,
        {name: entry for part in parts for name, entry in part.entries.items()},
        {key: value for part in parts for key, value in part.metadata.items()},
    )


# --- pickles ----------------------------------------------------------------------------------


class _Inert:
    """Takes the place of a class or function named in a pickle, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class StoredParameters(_Inert):
    """Takes the place of torch's ParameterDict: its parameters, and nothing that acts."""

    parameters: Mapping[str, Any]

    def __setstate__(self, state: Any) -> None:
        """Keep what the pickle says of the parameters."""
        self.parameters = state["_parameters"]


# What training programs leave in their files besides tensors. Nothing of it is needed, so none of
# these is ever imported or called: each name stands for an empty class of its own.
TOLERATED = [
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.StringNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.BooleanNode",
    "collections.defaultdict",
    "typing.Any",
    "builtins.dict",
    "builtins.list",
    "builtins.int",
    "builtins.float",
    "builtins.str",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
]


def _stubs() -> list[Any]:
    """A class for each tolerated name, such that torch finds it by that name."""
    bases: dict[str, type[_Inert]] = dict.fromkeys(TOLERATED, _Inert)
    bases["torch.nn.modules.container.ParameterDict"] = StoredParameters
    split = ((*name.rpartition("."), base) for name, base in bases.items())
    return [type(name, (base,), {"__module__": module}) for module, _, name, base in split]


def _unpickle(path: Path, kind: str) -> Mapping[str, Any]:
    """A file of ``torch.save``, through torch's restricted unpickler; mapped, not read."""
    if path.suffix == ".safetensors":  # torch goes by the name there
        raise InputError(f"{path} is a pickle in spite of its name; rename it to .ckpt")
    try:
        with torch.serialization.safe_globals(_stubs()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols and archives of other kinds
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except Exception as error:  # a damaged pickle can raise anything
        foreign = re.search(r"(?:GLOBAL|module) ([\w.]+)", str(error))
        if foreign:
            raise InputError(
                f"{path} asks for the Python object {foreign[1]!r}, which no weights need; it was "
                "not executed. Look for a .safetensors file of this model"
            ) from error
        raise InputError(f"{path} is not a checkpoint, or it is damaged or truncated") from error
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # Lightning wraps once, some exporters twice
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _open_pickle(path: Path, kind: str) -> StateDict:
    """The tensors of a pickle."""

    def entry(tensor: Tensor) -> Entry:
        return Entry(tuple(tensor.shape), tensor.detach)

    content = _unpickle(path, kind).items()
    entries = {str(n): entry(t) for n, t in content if isinstance(t, Tensor)}
    return StateDict(path, entries, {})
