"""YAML as data: bounded in size, without code, and with no references but those to its own keys."""

from __future__ import annotations

import math
import re
from collections.abc import Container
from typing import Any

import yaml

from ldm.errors import InputError, escaped, shown
from ldm.text import check_text

MAX_DEPTH = 32  # lists and mappings inside each other
MAX_VALUES = 20_000  # with aliases and references written out
MAX_DIGITS = 100  # of a number
MAX_CHARACTERS = 2**20  # of all texts that references make
_TOO_MANY = f"more than {MAX_VALUES} values, which is the limit"
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads 1e-4 as a number and dates as text, as OmegaConf does."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    n_values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.n_values += 1
        if self.n_values > MAX_VALUES:
            raise yaml.YAMLError(_TOO_MANY)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document, as dicts with names for keys, lists, texts, finite numbers, bool and None.

    Args:
        text: the document.
        where: the file or the key, for messages.

    Raises:
        InputError: it is no YAML, holds values of other kinds, or more than the limits allow.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _extent(node, where, {}, frozenset())  # before anything is written out
        value = loader.construct_document(node)
    except RecursionError:
        raise InputError(f"{where}: YAML nested deeper than {MAX_DEPTH}, the limit") from None
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = escaped(" ".join(str(error).split()), 200)
        raise InputError(f"{where} is not valid YAML: {reason}") from error
    _check(value, where)
    return value


def resolved(
    config: dict[str, Any], where: str, sections: Container[str] | None = None
) -> dict[str, Any]:
    """A copy in which each ``${a.b}`` is what stands at the key b of a, seen from the top.

    Args:
        config: the whole document.
        where: the file, for messages.
        sections: leave those of other names as they are; None: there are none.

    Raises:
        InputError: there is no such key, it leads back to itself, or ``${...}`` asks for something
            else; or it all comes to more than the limits allow.
    """
    n_values = n_characters = 0

    def look_up(path: str, seen: tuple[str, ...]) -> Any:
        what = f"{where}: ${{{escaped(path)}}}"
        if not _PATH.fullmatch(path):
            raise InputError(f"{what} is no reference to a key, such as ${{model.params.channels}}")
        if path in seen or len(seen) == MAX_DEPTH:
            raise InputError(f"{what} leads back to itself")
        value: Any = config
        for name in path.split("."):
            if isinstance(value, str):
                value = copy(value, (*seen, path))
            if not isinstance(value, dict) or name not in value:
                raise InputError(f"{what}: there is no key {shown(name)}")
            value = value[name]
        return copy(value, (*seen, path))

    def copy(value: Any, seen: tuple[str, ...]) -> Any:
        nonlocal n_values
        n_values += 1
        if n_values > MAX_VALUES:
            raise InputError(f"{where}: {_TOO_MANY}")
        if isinstance(value, dict):
            return {key: copy(one, seen) for key, one in value.items()}
        if isinstance(value, list):
            return [copy(one, seen) for one in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        if whole := _REFERENCE.fullmatch(value):
            return look_up(whole[1], seen)
        if "${" in _REFERENCE.sub("", value):
            raise InputError(f"{where}: {shown(value)} is no reference to a key, such as ${{a.b}}")
        return _REFERENCE.sub(lambda part: in_text(part[1], seen), value)

    def in_text(path: str, seen: tuple[str, ...]) -> str:
        nonlocal n_characters
        value = look_up(path, seen)
        n_characters += len(text := str(value))
        if isinstance(value, dict | list) or n_characters > MAX_CHARACTERS:
            raise InputError(f"{where}: ${{{path}}} is too much to be a part of a text")
        return text

    return {
        key: copy(value, ()) if sections is None or key in sections else value
        for key, value in config.items()
    }


def _extent(
    node: yaml.Node, where: str, known: dict[int, tuple[int, int]], above: frozenset[int]
) -> tuple[int, int]:
    """How many values a node stands for, each alias written out, and how deep they are nested."""
    if id(node) in above:
        raise InputError(f"{where}: a list or mapping holds itself")
    if id(node) in known:
        return known[id(node)]
    size, depth = 1, 0
    if isinstance(node, yaml.ScalarNode):
        if node.tag != "tag:yaml.org,2002:str" and len(node.value) > MAX_DIGITS:
            raise InputError(f"{where}: {shown(node.value, 40)} is too long for a number")
    else:
        children = node.value
        if isinstance(node, yaml.MappingNode):
            _refuse_doubles(node, where)
            children = [one for pair in children for one in pair]
        within = above | {id(node)}
        for one in children:
            more, below = _extent(one, where, known, within)
            size, depth = size + more, max(depth, below + 1)
    if size > MAX_VALUES:
        raise InputError(f"{where}: {_TOO_MANY}")
    if depth > MAX_DEPTH:
        raise InputError(f"{where}: YAML nested deeper than {MAX_DEPTH}, the limit")
    known[id(node)] = size, depth
    return size, depth


def _refuse_doubles(node: yaml.MappingNode, where: str) -> None:
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        line = node.start_mark.line + 1
        raise InputError(f"{where} is not valid YAML: {shown(twice)} is there twice (line {line})")


def _check(value: Any, where: str) -> None:
    """Only plain data: names for keys, whole characters, finite numbers."""
    if isinstance(value, dict):
        for key, one in value.items():
            if not isinstance(key, str):
                raise InputError(f"{where}: the key {shown(key)} is not a text; quote it")
            check_text(key, where)
            _check(one, where)
    elif isinstance(value, list):
        for one in value:
            _check(one, where)
    elif isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: {value} is no finite number")
    elif value is not None and not isinstance(value, bool | int | float):
        raise InputError(f"{where}: {shown(value)} is neither text nor a number")
