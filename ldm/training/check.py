"""A training configuration, checked as a whole before anything starts.

Names and types follow from the signatures of the classes that it names, so that there is no second
list of them; bounds are those that keep a wrong digit from filling the memory.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union

from ldm.errors import InputError, escaped, shown
from ldm.util import PLACEHOLDERS, get_obj_from_str

SECTIONS = ("model", "data", "lightning", "defaults", "shared", "seed")
"""`shared` has values that others refer to, such as ``${shared.state}``."""
LIGHTNING = ("trainer", "callbacks", "modelcheckpoint", "logger", "find_unused_parameters")
# name of a setting -> least and most, wherever it stands
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("batch_size", "batch_sizes"), (1, 65536)),
    **dict.fromkeys(("num_workers", "num_val_workers"), (0, 256)),
    "n_workers": (1, 256),
    **dict.fromkeys(("size", "image_size", "resolution", "crop"), (1, 16384)),
    **dict.fromkeys(("n_pictures", "n_captions"), (1, 10**9)),
    "timesteps": (1, 10**6),
    **dict.fromkeys(("channels", "in_channels", "out_channels", "out_ch"), (1, 8192)),
    **dict.fromkeys(("model_channels", "ch", "z_channels", "embed_dim"), (1, 8192)),
    **dict.fromkeys(("context_dim", "adm_in_channels", "num_head_channels"), (-1, 65536)),
    **dict.fromkeys(("ch_mult", "channel_mult", "transformer_depth"), (0, 64)),
    "attention_resolutions": (1, 1024),
    **dict.fromkeys(("num_res_blocks", "num_heads", "disc_num_layers"), (-1, 256)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim"), (1, 65536)),
    **dict.fromkeys(("width", "embed_dim", "disc_channels", "n_features"), (1, 65536)),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "layers", "heads"), (1, 256)),
    "vocab_size": (1, 10**7),
    "max_position_embeddings": (1, 10**6),
    **dict.fromkeys(("batch_frequency", "every_n_train_steps", "every_n_epochs"), (0, 10**9)),
    "max_images": (1, 4096),
    "N": (1, 4096),
    "ddim_steps": (1, 10**6),
    "ddim_eta": (0, 1),
    "save_top_k": (-1, 10**6),
    **dict.fromkeys(("scale_factor", "logvar_init"), (-1e9, 1e9)),
    **dict.fromkeys(("kl_weight", "pixelloss_weight", "perceptual_weight"), (0, 1e9)),
    **dict.fromkeys(("disc_weight", "disc_factor", "edge_weight", "texture_weight"), (0, 1e9)),
    "disc_start": (0, 10**12),
    "base_learning_rate": (1e-12, 1e3),
    "seed": (0, 2**63 - 1),
}


def check_sections(config: Mapping[str, Any]) -> None:
    """Check names of sections, kinds of values and bounds; nothing is imported.

    Raises:
        InputError: something cannot be.
    """
    known(config, SECTIONS, "the configuration")
    for section in ("model", "data"):
        if section not in config:
            raise InputError(f"the configuration has no section {section!r}")
    pairs(config.get("defaults"), "defaults")
    known(pairs(config["model"], "model"), ("target", "params", "base_learning_rate"), "model")
    known(pairs(config["data"], "data"), ("target", "params"), "data")
    lightning = pairs(config.get("lightning"), "lightning")
    known(lightning, LIGHTNING, "lightning")
    for name, value in lightning.items():
        if name != "find_unused_parameters":
            pairs(value, f"lightning.{name}")
    for path, value in _numbers(config, ""):
        _check_bounds(path, value)


def pairs(value: Any, place: str) -> Mapping[str, Any]:
    """A mapping; null stands for an empty one.

    Raises:
        InputError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{place} {shown(value)}: must be 'key: value' pairs")
    return value


