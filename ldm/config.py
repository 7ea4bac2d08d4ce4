"""Configuration files: where they are, how they merge, and their defaults."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ldm.errors import InputError, escaped, shown
from ldm.modules.tome.config import ToMeConfig, ToMeWish
from ldm.plain_yaml import parse_yaml, resolved
from ldm.settings import Settings
from ldm.text import read_text

MODEL_FOLDERS = ("configs/stable-diffusion", "configs/demo")
PRESET_FOLDER = "configs/tome"
MODEL_SECTIONS = ("model", "defaults")  # what is needed to draw
MAX_YAML_BYTES = 2**20
DEFAULT_PROMPT = "a painting of a virus monster playing guitar"
TOME_PLACE = ("model", "params", "unet_config", "params", "tome_config")

AskedTome: TypeAlias = ToMeConfig | ToMeWish | Mapping[str, Any] | str | Literal[False] | None
"""Token Merging as somebody may ask for it in Python; see `model_tome`."""


def shipped(path: str | os.PathLike[str]) -> Path:
    """Where a file or folder that comes with the project lies, such as ``configs/tome``.

    In a source checkout that is the repository itself; in an installed package it is the data
    folder inside it. The result need not exist.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent
    is_checkout = (checkout / MODEL_FOLDERS[0]).is_dir()
    return (checkout if is_checkout else package / "shipped") / path


def find_config(path: str | os.PathLike[str]) -> Path:
    """The file itself, or, where there is none, the shipped one of that name.

    Raises:
        InputError: neither exists, or it is no file.
    """
    for candidate in (Path(path), shipped(path)):
        if os.path.isfile(candidate):
            return candidate
    if os.path.isdir(path):
        raise InputError(f"configuration {shown(str(path))} is a folder; name a YAML file in it")
    known = ", ".join(str(found) for found in model_configs())
    raise InputError(f"there is no configuration {shown(str(path))}; the shipped ones are {known}")


def model_configs() -> list[Path]:
    """The shipped configurations of whole models, in the order in which they are tried."""
    found = [path for folder in MODEL_FOLDERS for path in sorted(shipped(folder).glob("*.yaml"))]
    return [path for path in found if "first_stage_config:" in path.read_text(encoding="utf-8")]


