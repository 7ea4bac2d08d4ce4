"""What the page's fields say, as settings, and settings as what the fields say.

Values from the page, from pictures and from the API are checked as values by `ldm.cli.values`:
none is a word of a command line, a path, or more than what it stands for.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.cli import options
from ldm.cli.parser import Arguments
from ldm.cli.values import Wishes, typed
from ldm.config import AskedTome, load_preset, preset_names
from ldm.errors import InputError, escaped, shown
from ldm.infotext import Found
from ldm.modules.tome.config import ToMeConfig, ToMeWish
from ldm.modules.tome.keys import KEYS
from ldm.web.task import Draw

Form = dict[str, Any]
# Fields that are settings; beside them: "preset", "ratio", "hires_ratio", "more" and OTHERS.
SETTINGS = (
    *("prompt", "negative_prompt", "W", "H", "n_iter", "n_samples", "sampler", "schedule"),
    *("steps", "scale", "seed", "strength", "emphasis", "long_prompt", "clip_skip"),
    *("hires_scale", "hires_strength", "hires_steps", "hires_upscaler", "reuse_deep"),
)
OTHERS: Form = {"vae": "", "controlnet": "", "control_strength": 1.0, "control_canny": False}
OPEN = ("hires_steps", "reuse_deep")  # 0 in their fields leaves the choice to others
MODEL_SETTINGS = ("W", "H", "sampler", "steps", "scale")  # which have defaults of the model
NO_PRESET = "none"
OURS = ("quality", "balanced", "fast")  # presets that come first


@dataclass(frozen=True)
class Base:
    """What the command line says; the fields lie over it.

    Attributes:
        wishes: the flags.
        presets: that can be named, with their keys.
    """

    wishes: Wishes
    presets: Mapping[str, Mapping[str, Any]]

    @classmethod
    def from_arguments(cls, args: Arguments) -> Base:
        """Read the program's arguments."""
        wishes = options.wishes(args)
        names = [name for name in OURS if name in preset_names()]
        names += [name for name in preset_names() if name not in OURS]
        presets = {name: load_preset(name) for name in names}
        if wishes.preset_name is not None:  # of the user's own shell, so perhaps a file
            presets[wishes.preset_name] = dict(wishes.preset)
        return cls(wishes, presets)

    def preset_ratio(self, preset: Any) -> float | None:
        """The ratio that a preset sets, which the form then can change; None: it sets none.

        Raises:
            InputError: no such preset is offered.
        """
        if preset == NO_PRESET:
            return 0.0
        if not isinstance(preset, str) or preset not in self.presets:
            known = ", ".join([NO_PRESET, *self.presets])
            raise InputError(f"ToMe preset {shown(preset)}: choose one of {known}")
        ratio = self.presets[preset].get("ratio")
        return float(ratio) if isinstance(ratio, float | int) else None

    def first_form(self, defaults: Mapping[str, Any]) -> Form:
        """What the fields say at first: the command line's flags over the model's defaults."""
        form: Form = {name: self.wishes.given.get(name, defaults.get(name)) for name in SETTINGS}
        form["preset"] = self.wishes.preset_name or NO_PRESET
        form["ratio"] = self.preset_ratio(form["preset"]) or 0.0
        again = self.wishes.hires_ratio
        form |= {"hires_ratio": "" if again is None else str(again), "more": "", **OTHERS}
        for name in OPEN:
            form[name] = form[name] or 0  # a field without a number shows 0
        ratio = self.wishes.keys.get("ratio")
        if isinstance(ratio, float | int):
            form["ratio"] = float(ratio)
        elif ratio is not None:
            form["more"] = f"tome.ratio {ratio}"
        return form


