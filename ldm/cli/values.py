"""Settings as values: what a job line, a picture, a page or a typed line may change.

A name is a field of `Settings` or a key of ``tome_config``, under the flag's name. A value has to
be of that field's type. Nothing here parses a command line, reads a path or ends a program.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.cli.tome_flags import literal, parse_flag
from ldm.config import load_preset, preset_names
from ldm.errors import InputError, shown
from ldm.modules.tome.config import ToMeWish, overlay, refuse_contradictions
from ldm.modules.tome.keys import KEYS
from ldm.settings import Settings
from ldm.text import check_kind, check_text

OTHER_NAMES = {"ddim_steps": "steps", "ddim_eta": "eta"}  # flags named otherwise than their field
SAMPLER_FLAGS = {"plms": "plms", "dpm_solver": "dpm_solver", "dpm": "dpm_solver"}
LONGEST_TEXT = 100_000  # characters


@dataclass(frozen=True)
class Wishes:
    """What is asked for; a change gives another object, and a bad one changes nothing.

    Attributes:
        fields: names of the settings that the program has.
        given: their values, where they are not left to the model.
        keys: of ``tome_config``.
        hires_ratio: of the second pass, over what ``keys`` say of it.
        preset: the keys that lie below.
        preset_name: what it is called.
        no_tome: merge nothing.
    """

    fields: frozenset[str]
    given: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    hires_ratio: Any = None
    preset: Mapping[str, Any] = field(default_factory=dict)
    preset_name: str | None = None
    no_tome: bool = False

    @classmethod
    def of_flags(cls, flags: Mapping[str, Any]) -> Wishes:
        """What a command line says.

        Args:
            flags: parsed values by destination; others than settings are left alone.

        Raises:
            InputError: there is no such preset, or a value is not allowed.
        """
        names = frozenset(_kinds()) & flags.keys()
        given = {name: flags[name] for name in names if flags[name] is not None}
        for name, value in given.items():
            if isinstance(value, str):
                check_text(value, f"--{name}", LONGEST_TEXT)
        keys = {
            name: _tome_value(name, _joined(text), name)
            for name in KEYS
            if (text := flags.get(f"tome_{name}")) is not None
        }
        ratio = flags.get("tome_hires_ratio")
        ratio = None if ratio is None else _tome_value("ratio", ratio, "hires_ratio")
        chosen = flags.get("tome_preset")
        preset = (
            flags.get("tome_below", {}) if chosen is None else load_preset(chosen, may_be_path=True)
        )
        return cls(names, given, keys, ratio, preset, chosen, bool(flags.get("no_tome")))

    def changed(self, changes: Mapping[str, Any]) -> Wishes:
        """The wishes with other values.

        Args:
            changes: by the flags' names: {"steps": 20, "tome.ratio": 0.5} or {"tome": {"ratio":
                0.5}}; None takes a wish back, but in the latter form is the value ``none`` of a
                key that has it, as in YAML. {"tome": "fast"} is a preset.

        Raises:
            InputError: a name is none of these, or a value is not of its type, or two names say
                the same.
        """
        new = self
        names: dict[str, str] = {}
        for name, value in _flat(changes):
            meant = "sampler" if name in SAMPLER_FLAGS else OTHER_NAMES.get(name, name)
            if meant in names:
                said = " and ".join(dict.fromkeys((names[meant], name)))
                raise InputError(f"{said}: this is said twice; leave one out")
            names[meant] = name
            new = new._with(name, value)
        return new

    def _with(self, name: str, value: Any) -> Wishes:
        if name in SAMPLER_FLAGS and "sampler" in self.fields:
            is_on = value is not None and _switch(name, value)
            return self._with("sampler", SAMPLER_FLAGS[name] if is_on else None)
        name = OTHER_NAMES.get(name, name)
        if name in self.fields:
            given = {key: old for key, old in self.given.items() if key != name}
            return replace(
                self, given=given if value is None else {**given, name: _own(name, value)}
            )
        key = name.removeprefix("tome_")
        if name == "no_tome":
            return replace(self, no_tome=value is not None and _switch(name, value))
        if name == "tome_preset":
            return self._with_preset(value)
        if name == "tome_hires_ratio" and "hires_scale" in self.fields:
            checked = None if value is None else _checked_key("ratio", value, value, "hires_ratio")
            return replace(self, hires_ratio=checked)
        if name.startswith("tome_") and key in KEYS:
            keys = {k: old for k, old in self.keys.items() if k != key}
            if value is not None:
                meant = None if value == "none" and _has_none(key) else value
                keys[key] = _checked_key(key, meant, value, key)
            return replace(self, keys=keys)
        raise InputError(f"{shown(name)} is no setting of a picture (--help lists the flags)")

    def _with_preset(self, name: Any) -> Wishes:
        """A shipped preset, by its name; a path would read a file that somebody else chose."""
        if name is None:
            return replace(self, preset={}, preset_name=None)
        if not isinstance(name, str) or name not in preset_names():
            known = ", ".join(preset_names())
            raise InputError(f"there is no ToMe preset {shown(name)}; known presets: {known}")
        return replace(self, preset=load_preset(name), preset_name=name)

    # --- what they come to ----------------------------------------------------------------------

    def settings(self, prompts: Sequence[str] | None = None) -> Settings:
        """The checked settings.

        Args:
            prompts: one for each picture, instead of the prompt.

        Raises:
            InputError: a value is out of range.
        """
        given = dict(self.given) if prompts is None else {**self.given, "prompt": tuple(prompts)}
        return Settings(**given)

    def check(self) -> None:
        """Check everything, without a random seed's being chosen.

        Raises:
            InputError: a value is out of range, or two contradict each other.
        """
        seed = self.given.get("seed", 0)
        Settings(**{**self.given, "seed": 0 if seed == -1 else seed})
        _ = self.tome

    @property
    def tome(self) -> ToMeWish:
        """Token Merging settings: keys over the preset.

        Raises:
            InputError: nothing is to be merged, and how it is to be merged is said as well.
        """
        has_ratio = self.hires_ratio is not None
        if self.no_tome:
            if self.keys or has_ratio or self.preset_name is not None:
                raise InputError("--no-tome merges nothing: leave out the other --tome flags")
            return ToMeWish(is_off=True)
        keys = dict(self.keys)
        if has_ratio:
            keys["hires"] = overlay(keys.get("hires"), {"ratio": self.hires_ratio})
        keys = overlay(self.preset, keys)
        refuse_contradictions(keys)
        return ToMeWish(keys)

    def shown(self) -> Iterator[tuple[str, Any]]:
        """What differs from the defaults, by the flags' names."""
        usual = {one.name: one.default for one in dataclasses.fields(Settings)}
        for name, value in self.given.items():
            if value != usual[name]:
                yield name.replace("_", "-"), value
        for key, value in self.keys.items():
            yield f"tome-{key.replace('_', '-')}", value
        more = {"tome-hires-ratio": self.hires_ratio, "tome-preset": self.preset_name}
        yield from ((name, value) for name, value in more.items() if value is not None)
        if self.no_tome:
            yield "no-tome", True