def load_config(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Read YAML files, merge them from left to right, then apply ``key.subkey=value`` items.

    Args:
        paths: one file or several; a name that is not there is looked up among the shipped files.
        overrides: upstream's dotlist, such as ``["model.params.use_ema=True"]``.

    Returns:
        Plain dicts and lists; references such as ``${model.params.channels}`` are replaced by what
        they name. Nothing else is looked up anywhere.

    Raises:
        InputError: a file is missing or is not a YAML mapping, or an item is malformed.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _merge(merged, _read(find_config(path)))
    for item in overrides:
        key, separator, text = item.partition("=")
        if not (separator and all(key.split("."))):
            raise InputError(f"{shown(item)} is not of the form key.subkey=value")
        value = parse_yaml(text, escaped(key))
        for name in reversed(key.split(".")):
            value = {name: value}
        merged = _merge(merged, value)
    return resolved(merged, "configuration")


def load_yaml(
    path: str | os.PathLike[str], sections: Sequence[str] | None = None
) -> dict[str, Any]:
    """Read one YAML file as data.

    Args:
        path: the file.
        sections: those that are needed; references in others may lead nowhere. None: all are.

    Raises:
        InputError: it cannot be read, is not a YAML mapping, or is beyond the limits.
    """
    return resolved(_read(Path(path)), escaped(path), sections)


def _read(path: Path) -> dict[str, Any]:
    where = escaped(path)
    config = parse_yaml(read_text(path, MAX_YAML_BYTES), where)
    if config is None:  # an empty file
        return {}
    if not isinstance(config, dict):
        raise InputError(f"{where} is not a configuration: its top level must be 'key: value'")
    return config


def _merge(base: Any, over: Any) -> Any:
    """Mappings are merged key by key; anything else replaces what was there."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}


def preset_names() -> list[str]:
    """Names of the shipped Token Merging presets."""
    return sorted(path.stem for path in shipped(PRESET_FOLDER).glob("*.yaml"))


def load_preset(name: str | os.PathLike[str], may_be_path: bool = False) -> dict[str, Any]:
    """Read a Token Merging preset: the keys of ``tome_config`` in a file of their own.

    Args:
        name: of a shipped preset.
        may_be_path: it may also be a YAML file of the user's. Only for words from their own shell:
            a page or a picture must not choose which files are read.

    Raises:
        InputError: there is no such preset (the message lists the known ones) or file.
    """
    path = preset_file(name, may_be_path)
    keys = load_config(path)
    if not keys:
        raise InputError(f"{path} has no key, so it would change nothing; docs/tome.md lists them")
    return keys


def preset_file(name: str | os.PathLike[str], may_be_path: bool = False) -> Path:
    """The file of a Token Merging preset; see `load_preset`."""
    text = str(name)
    names = preset_names()
    if text in names:
        return shipped(PRESET_FOLDER) / f"{text}.yaml"
    if may_be_path and text.endswith((".yaml", ".yml")) and Path(text).is_file():
        return Path(text)
    known = ", ".join(names) or "none"
    raise InputError(f"there is no ToMe preset {shown(text)}; known presets: {known}")


def model_tome(config: Mapping[str, Any], asked: AskedTome) -> ToMeConfig:
    """The Token Merging of a model: what is asked for, over its own ``tome_config``.

    Args:
        config: of the model.
        asked: keys, or a shipped preset by its name; None: nothing; False: to merge nothing. Or a
            configuration, which is complete.

    Raises:
        InputError: it cannot be used, or the configuration has a ``tome_config`` elsewhere.
    """
    own = None
    for place, value in _places("tome_config", config):
        if place != TOME_PLACE:
            raise InputError(
                f"the configuration has {'.'.join(place)}, which nothing reads; its place is "
                f"{'.'.join(TOME_PLACE)}"
            )
        own = value
    if isinstance(asked, ToMeConfig):
        return asked
    if not isinstance(asked, ToMeWish):
        keys = load_preset(asked) if isinstance(asked, str) else asked or {}
        asked = ToMeWish(keys, is_off=asked is False)
    return asked.over(own)


def _places(
    key: str, config: Any, above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Where a key is in nested mappings, with its value there."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name == key:
                yield (*above, name), value
            else:
                yield from _places(key, value, (*above, str(name)))


def model_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What a script uses where no flag is given: H, W, C, f, scale, steps, sampler, prompt.

    Entries of the file's ``defaults`` block win; for upstream's files, which have none, the sizes
    follow from the model's own configuration.

    Raises:
        InputError: the configuration describes no latent-diffusion model.
    """
    try:
        params = config["model"]["params"]
        f = 2 ** min(len(params["first_stage_config"]["params"]["ddconfig"]["ch_mult"]) - 1, 16)
        size = params["image_size"]
        h, w = size if isinstance(size, list) else (size, size)
        derived = {"H": h * f, "W": w * f, "C": params["channels"], "f": f}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "the configuration is no latent-diffusion model: 'model.params' needs image_size, "
            "channels and first_stage_config"
        ) from error
    general = {"scale": 7.5, "steps": 50, "sampler": "ddim", "prompt": DEFAULT_PROMPT}
    own = config.get("defaults") or {}
    if not isinstance(own, Mapping):
        raise InputError(f"defaults {shown(own)}: must be 'key: value'")
    known = {**derived, **general, "reuse_deep": None, "vocabulary": None}
    if strange := sorted(set(own) - set(known)):
        names = ", ".join(known)
        raise InputError(f"defaults: {shown(strange[0])} is none of its keys, which are {names}")
    defaults = {**derived, **general, **own}
    if not isinstance(defaults["prompt"], str):
        raise InputError(f"defaults: prompt {shown(defaults['prompt'])}: must be a text")
    try:
        Settings(**{name: value for name, value in defaults.items() if name != "vocabulary"})
    except InputError as error:
        raise InputError(f"defaults: {error}") from error
    return defaults
