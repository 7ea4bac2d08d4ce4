"""The page's right side: how jobs go, the picture, the gallery, and what to do with a picture."""

from __future__ import annotations

import html
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.checkpoint.files import stem_of
from ldm.errors import InputError, shown
from ldm.images import picture_texts
from ldm.infotext import understood
from ldm.web.fields import QUIET, Fields, failure
from ldm.web.form import Form, form_of
from ldm.web.pictures import Pictures
from ldm.web.runner import Runner

# Filled by page.js from what /live/state says.
STATUS = """
<div id="live"></div>
<div id="waiting"></div>
<p id="announce" class="only-read" role="status" aria-live="polite"></p>
"""
VIEW = """
<figure id="view" class="view"><p class="hint">The picture appears here.</p></figure>
<div id="wipe" class="wipe" hidden></div>
"""
GALLERY = """
<div id="gallery" class="gallery" role="list" aria-label="Gallery"></div>
<details id="details" hidden><summary>Its settings</summary><dl id="about"></dl></details>
"""


class GallerySide:
    """Status, picture, gallery.

    Args:
        runner: knows models, and what merging comes to.
        fields: the form that a picture's settings go to.
        pictures: finished ones.
    """

    def __init__(self, runner: Runner, fields: Fields, pictures: Pictures) -> None:
        self.runner = runner
        self.fields = fields
        self.pictures = pictures

    def lay_out(self) -> None:
        """All of it."""
        with gr.Column(elem_id="status", elem_classes="status"):
            self.said = gr.HTML(elem_id="said")
            gr.HTML(STATUS)
        gr.HTML(VIEW)
        gr.HTML(GALLERY)
        with gr.Row():
            self.reuse = gr.Button("Use settings", elem_id="reuse", min_width=110, size="sm")
            self.send = gr.Button("Send to img2img", elem_id="send", min_width=110, size="sm")
            self.paint = gr.Button(
                "Send to inpaint", elem_id="send-paint", min_width=110, size="sm"
            )
            self.delete = gr.Button("Delete", elem_id="delete", min_width=80, size="sm")
        self.dropped = gr.File(
            label="Drop a picture here to use its settings",
            file_types=[".png", ".jpg", ".jpeg", ".webp"],
            height=120,
            elem_id="dropped",
        )
        self.chosen = gr.Textbox(visible="hidden", elem_id="chosen")  # name of the picture shown

    def connect(self, mode: Any, init: Any, paint: Any, tabs: Any, what: Any) -> None:
        """What the buttons do.

        Args:
            mode: txt2img or img2img.
            init: the picture that img2img starts from.
            paint: the picture that inpainting starts from.
            tabs: which hold them.
            what: which of them is open.
        """
        form = list(self.fields.by_name.values())
        outputs = [self.said, self.fields.model, mode, *form]
        chosen: dict[str, Any] = {"js": "() => ldm.chosen()", "inputs": self.chosen}
        self.reuse.click(self._on_reuse, outputs=outputs, **chosen, **QUIET)
        self.dropped.upload(self._on_drop, self.dropped, outputs, **QUIET)
        size = [self.fields.by_name["W"], self.fields.by_name["H"]]

        def send(name: str) -> dict[Any, Any]:
            return self._on_send(name, {mode: "img2img", what: "draw"}, tabs, "draw", init, size)

        def send_paint(name: str) -> dict[Any, Any]:
            return self._on_send(name, {what: "inpaint"}, tabs, "inpaint", paint, size)

        self.send.click(send, outputs=[self.said, tabs, what, mode, init, *size], **chosen, **QUIET)
        self.paint.click(
            send_paint, outputs=[self.said, tabs, what, paint, *size], **chosen, **QUIET
        )
        self.delete.click(None, js="() => ldm.deleteChosen()", **QUIET)

    def _on_send(
        self, name: str, more: dict[Any, Any], tabs: Any, tab: str, field: Any, size: list[Any]
    ) -> dict[Any, Any]:
        try:
            path = self._path(name)
        except InputError as error:
            return {self.said: failure(error)}
        sizes = dict.fromkeys(size)  # the picture's own, not the model's
        return {self.said: "", tabs: gr.Tabs(selected=tab), field: str(path), **more, **sizes}

    def _on_reuse(self, name: str) -> dict[Any, Any]:
        try:
            path = self._path(name)
        except InputError as error:
            return {self.said: failure(error)}
        return self._use(path, path.name)

    def _on_drop(self, file: str | None) -> dict[Any, Any]:
        if file is None:
            return {self.said: ""}
        path = Path(file)
        try:
            return self._use(path, path.name)
        finally:
            path.unlink(missing_ok=True)  # it has been read

    def _path(self, name: str) -> Path:
        if not name:
            raise InputError("there is no picture yet: draw one, or choose one below")
        return self.pictures.path(name)

    def _use(self, path: Path, name: str) -> dict[Any, Any]:
        """Fill the form with a picture's settings, and say what cannot be used of them."""
        try:
            form, notes = self._form(picture_texts(path), name)
        except InputError as error:
            return {self.said: failure(InputError(str(error).replace(str(path), name)))}
        says = [f"These are the settings of {name}", *notes]
        text = "".join(f"<p>{html.escape(line)}</p>" for line in says)
        return {**self.fields.updates(form), self.said: text}

    def _form(self, texts: dict[str, str], name: str) -> tuple[Form, list[str]]:
        model = self.runner.loaded or next(iter(self.runner.models))
        info = self.runner.info(model)
        found = understood(texts, name).without_missing_loras()
        own = {f"its model, {shown(stem_of(info.path))} (--ckpt)"}
        own |= {f"its VAE, {shown(info.vae.name)} (--vae)"} if info.vae else set()
        found.left_out = [line for line in found.left_out if line not in own]
        usual = self.fields.base.first_form(info.defaults)
        resolve = partial(self.runner.resolve, model)
        return form_of(self.fields.base, found, resolve, usual)