def typed(name: str, words: Sequence[str]) -> Any:
    """The value that typed words stand for: a text stays a text, all else is read as YAML.

    Args:
        name: of the setting.
        words: none at all switch something on.

    Raises:
        InputError: there are none, and it is nothing to switch.
    """
    name = _plain(name)
    name = OTHER_NAMES.get(name, name)
    text = " ".join(words)
    if not words and _kinds().get(name) in (int, float):
        raise InputError(f"{name}: give a value, too")
    if _kinds().get(name) is str or name in ("tome_preset", "tome"):
        return text
    key = name.removeprefix("tome_")
    key = "ratio" if key == "hires_ratio" else key
    if name.startswith("tome_") and key in KEYS:
        return _named_none(key, parse_flag(key, text or "true"))
    return literal(text or "true")


def _flat(changes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, with ``tome`` taken apart: keys, or a preset's name."""
    for name, value in changes.items():
        if _plain(name) == "tome" and isinstance(value, Mapping):
            keys = ((_plain(key), one) for key, one in value.items())
            yield from ((f"tome_{key}", _named_none(key, one)) for key, one in keys)
        elif _plain(name) == "tome" and isinstance(value, str | None):  # as in Python
            yield "tome_preset", value
        elif _plain(name) == "tome":
            raise InputError(
                f"tome {shown(value)}: must be a preset's name, or keys with their values, "
                'such as {"ratio": 0.5}'
            )
        else:
            yield _plain(name), value


def _has_none(key: str) -> bool:
    """Whether ``none`` is a value of a key, and not the same as saying nothing."""
    return key in KEYS and KEYS[key].values.endswith("|none")


def _named_none(key: str, value: Any) -> Any:
    """A key's value, with the word ``none`` for the value None."""
    return "none" if value is None and _has_none(key) else value


def _plain(name: str) -> str:
    return name.replace("-", "_").replace(".", "_")


@functools.cache
def _kinds() -> dict[str, Any]:
    """The settings' names and types: str, int, float or bool."""
    hints = typing.get_type_hints(Settings)
    names = [one.name for one in dataclasses.fields(Settings)]
    return {name: next(iter(_simple(hints[name])), None) for name in names}


def _simple(hint: Any) -> Iterator[type]:
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    parts = typing.get_args(hint) if typing.get_origin(hint) is typing.Union else parts
    return (part for part in parts if part in (str, int, float, bool))


def _own(name: str, value: Any) -> Any:
    """A setting's value, if it is of its type."""
    kind = _kinds()[name]
    if kind is bool:
        return _switch(name, value)
    value = check_kind(value, kind, name)
    return check_text(value, name, LONGEST_TEXT) if kind is str else value


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} {shown(value)}: allowed is true or false")
    return value


def _joined(text: Any) -> str:
    return " ".join(text) if isinstance(text, list) else text


def _tome_value(key: str, text: str, flag: str) -> Any:
    """The checked value of a Token Merging flag."""
    return _checked_key(key, parse_flag(key, text), text, flag)


def _checked_key(key: str, value: Any, said: Any, flag: str) -> Any:
    """A key's value, if it may be that."""
    try:
        KEYS[key].check(value)
    except (ValueError, TypeError) as limit:
        words = said if isinstance(said, str) else shown(said)
        raise InputError(f"--tome-{flag.replace('_', '-')} {words}: {limit}") from None
    return value
