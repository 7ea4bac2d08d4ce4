"""What the page's fields say, as settings, and settings as what the fields say.

The fields are flags by their names; see `ldm.cli.values`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from ldm.cli import options
from ldm.cli.jobs import Job
from ldm.cli.parser import Arguments
from ldm.cli.values import typed
from ldm.config import load_preset, preset_names
from ldm.errors import InputError
from ldm.modules.tome.config import ToMeConfig
from ldm.settings import Settings

# Fields that are flags; beside them the form has "preset", "ratio" and "more".
FLAGS = (
    *("prompt", "negative_prompt", "W", "H", "sampler", "steps", "scale", "seed", "n_iter"),
    "strength",
)
MODEL_FLAGS = ("W", "H", "sampler", "steps", "scale")  # which have defaults of the model
NO_PRESET = "none"
# Settings that a field or the picture's number within its run stands for.
_COVERED = {*FLAGS, "n_samples", "C", "f"}
_FLAG_NAMES = {"eta": "ddim-eta"}  # where it is not the setting's own

Form = dict[str, Any]


def first_form(args: Arguments, defaults: Mapping[str, Any]) -> Form:
    """What the fields say at first: the command line's flags over the model's defaults."""
    form: Form = {name: getattr(args, name) for name in FLAGS}
    form |= {name: defaults.get(name) for name in FLAGS if form[name] is None}
    form["preset"] = args.tome_preset or NO_PRESET
    form["ratio"] = preset_ratio(form["preset"]) or 0.0
    is_auto = args.tome_ratio == "auto"
    if args.tome_ratio is not None and not is_auto:
        form["ratio"] = float(args.tome_ratio)
    return {**form, "more": "tome.ratio auto" if is_auto else ""}


def preset_ratio(preset: str) -> float | None:
    """The ratio that a preset sets, which the form then can change; None where it sets none."""
    ratio = 0.0 if preset == NO_PRESET else load_preset(preset).get("ratio")
    return float(ratio) if isinstance(ratio, float | int) else None


def read_form(args: Arguments, form: Mapping[str, Any]) -> Job:
    """The settings that a form asks for, over those of the command line.

    Args:
        args: what was given to the program.
        form: the fields; an empty field (None) leaves the choice to the model.

    Raises:
        InputError: a value is out of range, or a line of ``more`` is no setting.
    """
    changes: dict[str, Any] = {name: form[name] for name in FLAGS}
    more = _more(form["more"])
    if form["preset"] != args.tome_preset:  # which may be a file of the user's own
        changes["tome-preset"] = None if form["preset"] == NO_PRESET else form["preset"]
    changes |= {"tome-ratio": None, "no-tome": None}  # what the fields say stands instead
    if form["preset"] != NO_PRESET:
        if preset_ratio(form["preset"]) not in (None, form["ratio"]):
            changes["tome-ratio"] = form["ratio"]
    elif form["ratio"]:
        changes["tome-ratio"] = form["ratio"]
    own = options.wishes(args).changed({**changes, **more})
    tome = own.tome
    if tome is None and form["preset"] == NO_PRESET:
        tome = False  # the fields say so, whatever the model's YAML does
    return Job(own.settings(), tome)


def _more(text: str) -> dict[str, Any]:
    """Further settings, a line each: a flag's name and its value."""
    changes: dict[str, Any] = {}
    for line in filter(str.strip, text.splitlines()):
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            raise InputError(f"{line}: {error}") from None
        changes[name] = typed(name, words)
    return changes


def form_of(
    args: Arguments,
    about: Mapping[str, Any],
    resolve: Callable[[Any], ToMeConfig],
) -> tuple[Form, str]:
    """The fields with which a picture was made, and what of it they cannot say.

    Args:
        args: what was given to the program.
        about: the picture's settings; see Pipeline.about.
        resolve: what Token Merging settings come to; see Pipeline.tome_config.
    """
    known = {field.name for field in dataclasses.fields(Settings)}
    form: Form = {name: about.get(name, getattr(args, name)) for name in FLAGS}
    form["n_iter"] = 1
    lines = [
        f"{_FLAG_NAMES.get(name, name)} {_text(about[name])}"
        for name in sorted((known - _COVERED) & about.keys())
        if about[name] != getattr(args, name) and about[name] is not None
    ]
    wanted = about.get("tome", {})
    for preset, ratio, more in _tome_fields(wanted):
        candidate = {**form, "preset": preset, "ratio": ratio, "more": "\n".join([*lines, *more])}
        try:
            config = resolve(read_form(args, candidate).tome)
        except InputError:
            continue  # these keys do not go together; another candidate may
        if _plain(config) == wanted:
            return candidate, ""
    note = "its Token Merging settings are more than the fields can say; they are left out"
    return {**form, "preset": NO_PRESET, "ratio": 0.0, "more": "\n".join(lines)}, note


def _tome_fields(wanted: Mapping[str, Any]) -> list[tuple[str, float, list[str]]]:
    """Presets, ratios and lines that might stand for a configuration, the shortest first."""
    ratio = wanted.get("ratio")
    amount = float(ratio) if isinstance(ratio, float | int) else 0.0
    found: list[tuple[str, float, list[str]]] = [
        (preset, amount, []) for preset in (NO_PRESET, *preset_names())
    ]
    usual = _plain(ToMeConfig())
    keys = [k for k in wanted if k != "ratio" and wanted[k] is not None]
    for names in ([k for k in keys if wanted[k] != usual.get(k)], keys):
        lines = [f"tome.{key} {_text(wanted[key])}" for key in names if wanted[key] != []]
        found.append((NO_PRESET, amount, lines))
    return found


def _plain(config: ToMeConfig) -> dict[str, Any]:
    """A configuration as a picture's JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _text(value: Any) -> str:
    """A value as a flag has it."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return ",".join(":".join(map(str, pair)) for pair in value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))