def known(config: Any, names: Sequence[str], place: str) -> None:
    """Check that a mapping has no other keys than these.

    Raises:
        InputError: it has, or is no mapping.
    """
    for name in pairs(config, place):
        if name not in names:
            raise InputError(f"{place} has no key {shown(name)}; it has {', '.join(names)}")


def _numbers(node: Any, path: str) -> Iterator[tuple[str, float]]:
    """Every number, with the keys that lead to it."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _numbers(value, f"{path}.{key}")
    elif isinstance(node, list):
        for value in node:
            yield from _numbers(value, path)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path.lstrip("."), node


def _check_bounds(path: str, value: float) -> None:
    least, most = BOUNDS.get(path.rpartition(".")[2], (-(2**63), 2**63))
    if not least <= value <= most:
        raise InputError(f"{escaped(path)} {shown(value)}: allowed is {least:g} to {most:g}")


# --- classes and what they take -----------------------------------------------------------------


def check_object(config: Any, place: str, expected: type | tuple[type, ...] = object) -> type:
    """Check the target of a configuration, and its params down to the last value.

    Args:
        config: with ``target`` and ``params``.
        place: where it stands, for messages.
        expected: what the target must be a subclass of.

    Returns:
        The class.

    Raises:
        InputError: it is no such class, or does not take these params.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("target"), str):
        raise InputError(f"{place} {shown(config)}: must have a target, and may have params")
    try:
        found = get_obj_from_str(config["target"], expected)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    check_arguments(found, pairs(config.get("params"), f"{place}.params"), f"{place}.params")
    return found


def check_arguments(function: Callable[..., Any], given: Any, place: str) -> None:
    """Check keyword arguments by a function's signature: names, those that it needs, and types.

    Raises:
        InputError: they do not fit.
    """
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes_all = takes_all and not hasattr(function, "inert_arguments")
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for p in parameters.values() if p.kind in by_name]
    names += list(getattr(function, "inert_arguments", ()))
    given = pairs(given, place)
    if not takes_all:
        known(given, names, place)
    for name, parameter in parameters.items():
        if name in names and parameter.default is parameter.empty and name not in given:
            raise InputError(f"{place}: {name} is missing")
    hints = _hints(function)
    for name, value in given.items():
        if not _fits(value, hints.get(name, Any)):
            raise InputError(f"{place}.{name} {shown(value)}: must be {_words(hints[name])}")
        _check_inside(value, f"{place}.{name}")


def _check_inside(value: Any, place: str) -> None:
    """Check the configurations of objects inside a value."""
    if isinstance(value, Mapping):
        if "target" in value:
            check_object(value, place)
            return
        for name, inner in value.items():
            _check_inside(inner, f"{place}.{escaped(name)}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_inside(inner, f"{place}[{index}]")
    elif place.endswith("_config") and value is not None and value not in PLACEHOLDERS:
        raise InputError(
            f"{place} {shown(value)}: must have a target, or be one of {', '.join(PLACEHOLDERS)}"
        )


def _hints(function: Any) -> dict[str, Any]:
    function = function.__init__ if inspect.isclass(function) else function
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # names that exist for type checkers alone
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file is of a type; a list is also a tuple, an int also a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object or isinstance(hint, typing.TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if issubclass(kind, Sequence) and kind is not str:
        if not isinstance(value, list | tuple):
            return False
        element = arguments[0] if arguments else Any
        return all(_fits(one, element) for one in value)
    return isinstance(value, kind) or kind.__name__.endswith("Path")


def _words(hint: Any) -> str:
    """A type in the words of a YAML file."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if hint in words:
        return words[hint]
    if hint in (None, type(None)):
        return "null"
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "'key: value' pairs"
    if isinstance(kind, type) and issubclass(kind, Sequence):
        inside = f" of which each is {_words(arguments[0])}" if arguments else ""
        return f"a list [...]{inside}"
    return getattr(hint, "__name__", str(hint))
