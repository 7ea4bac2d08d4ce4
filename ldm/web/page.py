"""The page: its layout, and what happens in it. Jobs live in the queue, not here."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.errors import InputError, OutOfMemory, is_out_of_memory
from ldm.web.compare import CompareTab
from ldm.web.desk import Desk
from ldm.web.draw import DrawTab, InpaintTab
from ldm.web.endpoints import Endpoints
from ldm.web.fields import QUIET, Fields, failure
from ldm.web.form import MODEL_SETTINGS, Base
from ldm.web.gallery import GallerySide
from ldm.web.live import Live
from ldm.web.uploads import tidy

TITLE = "Stable Diffusion with Token Merging"
TABS = ("draw", "inpaint", "compare")
STORED = ("model", "mode", "what", "compare")  # kept in the browser, besides the form
HERE = Path(__file__).parent
logger = logging.getLogger(__name__)


class Page:
    """The page, around a desk.

    Args:
        desk: takes the jobs.
        base: what was given to the program.
        live: what is said of jobs and pictures.
    """

    def __init__(self, desk: Desk, base: Base, live: Live) -> None:
        self.desk = desk
        runner = desk.runner
        model = runner.loaded or next(iter(runner.models))
        first = base.first_form(runner.info(model).defaults)
        self.fields = Fields(runner, base, first)
        self.draw_tab = DrawTab(desk, self.fields)
        self.inpaint_tab = InpaintTab(desk, self.fields)
        self.compare_tab = CompareTab(desk, self.fields)
        self.side = GallerySide(runner, self.fields, live.pictures)
        # What is stored belongs to one command line: another one's flags win over it.
        key = hashlib.sha256(json.dumps([first, list(runner.models)]).encode()).hexdigest()[:16]
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as self.blocks:
            self.stored = gr.BrowserState(None, storage_key=f"ldm-form-{key}", secret="ldm")
            gr.Markdown(f"# {TITLE}", elem_id="title")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    self._lay_out_form()
                with gr.Column(scale=3, min_width=300):
                    self.side.lay_out()
            self._connect()
            Endpoints(desk, base, live).add()
        self.blocks.queue(default_concurrency_limit=8, max_size=None)

    def _lay_out_form(self) -> None:
        self.fields.lay_out_prompt()
        with gr.Row(elem_id="buttons", elem_classes="buttons"):
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=70)
            self.skip = gr.Button("Skip", elem_id="skip", min_width=70)
        parts = (self.draw_tab, self.inpaint_tab, self.compare_tab)
        layouts: list[Callable[[], None]] = [part.lay_out for part in parts]
        titles = ("Draw", "Inpaint", "Compare")
        self.tabs = gr.Tabs(elem_id="tabs")
        self.tab: dict[str, Any] = {}
        with self.tabs:
            for name, title, lay_out in zip(TABS, titles, layouts, strict=True):
                with gr.Tab(title, id=name, render_children=True) as self.tab[name]:
                    lay_out()
        self.what = gr.Textbox(TABS[0], visible="hidden", elem_id="what")  # the tab that is open
        self.fields.lay_out_settings()

    # --- what happens -----------------------------------------------------------------------

    def _connect(self) -> None:
        form = list(self.fields.by_name.values())
        for part in (self.fields, self.draw_tab, self.inpaint_tab):
            part.connect()
        self.side.connect(
            self.draw_tab.mode, self.draw_tab.init, self.inpaint_tab.init, self.tabs, self.what
        )
        for name, tab in self.tab.items():
            tab.select(None, js=f"() => '{name}'", outputs=self.what, **QUIET)
        kept = [self.fields.model, self.draw_tab.mode, self.what, self.fields.compare, *form]
        gr.on(
            [component.change for component in kept],
            None,
            js="(...values) => [values]",
            inputs=kept,
            outputs=self.stored,
            **QUIET,
        )
        self.blocks.load(
            _safe(self._on_load, self.side.said),
            inputs=self.stored,
            outputs=[self.side.said, self.tabs, *kept],
            **QUIET,
        ).then(None, js="() => ldm.filled()", **QUIET)
        self.fields.model.input(
            _safe(self._on_model, self.side.said),
            inputs=self.fields.model,
            outputs=[self.side.said, *(self.fields.by_name[name] for name in MODEL_SETTINGS)],
            **QUIET,
        )
        mask = self.inpaint_tab.mask
        self.draw.click(
            _safe(self._on_draw, self.side.said),
            js="(mask, ...rest) => [ldm.mask(rest[0]), ...rest]",
            inputs=[
                *(mask, self.what, self.fields.model, self.fields.compare, self.draw_tab.mode),
                *(self.draw_tab.init, self.inpaint_tab.init, self.fields.control),
                *(*self.compare_tab.inputs, *form),
            ],
            outputs=self.side.said,
            trigger_mode="multiple",
            concurrency_limit=1,  # in the order of the clicks
            concurrency_id="draw",
            **QUIET,
        )
        self.stop.click(None, js="() => ldm.post('stop')", **QUIET)
        self.skip.click(None, js="() => ldm.post('skip')", **QUIET)

    def _on_draw(
        self,
        mask: str | None,
        what: str,
        model: str,
        compare: bool,
        mode: str,
        init: str | None,
        paint: str | None,
        control: str | None,
        *values: Any,
    ) -> dict[Any, Any]:
        n_axes = len(self.compare_tab.inputs)
        axes, form = values[:n_axes], self.fields.form(values[n_axes:])
        if what == "compare":
            self.compare_tab.draw(model, form, control, *axes)
        elif what == "inpaint":
            self.inpaint_tab.draw(model, form, compare, control, paint, mask)
        else:
            self.draw_tab.draw(model, form, compare, control, mode, init)
        tidy(Path(os.environ["GRADIO_TEMP_DIR"]))
        return {self.side.said: ""}

    def _on_model(self, model: str) -> dict[Any, Any]:
        defaults = self.desk.runner.info(model).defaults
        values = {self.fields.by_name[name]: defaults.get(name) for name in MODEL_SETTINGS}
        return {self.side.said: "", **values}

    def _on_load(self, stored: Any) -> dict[Any, Any]:
        """Fill the form with what the browser has kept, as far as it can be."""
        names = [*STORED, *self.fields.by_name]
        if not isinstance(stored, list) or len(stored) != len(names):
            return {self.side.said: ""}
        kept = dict(zip(names, stored, strict=True))
        components = {
            **{"model": self.fields.model, "mode": self.draw_tab.mode, "what": self.what},
            "compare": self.fields.compare,
            **self.fields.by_name,
        }
        kept = {name: value for name, value in kept.items() if fits(components[name], value)}
        if "preset" in kept:
            kept.setdefault("ratio", 0.0)
        update: dict[Any, Any] = {components[name]: value for name, value in kept.items()}
        if kept.get("what") in TABS:
            update[self.tabs] = gr.Tabs(selected=kept["what"])
        return {self.side.said: "", **update, **self.fields.updates(kept)}


def fits(component: Any, value: Any) -> bool:
    """Whether a component can have a value that a browser has kept."""
    if isinstance(component, gr.Dropdown | gr.Radio):
        return value in [choice[-1] for choice in component.choices]
    if isinstance(component, gr.Checkbox):
        return isinstance(value, bool)
    if isinstance(component, gr.Textbox):
        return isinstance(value, str)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_number = is_number and abs(value) < 2**63  # NaN is not
    if isinstance(component, gr.Slider):
        return is_number and component.minimum <= value <= component.maximum
    return is_number or value is None


def _safe(handler: Callable[..., dict[Any, Any]], said: Any) -> Callable[..., dict[Any, Any]]:
    """A handler whose failures are a line on the page, and never the end of the server."""

    @wraps(handler)
    def handle(*values: Any) -> dict[Any, Any]:
        try:
            return handler(*values)
        except InputError as error:
            return {said: failure(error)}
        except BaseException as error:
            if is_out_of_memory(error):
                return {said: failure(OutOfMemory())}
            logger.exception("a request failed")
            what = f"{type(error).__name__}: {error} (the terminal has more)"
            return {said: failure(InputError(what))}

    return handle
