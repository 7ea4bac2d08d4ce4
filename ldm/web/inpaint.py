"""The tab that redraws a part of a picture, which is brushed over."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from ldm.errors import InputError
from ldm.images import load_rgb
from ldm.web.desk import Desk
from ldm.web.draw import with_unmerged
from ldm.web.fields import QUIET, Fields
from ldm.web.form import Form, read_form
from ldm.web.uploads import mask_of, named

CANVAS = """
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


class InpaintTab:
    """Inpainting.

    Args:
        desk: takes the jobs.
        fields: the form.
    """

    def __init__(self, desk: Desk, fields: Fields) -> None:
        self.desk = desk
        self.fields = fields

    def lay_out(self) -> None:
        """The tab's own fields."""
        self.init = gr.Image(
            label="Picture to redraw a part of",
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            height=200,
            elem_id="paint",
        )
        gr.HTML(CANVAS, elem_id="brush-box")
        # filled when a job is ordered, with what was brushed
        self.mask = gr.Textbox(visible="hidden", elem_id="mask")

    def connect(self) -> None:
        """Its picture goes below the brush, and says how large the result is."""
        size = [self.fields.by_name["W"], self.fields.by_name["H"]]
        self.init.change(None, js="(file) => ldm.brushOn(file)", inputs=self.init, **QUIET)
        self.init.upload(None, js="() => [null, null]", outputs=size, **QUIET)

    def draw(
        self, model: str, form: Form, compare: bool, init: str | None, mask: str | None
    ) -> None:
        """Order a job.

        Raises:
            InputError: it cannot be accepted.
        """
        if init is None:
            raise InputError("inpainting needs a picture: drop one on the field")
        if not mask:
            raise InputError("there is nothing to paint: brush over the part to be redrawn")
        with named(init, Path(init).name):
            pixels = load_rgb(init)
        self.desk.order(
            model,
            with_unmerged(self.desk, model, read_form(self.fields.base, form), compare),
            init=pixels,
            mask=mask_of(mask, "Mask"),
            init_name=Path(init).name,
            vae=form.get("vae") or "",
            is_pair=compare,
        )
