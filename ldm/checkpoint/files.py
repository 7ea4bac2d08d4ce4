"""Reading weight files: one lazy mapping for every format, and nothing in them is executed.

Whatever a file holds passes through one entry: names are short, sizes are those of the file, and a
tensor that is asked for as a weight is one of real floating-point numbers.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.pickles import unpickle
from ldm.errors import InputError, escaped
from ldm.text import read_json

logger = logging.getLogger(__name__)

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")
INDEX = "model.safetensors.index.json"
"""In a folder: which of its files belong together."""
SPLIT_ID = "split_id"
"""Metadata key: files with one value were written together."""
MAX_NAME = 500  # characters
MAX_TENSORS = 100_000
MAX_REPEATED = 64 * 2**20  # bytes by which tensors may be larger than what is stored for them
# The types of weights, as safetensors calls them.
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
NUMBERS = FLOATS | {"I64", "I32", "I16", "int64", "int32", "int16"}
_TORCH_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One stored tensor: what it is, and how to get at it.

    Attributes:
        shape: of the tensor.
        kind: its type in safetensors' spelling, or what makes it no plain tensor: sparse, meta, ...
        read: gives it.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Tensor]


class StateDict(Mapping[str, Tensor]):
    """Name -> tensor, read when asked for; shapes are known without reading any.

    Attributes:
        path: the file or folder.
        entries: name -> Entry.
        metadata: text of the safetensors header, else empty.
    """

    def __init__(self, path: Path, entries: dict[str, Entry], metadata: dict[str, str]) -> None:
        """Hold what a file's header says.

        Raises:
            InputError: there are too many tensors, or a name is too long.
        """
        if len(entries) > MAX_TENSORS:
            raise InputError(f"{path} holds {len(entries)} tensors, and {MAX_TENSORS} is the limit")
        for name in entries:
            if len(name) > MAX_NAME:
                raise InputError(f"{path} is no checkpoint: a name in it is {escaped(name, 60)}")
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

    def report_lost(self, names: Sequence[str]) -> None:
        """Warn of a model's weights that are to come from this file and are not in it."""
        if names:
            logger.warning(
                "%s lacks weights of this model, which stay as they began: %d, such as %s",
                *(escaped(self.path), len(names), names[0]),
            )

    def require_weights(self, names: Iterable[str]) -> None:
        """Stop at tensors that cannot be weights, without reading any.

        Raises:
            InputError: one is not of real floating-point numbers, or not a plain tensor.
        """
        for name in names:
            kind = self.entries[name].kind
            if kind not in FLOATS:
                raise InputError(
                    f"{self.path}: {escaped(name)} is {kind}, and a weight must be of "
                    "floating-point numbers; look for the file in float16 or float32"
                )

    def require_numbers(self, names: Iterable[str]) -> None:
        """Stop at tensors that are not plain tables of numbers of some type.

        Raises:
            InputError: one is sparse, quantised, or has no numbers.
        """
        for name in names:
            kind = self.entries[name].kind
            if not re.fullmatch(r"\w*\d\w*|bool", kind, re.IGNORECASE):
                raise InputError(f"{self.path}: {escaped(name)} is {kind}, not a table of numbers")


def stem_of(path: Path) -> str:
    """A checkpoint's name without its ending; that of a folder has none (``sd1.5``)."""
    return path.name if path.is_dir() else path.stem


def diffusers_config(path: Path) -> dict[str, Any]:
    """What config.json says of the file of diffusers' beside it; empty of other files."""
    for file in (path, path.resolve()):  # links lead home
        config = file.with_name("config.json")
        if file.name.startswith("diffusion_pytorch_model.") and config.is_file():
            return read_json(config)
    return {}


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
    return _open_safetensors(path) if kind == "safetensors" else unpickle(path, kind)


