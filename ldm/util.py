"""What every part needs: building objects from configuration, and files that appear whole.

A configuration's ``target`` is a dotted path to a class, ``params`` its arguments.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import re
import secrets
import shutil
import sys
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ldm.errors import SUPPORTED, InputError, escaped, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Paths that published configurations name, and where their classes are now.
_MODULES = {
    "ldm.data.rendered": "ldm.demo.rendered",
    "ldm.data.scenes": "ldm.demo.scenes",
    "ldm.models.captions": "ldm.demo.captions",
    "ldm.evaluation.attributes": "ldm.demo.classifier",
    "ldm.evaluation.demo": "ldm.demo.check",
}
_TRAINING = {
    "DataModuleFromConfig": "ldm.training.data.DataModuleFromConfig",
    "WrappedDataset": "ldm.training.data.WrappedDataset",
    "ImageLogger": "ldm.training.images.ImageLogger",
    "SetupCallback": "ldm.training.callbacks.SetupCallback",
    "CUDACallback": "ldm.training.callbacks.CUDACallback",
}
ALIASES = {
    f"{module}.{name}": path
    for name, path in _TRAINING.items()
    for module in ("main", "ldm.training", "ldm.training.lightning")
} | {
    "main.LearningRateMonitor": "pytorch_lightning.callbacks.LearningRateMonitor",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": (
        "ldm.models.diffusion.ddpm.LatentDiffusion"
    ),
}
# What published configurations name whose models cannot be drawn with here.
_OTHER_MODELS = {
    f"ldm.models.diffusion.ddpm.{name}": kind
    for name, kind in {
        "LatentDepth2ImageDiffusion": "a Stable Diffusion 2 depth model",
        "LatentUpscaleDiffusion": "a Stable Diffusion x4 upscaler",
        "LatentUpscaleFinetuneDiffusion": "a Stable Diffusion x4 upscaler",
        "ImageEmbeddingConditionedLatentDiffusion": "a Stable unCLIP model",
    }.items()
} | {"sgm.models.diffusion.DiffusionEngine": "an SDXL model"}
WORD_LISTS = ("ldm.demo.scenes.VOCABULARY",)
"""What ``defaults.vocabulary`` may name."""
# Stand-ins for a configuration that mean "no model of its own".
PLACEHOLDERS = ("__is_first_stage__", "__is_unconditional__")
_PACKAGES = ["ldm", "torch.nn", "torch.optim", "pytorch_lightning"]
_DOTTED = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)


def allow_module(name: str) -> None:
    """Let configurations name classes of a further module or package; for the user's own shell.

    Raises:
        InputError: it is no module's name.
    """
    if not _DOTTED.fullmatch(f"{name}.X"):
        raise InputError(f"{shown(name)} is not the name of a Python module")
    _PACKAGES.append(name)


def get_obj_from_str(path: str, expected: type | tuple[type, ...] = object) -> Any:
    """Import the class at a dotted path; a configuration can name nothing else.

    Args:
        path: of a class that ldm, torch.nn, torch.optim, pytorch_lightning or a module opened by
            `allow_module` defines, or a published alias of one. Functions, classes that a module
            only imports, and everything else are refused.
        expected: what it must be a subclass of.

    Raises:
        InputError: it is no such class.
    """
    where = f"target {shown(path)}"
    if not isinstance(path, str) or len(path) > 200 or not _DOTTED.fullmatch(path):
        raise InputError(f"{where} is not a dotted path such as 'ldm.models.X'")
    if path in _OTHER_MODELS:
        raise InputError(f"{where} is of {_OTHER_MODELS[path]}; {SUPPORTED}")
    module_name, name = _current(path).rsplit(".", 1)
    if not _is_allowed(module_name):
        raise InputError(
            f"{where} is not in {', '.join(_PACKAGES)}; a configuration can name classes of these"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        is_missing = f"{module_name}.".startswith(f"{error.name}.")
        reason = "there is no module" if is_missing else "it needs a module that is missing:"
        raise InputError(f"{where}: {reason} {error.name!r}") from error
    if not hasattr(module, name):
        raise InputError(f"{where}: module {module_name!r} has no {name!r}")
    found = getattr(module, name)
    if not isinstance(found, type) or not _is_allowed(found.__module__):
        raise InputError(f"{where} is no class of {module_name}; only a class can be named here")
    if not issubclass(found, expected):
        kinds = expected if isinstance(expected, tuple) else (expected,)
        needed = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{where} is no {needed}, which is needed here")
    return found


def word_list(path: str) -> Container[str]:
    """The words that a model knows, where ``defaults.vocabulary`` names a published list.

    Raises:
        InputError: it names something else.
    """
    known = _current(path) if isinstance(path, str) else ""
    if known not in WORD_LISTS:
        raise InputError(f"defaults.vocabulary {shown(path)} is none of {', '.join(WORD_LISTS)}")
    module_name, name = known.rsplit(".", 1)
    return getattr(importlib.import_module(module_name), name)


def _current(path: str) -> str:
    """Where the object of a published path is today."""
    path = ALIASES.get(path, path)
    module, _, name = path.rpartition(".")
    return f"{_MODULES.get(module, module)}.{name}"


def _is_allowed(module: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in _PACKAGES)


def to_plain(config: Any) -> Any:
    """Turn OmegaConf nodes into plain dicts and lists; anything else is returned as it is."""
    if "omegaconf" not in sys.modules:  # then nobody has made one
        return config
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def instantiate_from_config(
    config: Any, expected: type | tuple[type, ...] = object, **extra: Any
) -> Any:
    """Build ``config.target(**config.params, **extra)``.

    Args:
        config: a mapping with ``target`` and optional ``params``, or one of upstream's two
            placeholder strings, for which the result is None.
        expected: what the target must be a subclass of; see `get_obj_from_str`.
        extra: further keyword arguments, which win over ``params``.

    Raises:
        KeyError: there is no ``target``.
        InputError: the target is no class that can be named here, or does not take the params.
    """
    if config in PLACEHOLDERS:
        return None
    config = to_plain(config)
    if not isinstance(config, Mapping) or "target" not in config:
        raise KeyError("Expected key `target` to instantiate.")
    found = get_obj_from_str(config["target"], expected)
    given = config.get("params") or {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise InputError(f"the params of {config['target']} are no 'key: value'")
    params = {**given, **extra}
    try:
        inspect.signature(found).bind(**params)
    except TypeError as error:
        raise InputError(f"{config['target']}: {escaped(error)}") from error
    return found(**params)


# --- files that appear whole or not at all ------------------------------------------------------

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>part|old)", re.DOTALL)
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def file_stamp(path: Path, name: str) -> tuple[str, int, int]:
    """What changes with a file: its path, its size in bytes, and when it was changed in ns.

    Args:
        path: of the file.
        name: what to call it in messages.

    Raises:
        InputError: it cannot be read.
    """
    try:
        about = path.stat()
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from None
    return str(path), about.st_size, about.st_mtime_ns


@contextmanager
def written_whole(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """A file to write to, which gets its name once the block has ended without an error.

    Args:
        path: the file to be. What was there before stays until the new one is complete.
        mode: ``wb``, or ``w`` for UTF-8 text.

    Raises:
        InputError: the folder cannot be written to, or the disk is full.
    """
    with part_of(path) as part:
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with part.open(mode, **text) as file:  # type: ignore[call-overload]
            yield file


@contextmanager
def part_of(path: str | os.PathLike[str], exclusive: bool = False) -> Iterator[Path]:
    """Like `written_whole` for code that opens files itself: the path to write to.

    It is that of an empty file in a temporary folder of its own, so that writers may also replace
    it, or leave things beside it.

    Args:
        path: the file to be.
        exclusive: never replace a file, also where two programs choose one name at one time.

    Raises:
        FileExistsError: with ``exclusive``, the name is taken; nothing has been written then.
        InputError: as for `written_whole`.
    """
    target = Path(path) if exclusive else Path(os.path.realpath(path))
    with folder_beside(target) as folder:
        part = folder / target.name
        mode = _usual_mode(part)
        yield part
        with _said(target):
            _settle(part, mode)
            if exclusive:
                _link(part, target)
            else:
                os.replace(part, target)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty temporary folder, which replaces the folder ``path`` as a whole after the block.

    Raises:
        InputError: as for `written_whole`.
    """
    target = Path(os.path.realpath(path))
    with folder_beside(target) as folder:
        mode = _usual_mode(folder / "mode")
        (folder / "mode").unlink()
        yield folder
        with _said(target):
            for file in folder.rglob("*"):
                _settle(file, mode)
            before = folder.with_suffix(".old")
            if target.exists():
                os.replace(target, before)
            os.replace(folder, target)
            shutil.rmtree(before, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left in a folder; those at work keep theirs."""
    for file in [Path(entry.path) for entry in os.scandir(folder)]:
        match = _LEFTOVER.fullmatch(file.name)
        if match is None or (match["kind"] == "old" and not (folder / match["name"]).exists()):
            continue
        try:
            with locked(file, wait=False):
                if file.is_dir():
                    shutil.rmtree(file)
                else:
                    file.unlink()
        except OSError:  # a live writer's, or not ours to remove
            continue


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, locked as long as its writer lives.

    What a writer that was killed has left there is removed by the next one.
    """
    with _said(target):
        remove_leftovers(target.parent)
    while True:
        folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        with ExitStack() as stack:
            with _said(target):
                folder.mkdir()
                # before it is locked another writer may take it for a leftover
                try:
                    handle = stack.enter_context(locked(folder, wait=True))
                except FileNotFoundError:
                    continue
                if handle is not None and not _is_open_as(handle, folder):
                    continue
            try:
                yield folder
            except Exception as error:
                fault = disk_fault(error)
                if fault is None:
                    raise
                raise cannot_write(target, fault) from error
            finally:
                try:
                    shutil.rmtree(folder, ignore_errors=True)
                except KeyboardInterrupt:  # a stop signal that came just now
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
            return


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[int | None]:
    """Hold the lock of a file or folder, which ends with the process; OSError where it is held.

    Windows has no such lock, and does not remove a file that is open.
    """
    if fcntl is None:
        yield None
        return
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        with suppress(*(() if not wait else (OSError,))):  # some network disks have no locks
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield handle
    finally:
        os.close(handle)


def _is_open_as(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _said(target: Path) -> Iterator[None]:
    """Turn the system's refusal to write into one line."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise cannot_write(target, error) from error


def disk_fault(error: BaseException | None) -> OSError | None:
    """The disk's fault behind an error; torch.save, for one, fails at it and then at its end."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
            return error
        error = error.__context__
    return None


def cannot_write(target: Path, error: OSError) -> InputError:
    """The error that says so."""
    return InputError(f"{escaped(target)} cannot be written: {error.strerror or error}")


def _usual_mode(path: Path) -> int:
    """Create an empty file; the permissions that the umask gives to it."""
    with _said(path):
        path.touch()
        return path.stat().st_mode & 0o777


def _settle(path: Path, mode: int) -> None:
    """Give a finished file its permissions, and wait until it is on the disk."""
    if path.is_file():
        path.chmod(mode)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _link(part: Path, target: Path) -> None:
    """Give a finished file its name, unless another has it."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links: claim the name, then fill it
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(part, target)
