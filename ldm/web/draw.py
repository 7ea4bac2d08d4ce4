"""The tabs that draw one choice of settings: from the prompt, over a picture, in a part of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gradio as gr

from ldm.errors import InputError
from ldm.modules.tome.config import ToMeWish
from ldm.web.desk import Desk
from ldm.web.fields import QUIET, Fields, picture_field, pixels_of
from ldm.web.form import Form, read_form
from ldm.web.task import Draw
from ldm.web.uploads import mask_of

BRUSH = """
<div id="brush" class="brush" hidden>
  <canvas id="brush-picture" aria-hidden="true"></canvas>
  <canvas id="brush-mask" tabindex="0" role="img"
    aria-label="Brush over the part to redraw; E erases, C clears"></canvas>
</div>
<div class="brush-tools">
  <label>Brush <input type="range" id="brush-size" min="2" max="200" value="40"></label>
  <label><input type="checkbox" id="brush-erases"> Erase</label>
  <button type="button" id="brush-clear">Clear</button>
  <button type="button" id="brush-invert">Invert</button>
</div>
"""


class PictureTab:
    """What the two have in common: a picture to start from, and how a job is ordered.

    Args:
        desk: takes the jobs.
        fields: the form.
    """

    init: gr.Image

    def __init__(self, desk: Desk, fields: Fields) -> None:
        self.desk = desk
        self.fields = fields

    def connect(self) -> None:
        """The picture's own size is taken, not the model's."""
        size = [self.fields.by_name["W"], self.fields.by_name["H"]]
        self.init.upload(None, js="() => [null, null]", outputs=size, **QUIET)

    def order(
        self,
        model: str,
        form: Form,
        compare: bool,
        control: str | None,
        init: str | None = None,
        mask: str | None = None,
    ) -> None:
        """Order a job.

        Args:
            model: its name.
            form: the fields.
            compare: draw it without merging, too.
            control: the file of a control picture.
            init: the file of a picture to start from.
            mask: what was brushed, in base64.

        Raises:
            InputError: it cannot be accepted.
        """
        self.desk.order(
            model,
            with_unmerged(self.desk, model, read_form(self.fields.base, form), compare),
            init=None if init is None else pixels_of(init),
            mask=None if mask is None else mask_of(mask, "Mask"),
            init_name="" if init is None else Path(init).name,
            vae=form.get("vae") or "",
            is_pair=compare,
            guide=self.fields.guide(form, control),
        )


class DrawTab(PictureTab):
    """txt2img and img2img."""

    def lay_out(self) -> None:
        """The tab's own fields."""
        self.mode = gr.Radio(["txt2img", "img2img"], value="txt2img", label="Draw", elem_id="mode")
        with gr.Group(visible=False) as self.start:
            self.init = picture_field("Picture to start from", "init", 240)
            self.fields.slider_of_strength()

    def connect(self) -> None:
        """What its fields do to others."""
        super().connect()
        self.mode.change(
            lambda mode: gr.update(visible=mode == "img2img"), self.mode, self.start, **QUIET
        )

    def draw(
        self,
        model: str,
        form: Form,
        compare: bool,
        control: str | None,
        mode: str,
        init: str | None,
    ) -> None:
        """Order a job; see `order`."""
        if mode == "img2img" and init is None:
            raise InputError("img2img needs a picture to start from: drop one on the field")
        self.order(model, form, compare, control, init if mode == "img2img" else None)


class InpaintTab(PictureTab):
    """A part of a picture is redrawn, which is brushed over."""

    def lay_out(self) -> None:
        """The tab's own fields."""
        self.init = picture_field("Picture to redraw a part of", "paint")
        gr.HTML(BRUSH, elem_id="brush-box")
        # filled when a job is ordered, with what was brushed
        self.mask = gr.Textbox(visible="hidden", elem_id="mask")

    def connect(self) -> None:
        """Its picture goes below the brush, too."""
        super().connect()
        self.init.change(None, js="(file) => ldm.brushOn(file)", inputs=self.init, **QUIET)

    def draw(
        self,
        model: str,
        form: Form,
        compare: bool,
        control: str | None,
        init: str | None,
        mask: str | None,
    ) -> None:
        """Order a job; see `order`."""
        if init is None:
            raise InputError("inpainting needs a picture: drop one on the field")
        if not mask:
            raise InputError("there is nothing to paint: brush over the part to be redrawn")
        self.order(model, form, compare, control, init, mask)


def with_unmerged(desk: Desk, model: str, draw: Draw, compare: bool) -> tuple[Draw, ...]:
    """What is to be drawn, and, where it is to be compared, the same noise without merging.

    Raises:
        InputError: nothing is merged anyway.
    """
    if not compare:
        return (draw,)
    if desk.runner.resolve(model, draw.tome).changes_nothing:
        raise InputError("there is no merging to compare with: choose a preset or a ratio")
    merged = dataclasses.replace(draw, label="merged")
    return merged, dataclasses.replace(draw, tome=ToMeWish(is_off=True), label="unmerged")
