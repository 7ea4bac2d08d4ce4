"""Reading what ``torch.save`` wrote, without executing anything in it."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.errors import InputError, escaped, is_out_of_memory


class _Inert:
    """Takes the place of a class or function named in a pickle, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Entries(_Inert):
    """Takes the place of a dictionary of some other class, as torch fills in plain ones alone."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return {}


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
DICTIONARIES = [
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "collections.defaultdict",
]
_PROTOCOL = 2  # the one that torch.save writes, and the newest that its restricted unpickler reads


def _stubs() -> list[Any]:
    """A class for each tolerated name, such that torch finds it by that name."""
    bases: dict[str, type[_Inert]] = dict.fromkeys(TOLERATED, _Inert)
    bases |= dict.fromkeys(DICTIONARIES, _Entries)
    bases["torch.nn.modules.container.ParameterDict"] = StoredParameters
    split = ((*name.rpartition("."), base) for name, base in bases.items())
    return [type(name, (base,), {"__module__": module}) for module, _, name, base in split]


def unpickle(path: Path, kind: str) -> Mapping[Any, Any]:
    """A file of ``torch.save``, through torch's restricted unpickler; mapped, not read.

    Args:
        path: the file.
        kind: ``zip``, or ``pickle`` as torch before 1.6 wrote it.

    Returns:
        The innermost ``state_dict``, or all that is there.

    Raises:
        InputError: it is damaged, asks for code, or holds no dictionary.
    """
    if path.suffix == ".safetensors":  # torch goes by the name there
        raise InputError(f"{path} is a pickle in spite of its name; rename it to .ckpt")
    damaged = f"{path} is not a checkpoint, or it is damaged or truncated"
    protocol = 0
    try:
        protocol = _protocol(path, kind)
        if kind == "zip" and _is_compressed(path):
            raise InputError(f"{path} is a compressed archive, not a checkpoint; unpack it first")
        with torch.serialization.safe_globals(_stubs()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols and archives of other kinds
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if is_out_of_memory(error):
            raise
        foreign = re.search(r"(?:GLOBAL|module) ([\w.]+)", str(error))
        if foreign:
            raise InputError(
                f"{path} asks for the Python object '{escaped(foreign[1])}', which no weights "
                "need; it was not executed. Look for a .safetensors file of this model"
            ) from error
        if protocol > _PROTOCOL:
            raise InputError(
                f"{path} is a pickle of protocol {protocol}, and up to {_PROTOCOL} is read; save "
                "it again with torch.save and no pickle_protocol, or look for a .safetensors file "
                "of this model"
            ) from error
        raise InputError(damaged) from error
    for _ in range(4):  # Lightning wraps once, some exporters twice; one that holds itself ends
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _protocol(path: Path, kind: str) -> int:
    """The protocol of a pickle by its first two bytes; 0 where it has none."""
    if kind == "zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            head = archive.open(names[0]).read(2) if names else b""
    else:
        with path.open("rb") as file:
            head = file.read(2)
    return head[1] if head[:1] == b"\x80" else 0


def _is_compressed(path: Path) -> bool:
    """Whether a small archive can become a large one; torch itself stores only."""
    with zipfile.ZipFile(path) as archive:
        return any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist())