def read_form(base: Base, form: Mapping[str, Any]) -> Draw:
    """The settings that a form asks for.

    Args:
        base: of the command line.
        form: the fields; an empty field (None) leaves the choice to the model.

    Raises:
        InputError: a value is of another kind or out of range, or a line of ``more`` is no setting.
    """
    changes: Form = {name: form[name] for name in SETTINGS}
    changes["seed"] = -1 if form["seed"] is None else form["seed"]
    changes |= {name: form[name] or None for name in OPEN}
    preset, ratio = form["preset"], form["ratio"] or 0.0
    usual = base.preset_ratio(preset)
    if preset != base.wishes.preset_name:
        changes["tome.preset"] = None if preset == NO_PRESET else preset
    changes |= {"no-tome": None, "tome.ratio": None if usual in (None, ratio) else ratio}
    wishes = base.wishes.changed({**changes, **_more(form["more"])})
    settings = wishes.settings()
    again = form["hires_ratio"]
    if isinstance(again, str):
        again = typed("tome.hires_ratio", again.split()) if again.strip() else None
    # without a second pass it says nothing
    tome = wishes.changed({"tome.hires_ratio": again if settings.hires_scale > 1 else None}).tome
    if tome == ToMeWish() and preset == NO_PRESET:
        tome = ToMeWish(is_off=True)  # the fields say so, whatever the model's YAML does
    return Draw(settings, tome)


def _more(text: Any) -> dict[str, Any]:
    """Further settings, a line each: a name and its value."""
    if not isinstance(text, str):
        raise InputError(f"more {shown(text)}: allowed is a text")
    changes: dict[str, Any] = {}
    for line in filter(None, map(str.strip, text.split("\n"))):
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            raise InputError(f"{shown(line)}: {error}") from None
        changes[name] = typed(name, words)
    return changes


# --- from a picture's settings to the fields ------------------------------------------------


def form_of(
    base: Base, found: Found, resolve: Callable[[AskedTome], ToMeConfig], usual: Form
) -> tuple[Form, list[str]]:
    """The fields with which a picture was made, and what of it they cannot say, field by field.

    Args:
        base: of the command line.
        found: what the picture says. Nothing of it is believed.
        resolve: what Token Merging settings come to; see Runner.resolve.
        usual: the fields where the picture says nothing.
    """
    form, notes, lines = dict(usual), list(found.left_out), []
    form |= {"preset": NO_PRESET, "ratio": 0.0, "hires_ratio": "", "hires_scale": 1.0}
    form |= {"n_iter": 1, "n_samples": 1}
    for name, value in found.settings.items():
        if name in ("n_iter", "n_samples", "C", "f"):
            continue
        try:
            base.wishes.changed({"sampler": None, "schedule": None, "eta": None}).changed(
                {name: value}
            ).check()
        except InputError as error:
            notes.append(escaped(error, 300))
            continue
        if name in SETTINGS:
            form[name] = value
        elif value != base.wishes.given.get(name):
            lines.append(f"{name} {_text(value)}")
    form["more"] = "\n".join(lines)
    if not found.tome:
        return form, notes
    try:
        wanted = resolve(found.tome)
    except (InputError, ValueError, TypeError) as error:
        return form, [*notes, escaped(error, 300)]
    for candidate in _tome_forms(base, form, found.tome):
        try:
            if resolve(read_form(base, {**candidate, "seed": 0}).tome) == wanted:
                return candidate, notes
        except InputError:
            continue  # these do not go together; another may
    return form, [*notes, "its Token Merging settings are more than the fields can say"]


def _tome_forms(base: Base, form: Form, keys: Mapping[str, Any]) -> Iterable[Form]:
    """Forms that might stand for a configuration's keys, those with the fewest lines first."""
    own = dict(keys)
    hires = own.get("hires")
    if isinstance(hires, Mapping) and isinstance(hires.get("ratio"), float | int):
        form = {**form, "hires_ratio": str(hires["ratio"])}
        del own["hires"]
    ratio = own.get("ratio")
    if isinstance(ratio, float | int):
        form = {**form, "ratio": float(ratio)}
        del own["ratio"]
    for preset in (NO_PRESET, *base.presets):
        yield {**form, "preset": preset}
    lines = [f"tome.{key} {_text(own[key])}" for key in KEYS if own.get(key, []) != []]
    yield {**form, "more": "\n".join(filter(None, [form["more"], *lines]))}


def _text(value: Any) -> str:
    """A value as a line has it; a newline in it does not begin another line."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        text = ",".join(":".join(map(str, pair)) for pair in value)
    elif isinstance(value, list):
        text = " ".join(map(str, value))
    else:
        is_word = value is None or isinstance(value, bool)
        text = str(value).lower() if is_word else shlex.quote(str(value))
    return text.replace("\n", " ").replace("\r", " ")
