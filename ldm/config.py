"""Configuration files: where they are, how they merge, and their defaults.

This is the only module, besides ``ldm.util``, that knows OmegaConf; everybody else gets plain
dicts and lists.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import InputError

MODEL_FOLDERS = ("configs/stable-diffusion", "configs/demo")
PRESET_FOLDER = "configs/tome"
DEFAULT_PROMPT = "a painting of a virus monster playing guitar"


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
        if candidate.is_file():
            return candidate
    if Path(path).is_dir():
        raise InputError(f"configuration {str(path)!r} is a folder; name a YAML file in it")
    known = ", ".join(str(found) for found in model_configs())
    raise InputError(f"there is no configuration {str(path)!r}; the shipped ones are {known}")


def model_configs() -> list[Path]:
    """The shipped configurations of whole models, in the order in which they are tried."""
    found = [path for folder in MODEL_FOLDERS for path in sorted(shipped(folder).glob("*.yaml"))]
    return [path for path in found if "unet_config:" in path.read_text(encoding="utf-8")]


def load_config(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Read YAML files, merge them from left to right, then apply ``key.subkey=value`` items.

    Args:
        paths: one file or several; a name that is not there is looked up among the shipped files.
        overrides: upstream's dotlist, such as ``["model.params.use_ema=True"]``.

    Returns:
        Plain dicts and lists, interpolations resolved.

    Raises:
        InputError: a file is missing or is not a YAML mapping, or an item is malformed.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    merged: Any = OmegaConf.create({})
    try:
        for path in paths:
            merged = OmegaConf.merge(merged, _read(find_config(path)))
        for item in overrides:
            if "=" not in item or item.startswith("="):
                raise InputError(f"{item!r} is not of the form key.subkey=value")
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item]))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"configuration: {_one_line(error)}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _read(path: Path) -> Any:
    """One YAML file as an OmegaConf mapping."""
    try:
        config = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not OmegaConf.is_dict(config):
        raise InputError(f"{path} is not a configuration: its top level must be 'key: value'")
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def preset_names() -> list[str]:
    """Names of the shipped Token Merging presets."""
    return sorted(path.stem for path in shipped(PRESET_FOLDER).glob("*.yaml"))


def load_preset(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a Token Merging preset: the keys of ``tome_config`` in a file of their own.

    Args:
        name_or_path: the name of a shipped preset, or a YAML file.

    Raises:
        InputError: there is no such preset (the message lists the known ones) or file.
    """
    return load_config(preset_file(name_or_path))


def preset_file(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a Token Merging preset; see `load_preset`."""
    text = str(name_or_path)
    path = Path(name_or_path) if text.endswith((".yaml", ".yml")) else None
    if path is None and text in preset_names():
        path = shipped(PRESET_FOLDER) / f"{text}.yaml"
    if path is None or not path.is_file():
        known = ", ".join(preset_names()) or "none"
        raise InputError(f"there is no ToMe preset {text!r}; known presets: {known}")
    return path


def model_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """What a script uses where no flag is given: H, W, C, f, scale, steps, sampler, prompt.

    Entries of the file's ``defaults`` block win; for upstream's files, which have none, the sizes
    follow from the model's own configuration.

    Raises:
        InputError: the configuration describes no latent-diffusion model.
    """
    try:
        params = config["model"]["params"]
        f = 2 ** (len(params["first_stage_config"]["params"]["ddconfig"]["ch_mult"]) - 1)
        side = params["image_size"] * f
        derived = {"H": side, "W": side, "C": params["channels"], "f": f}
    except (KeyError, TypeError) as error:
        raise InputError(
            "the configuration is no latent-diffusion model: 'model.params' needs image_size, "
            "channels and first_stage_config"
        ) from error
    general = {"scale": 7.5, "steps": 50, "sampler": "ddim", "prompt": DEFAULT_PROMPT}
    return {**derived, **general, **(config.get("defaults") or {})}
