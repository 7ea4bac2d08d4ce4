"""The tab that draws a grid: one prompt, and the values of two settings as rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ldm.cli.values import typed
from ldm.errors import InputError, shown
from ldm.modules.tome.config import ToMeWish
from ldm.web.desk import Desk
from ldm.web.fields import Fields
from ldm.web.form import Base, Form, read_form
from ldm.web.limits import LABELS
from ldm.web.task import Draw, Grid

MOST_CELLS = 64
NOTHING, RATIO, PRESET, PART = "nothing", "ToMe ratio", "ToMe preset", "Prompt part"
NAMES = {
    LABELS[name]: name
    for name in ("steps", "sampler", "schedule", "seed", "scale", "hires_scale", "W", "H")
}
AXES = (NOTHING, RATIO, PRESET, *NAMES, PART)
INFO = (
    "Values are divided by commas. Of the prompt's part, the first one is what the prompt has, "
    "the others take its place."
)


class CompareTab:
    """Grids.

    Args:
        desk: takes the jobs.
        fields: the form.
    """

    def __init__(self, desk: Desk, fields: Fields) -> None:
        self.desk = desk
        self.fields = fields

    def lay_out(self) -> None:
        """The tab's own fields."""
        gr.Markdown(f"Each picture says its time and its distance to the unmerged one. {INFO}")
        self.inputs = []
        first = (
            ("Rows", "rows", PRESET, "none, quality, balanced, fast"),
            ("Columns", "columns", NOTHING, ""),
        )
        for title, name, axis, values in first:
            with gr.Row():
                setting = gr.Dropdown(
                    list(AXES), value=axis, label=title, elem_id=f"{name}-of", min_width=120
                )
                text = gr.Textbox(
                    values, label=f"Values of the {name}", elem_id=f"{name}", min_width=160
                )
            self.inputs += [setting, text]

    def draw(self, model: str, form: Form, control: str | None, *axes: Any) -> None:
        """Order a job.

        Raises:
            InputError: it cannot be accepted.
        """
        guide = self.fields.guide(form, control)
        draws, grid = cells(self.desk, self.fields.base, model, form, *axes)
        self.desk.order(model, draws, vae=form.get("vae") or "", grid=grid, guide=guide)


def cells(
    desk: Desk,
    base: Base,
    model: str,
    form: Form,
    rows: str,
    of_rows: str,
    columns: str,
    of_columns: str,
) -> tuple[list[Draw], Grid]:
    """What to draw for a grid: each cell, and before it what it is without merging.

    Args:
        desk: knows what merging comes to.
        base: the command line.
        model: its name.
        form: the values that all cells share.
        rows: what the rows differ in.
        of_rows: its values.
        columns: likewise.
        of_columns: likewise.

    Raises:
        InputError: a value cannot be used, or there are too many.
    """
    if rows == columns != NOTHING:
        raise InputError(f"Rows and Columns are both {rows}: choose another for one of them")
    form = {**form, "n_iter": 1, "n_samples": 1}
    if form["seed"] in (None, -1):
        form["seed"] = read_form(base, form).settings.seed  # the same for all cells
    lines, across = _values(rows, of_rows, "Rows"), _values(columns, of_columns, "Columns")
    if len(lines) * len(across) > MOST_CELLS:
        n = f"{len(lines)} x {len(across)}"
        raise InputError(f"Rows and Columns: {n} pictures; allowed are {MOST_CELLS}")
    draws: list[Draw] = []
    plain: dict[Any, int] = {}  # settings -> number of the unmerged draw
    own, compared = [], []
    for line in lines:
        for column in across:
            changed = dict(form)
            axes = ((rows, line, lines), (columns, column, across))
            for axis, value, values in sorted(axes, key=lambda one: one[0] != PRESET):
                _change(changed, axis, value, values, base)  # a preset first: it sets the ratio
            words = [_called(axis, value) for axis, value, _ in axes if axis != NOTHING]
            draw = read_form(base, changed)
            key = (draw.settings, changed["prompt"])
            is_off = desk.runner.resolve(model, draw.tome).changes_nothing
            if key not in plain:
                plain[key] = len(draws)
                off = ToMeWish(is_off=True)
                draws.append(Draw(draw.settings, off, " | ".join(words), is_plain=True))
            own.append(plain[key] if is_off else len(draws))
            compared.append(plain[key])
            if not is_off:
                draws.append(Draw(draw.settings, draw.tome, " | ".join(words)))
    return draws, Grid(len(across), tuple(own), tuple(compared))


def _values(axis: str, text: str, title: str) -> list[str]:
    if axis == NOTHING:
        return [""]
    if axis not in AXES or not isinstance(text, str):
        raise InputError(f"{title} {shown(axis)}: choose one of {', '.join(AXES)}")
    found = [word.strip() for word in text.split(",")]
    found = list(dict.fromkeys(word for word in found if word))
    if not found:
        raise InputError(f"Values of the {title.lower()}: give some, divided by commas")
    return found


def _change(form: Form, axis: str, value: str, values: Sequence[str], base: Base) -> None:
    """Give one setting its value."""
    if axis == NOTHING:
        return
    if axis == RATIO:
        form["ratio"] = typed("tome.ratio", [value])
    elif axis == PRESET:
        form["preset"] = value
        form["ratio"] = base.preset_ratio(value) or 0.0
    elif axis == PART:
        if values[0] not in (form["prompt"] or ""):
            raise InputError(f"Prompt part {shown(values[0])}: it is not in the prompt")
        form["prompt"] = form["prompt"].replace(values[0], value)
    else:
        form[NAMES[axis]] = typed(NAMES[axis], [value])


def _called(axis: str, value: str) -> str:
    return value if axis == PART else f"{axis} {value}"
