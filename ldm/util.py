"""Building objects from configuration: ``target`` is a dotted path, ``params`` its arguments."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from ldm.errors import InputError

# Upstream's configurations name classes of its main.py; ours live in a module of their own.
ALIASES = {
    "main.DataModuleFromConfig": "ldm.training.lightning.DataModuleFromConfig",
    "main.ImageLogger": "ldm.training.lightning.ImageLogger",
    "main.SetupCallback": "ldm.training.lightning.SetupCallback",
    "main.CUDACallback": "ldm.training.lightning.CUDACallback",
    "main.LearningRateMonitor": "pytorch_lightning.callbacks.LearningRateMonitor",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": (
        "ldm.models.diffusion.ddpm.LatentDiffusion"
    ),
}
# Stand-ins for a configuration that mean "no model of its own".
PLACEHOLDERS = ("__is_first_stage__", "__is_unconditional__")


def get_obj_from_str(path: str) -> Any:
    """Import the object at a dotted path.

    Raises:
        InputError: no such module, or no such name in it.
    """
    module_name, _, name = ALIASES.get(path, path).rpartition(".")
    if not module_name:
        raise InputError(f"target {path!r} is not a dotted path such as 'ldm.models.X'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but something that it needs does not
        raise InputError(f"target {path!r}: there is no module {error.name!r}") from error
    if not hasattr(module, name):
        raise InputError(f"target {path!r}: module {module_name!r} has no {name!r}")
    return getattr(module, name)


def to_plain(config: Any) -> Any:
    """Turn OmegaConf nodes into plain dicts and lists; anything else is returned as it is."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def instantiate_from_config(config: Any, **extra: Any) -> Any:
    """Build ``config.target(**config.params, **extra)``.

    Args:
        config: a mapping with ``target`` and optional ``params``, or one of upstream's two
            placeholder strings, for which the result is None.
        extra: further keyword arguments, which win over ``params``.

    Raises:
        KeyError: there is no ``target``.
        InputError: the target cannot be imported.
    """
    if config in PLACEHOLDERS:
        return None
    config = to_plain(config)
    if not isinstance(config, Mapping) or "target" not in config:
        raise KeyError("Expected key `target` to instantiate.")
    return get_obj_from_str(config["target"])(**{**(config.get("params") or {}), **extra})
