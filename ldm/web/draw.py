"""The tab that draws: from the prompt alone, or from a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gradio as gr

from ldm.errors import InputError
from ldm.images import load_rgb
from ldm.web.desk import Desk
from ldm.web.fields import QUIET, Fields
from ldm.web.form import Form, read_form
from ldm.web.task import Draw
from ldm.web.uploads import named


class DrawTab:
    """txt2img and img2img.

    Args:
        desk: takes the jobs.
        fields: the form.
    """

    def __init__(self, desk: Desk, fields: Fields) -> None:
        self.desk = desk
        self.fields = fields

    def lay_out(self) -> None:
        """The tab's own fields."""
        self.mode = gr.Radio(["txt2img", "img2img"], value="txt2img", label="Draw", elem_id="mode")
        with gr.Group(visible=False) as self.start:
            self.init = gr.Image(
                label="Picture to start from",
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                height=240,
                elem_id="init",
            )
            self.fields.slider_of_strength()

    def connect(self) -> None:
        """What its fields do to others."""
        self.mode.change(
            lambda mode: gr.update(visible=mode == "img2img"), self.mode, self.start, **QUIET
        )
        size = [self.fields.by_name["W"], self.fields.by_name["H"]]
        # the picture's own size, not the model's
        self.init.upload(None, js="() => [null, null]", outputs=size, **QUIET)

    def draw(self, model: str, form: Form, compare: bool, mode: str, init: str | None) -> None:
        """Order a job.

        Raises:
            InputError: it cannot be accepted.
        """
        pixels = None
        if mode == "img2img":
            if init is None:
                raise InputError("img2img needs a picture to start from: drop one on the field")
            with named(init, Path(init).name):
                pixels = load_rgb(init)
        self.desk.order(
            model,
            with_unmerged(self.desk, model, read_form(self.fields.base, form), compare),
            init=pixels,
            init_name=Path(init).name if pixels is not None and init else "",
            vae=form.get("vae") or "",
            is_pair=compare,
        )


def with_unmerged(desk: Desk, model: str, draw: Draw, compare: bool) -> tuple[Draw, ...]:
    """What is to be drawn, and, where it is to be compared, the same noise without merging.

    Raises:
        InputError: nothing is merged anyway.
    """
    if not compare:
        return (draw,)
    if desk.runner.resolve(model, draw.tome).is_off:
        raise InputError("there is no merging to compare with: choose a preset or a ratio")
    merged = dataclasses.replace(draw, label="merged")
    return merged, dataclasses.replace(draw, tome=False, label="unmerged")