def _kind(path: Path) -> str:
    """The file's format, as of ``_sniff``; InputError where it cannot be read."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{escaped(path)}: its name is no text in UTF-8; rename it") from None
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is a pipe or a device, not a checkpoint file")
        return _sniff(path)
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint {str(path)!r}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{escaped(path)} cannot be read: {reason}") from error


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
    if path.name.endswith(".index.json"):
        raise InputError(f"{path} lists the files beside it; name its folder, {path.parent}")
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
        reason = escaped(f"{error}".removeprefix("Error while deserializing header: "))
        raise InputError(f"{path} is damaged or truncated ({reason}); fetch it again") from error

    def entry(name: str) -> Entry:
        stored = file.get_slice(name)
        return Entry(tuple(stored.get_shape()), stored.get_dtype(), lambda: read(name))

    def read(name: str) -> Tensor:
        try:
            return file.get_tensor(name)
        except (SafetensorError, KeyError, AttributeError) as error:  # a type torch does not have
            raise InputError(f"{path}: {escaped(name)} cannot be read: {escaped(error)}") from error

    names = file.keys()  # the handle is no mapping
    return StateDict(path, {name: entry(name) for name in names}, file.metadata() or {})


# --- folders ----------------------------------------------------------------------------------


def _open_folder(path: Path) -> StateDict:
    """All safetensors files of a folder as one model."""
    if (path / "model_index.json").exists():
        whole = [f.name for f in sorted(path.iterdir()) if f.suffix in SUFFIXES and f.is_file()]
        hint = f"name one of its files, such as {path / whole[0]}" if whole else "give such a file"
        raise InputError(f"{path} is a diffusers folder, not a single checkpoint file; {hint}")
    parts = [open_state_dict(file) for file in sorted(path.glob("*.safetensors"))]
    if not parts:
        found = sorted([*path.iterdir(), *path.glob("checkpoints/*")])  # those of a training run
        others = [str(f.relative_to(path)) for f in found if f.suffix in SUFFIXES]
        hint = f"; name one of its files: {', '.join(others)}" if others else ""
        raise InputError(f"{path} is a folder without .safetensors files{hint}")
    owner: dict[str, str] = {}
    for part in parts:
        for name in part:
            if name in owner:
                raise InputError(
                    f"{path} holds more than one model: {escaped(name)} is in {owner[name]} and in "
                    f"{part.path.name}; name one file"
                )
            owner[name] = part.path.name
    _require_one_split(path, parts, owner)
    unet_last = sorted(parts, key=lambda part: any("diffusion_model." in name for name in part))
    return StateDict(
        path,
        {name: entry for part in parts for name, entry in part.entries.items()},
        {key: value for part in unet_last for key, value in part.metadata.items()},
    )


def _require_one_split(path: Path, parts: list[StateDict], owner: Mapping[str, str]) -> None:
    """Stop at a folder whose files were not written together, or that lacks some."""
    first = parts[0].metadata.get(SPLIT_ID)
    for part in parts:
        if part.metadata.get(SPLIT_ID) != first:
            raise InputError(
                f"{path} holds files of two models: {parts[0].path.name} and {part.path.name} were "
                "not written together; convert the model again"
            )
    if not (path / INDEX).exists():
        return
    index = read_json(path / INDEX, limit=16 * 2**20).get("weight_map")
    if not isinstance(index, dict):
        raise InputError(f"{path / INDEX} has no weight_map, which says what is in which file")
    for name in {**index, **owner}:
        if index.get(name) != owner.get(name):
            said, found = index.get(name, "no file"), owner.get(name, "no file")
            raise InputError(
                f"{path} is not as its {INDEX} says: {escaped(name)} is in {found}, not in "
                f"{escaped(said)}; fetch or convert the model again"
            )


# --- pickles ----------------------------------------------------------------------------------


def _open_pickle(path: Path, kind: str) -> StateDict:
    """The tensors of a pickle."""
    content = unpickle(path, kind).items()
    tensors = {str(n): torch.as_tensor(t) for n, t in content if _is_stored(str(n), t)}
    stored: dict[int, int] = {}
    total = 0
    for tensor in tensors.values():
        if not tensor.is_meta and str(tensor.layout) == "torch.strided":
            storage = tensor.untyped_storage()
            stored[storage.data_ptr()] = max(storage.nbytes(), stored.get(storage.data_ptr(), 0))
            total += tensor.numel() * tensor.element_size()
    if total > 4 * sum(stored.values()) + MAX_REPEATED:
        raise InputError(
            f"{path} is no checkpoint: its tensors repeat {sum(stored.values())} bytes until they "
            f"are {total}"
        )
    entries = {
        name: Entry(tuple(tensor.shape), kind_of(tensor), tensor.detach)
        for name, tensor in tensors.items()
    }
    return StateDict(path, entries, {})


def _is_stored(name: str, value: object) -> bool:
    """Whether an item of a pickle is a tensor, or a plain number below a layer, such as alpha."""
    is_number = isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
    return isinstance(value, Tensor) or (is_number and "." in name)


def kind_of(tensor: Tensor) -> str:
    """The type of a tensor in memory, in the words of ``Entry.kind``."""
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_meta:
        return "meta (without numbers)"
    if str(tensor.layout) != "torch.strided":
        return str(tensor.layout).removeprefix("torch.")
    name = str(tensor.dtype).removeprefix("torch.")
    return _TORCH_NAMES.get(name, name)
