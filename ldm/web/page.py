"""The page's layout, and what its buttons do. The only module that knows gradio."""

from __future__ import annotations

import html
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ldm.cli.parser import Arguments
from ldm.config import preset_names
from ldm.errors import InputError
from ldm.images import read_settings
from ldm.settings import SAMPLERS
from ldm.web.form import (
    MODEL_FLAGS,
    NO_PRESET,
    Form,
    first_form,
    form_of,
    preset_ratio,
    read_form,
)
from ldm.web.guard import Guard
from ldm.web.runner import Drawn, Event, Finished, Message, Progress, Runner, Stopped, Task

N_SHOWN = 24  # pictures in the gallery
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
UPLOAD_LIMIT = "64mb"
CSS = """
.status p { margin: 0 0 4px 0; overflow-wrap: anywhere; }
.status progress { width: 100%; height: 10px; appearance: none; border: 0; }
.status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.status progress::-webkit-progress-value { background: var(--color-accent); }
.status progress::-moz-progress-bar { background: var(--color-accent); }
.status .error { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.dark .status .error { color: #fca5a5; }
.status .tome, .tome-line p { font-family: var(--font-mono); font-size: 0.85em; }
.view img { width: 100%; object-fit: contain; }
@media (max-width: 640px) { .view { height: 340px !important; } }
footer { display: none !important; }
"""

Update = dict[Any, Any]
logger = logging.getLogger(__name__)


class Page:
    """The page, around a runner.

    Args:
        runner: does the work.
        args: what was given to the program: the fields' first values, and what has no field.
    """

    def __init__(self, runner: Runner, args: Arguments) -> None:
        self.runner = runner
        self.args = args
        self._stops: dict[str, set[threading.Event]] = defaultdict(set)  # by browser tab
        with gr.Blocks(
            title="Stable Diffusion with Token Merging", analytics_enabled=False, fill_width=True
        ) as self.blocks:
            self._lay_out()
            self._connect()
        self.blocks.queue(default_concurrency_limit=None)  # the runner has one job at a time

    # --- layout -----------------------------------------------------------------------------

    def _lay_out(self) -> None:
        defaults = self.runner.pipeline.defaults if self.runner.pipeline else {}
        first = first_form(self.args, defaults)
        presets = [NO_PRESET, *preset_names()]
        if first["preset"] not in presets:
            presets.append(first["preset"])
        names = list(self.runner.models)
        self.fields: dict[str, Any] = {}
        gr.Markdown("## Stable Diffusion with Token Merging")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.model = gr.Dropdown(
                    names, value=self.runner.loaded or names[0], label="Model", elem_id="model"
                )
                self._text("prompt", "Prompt", first, lines=3)
                self._text("negative_prompt", "Negative prompt", first, lines=1)
                self.mode = gr.Radio(
                    ["txt2img", "img2img"], value="txt2img", label="Draw", elem_id="mode"
                )
                with gr.Group(visible=False) as self.start:
                    self.init = gr.Image(
                        label="Picture to start from",
                        type="filepath",
                        image_mode=None,
                        sources=["upload", "clipboard"],
                        height=240,
                        elem_id="init",
                    )
                    self.fields["strength"] = gr.Slider(
                        minimum=0,
                        maximum=1,
                        value=first["strength"],
                        step=0.01,
                        label="Strength",
                        info="how much is redrawn; 1 ignores the picture",
                        elem_id="strength",
                    )
                with gr.Row():
                    self._number("W", "Width", first)
                    self._number("H", "Height", first)
                    self._number("n_iter", "Pictures", first)
                with gr.Row():
                    self.fields["sampler"] = gr.Dropdown(
                        list(SAMPLERS),
                        value=first["sampler"],
                        label="Sampler",
                        min_width=120,
                        elem_id="sampler",
                    )
                    self._number("steps", "Steps", first)
                with gr.Row():
                    self._number("scale", "Guidance scale", first, precision=None)
                    self._number("seed", "Seed (-1: any)", first)
                with gr.Group():
                    self.fields["preset"] = gr.Dropdown(
                        presets, value=first["preset"], label="ToMe preset", elem_id="preset"
                    )
                    ratio = preset_ratio(first["preset"])
                    self.fields["ratio"] = gr.Slider(
                        minimum=0,
                        maximum=0.95,
                        value=first["ratio"],
                        step=0.0025,
                        label="ToMe ratio",
                        info="share of tokens merged away; 0 is off",
                        interactive=ratio is not None,
                        elem_id="ratio",
                    )
                    self.tome_line = gr.HTML(
                        self._tome_line(first), padding=True, elem_classes="tome-line"
                    )
                    self.compare = gr.Checkbox(
                        label="Compare: draw it without merging, too", elem_id="compare"
                    )
                with gr.Accordion("More settings", open=bool(first["more"])):
                    self._text(
                        "more",
                        "A flag and its value on each line",
                        first,
                        lines=2,
                        placeholder="tome.window 5\nschedule karras\nhires-scale 2",
                    )
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
                    self.stop = gr.Button("Stop", elem_id="stop", min_width=100)
                self.status = gr.HTML(elem_id="status", elem_classes="status")
                self.view = gr.Image(
                    label="Picture",
                    interactive=False,
                    format="png",
                    height=512,
                    buttons=["download", "fullscreen"],
                    elem_id="view",
                    elem_classes="view",
                )
                self.wipe = gr.ImageSlider(
                    label="Merged | unmerged",
                    interactive=False,
                    format="png",
                    visible=False,
                    max_height=512,
                    elem_id="wipe",
                )
                self.gallery = gr.Gallery(
                    label="Gallery",
                    interactive=False,
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    buttons=[],
                    elem_id="gallery",
                )
                with gr.Row():
                    self.send = gr.Button("Send to img2img", elem_id="send", min_width=140)
                    self.reuse = gr.Button("Use its settings", elem_id="reuse", min_width=140)
                self.dropped = gr.File(
                    label="Drop a picture here to use its settings",
                    file_types=[".png"],
                    height=120,
                    elem_id="dropped",
                )
        self.paths = gr.State([])  # of the gallery
        self.chosen = gr.State(None)  # path of the picture that the buttons are about

    def _text(self, name: str, label: str, first: Form, **kwargs: Any) -> None:
        self.fields[name] = gr.Textbox(first[name], label=label, elem_id=name, **kwargs)

    def _number(self, name: str, label: str, first: Form, precision: int | None = 0) -> None:
        self.fields[name] = gr.Number(
            first[name], label=label, precision=precision, min_width=90, elem_id=name
        )

    # --- what happens -----------------------------------------------------------------------

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        form = list(self.fields.values())
        ratio = self.fields["ratio"]
        self.blocks.load(
            self._on_load, outputs=[self.model, self.gallery, self.paths, self.chosen], **quiet
        )
        self.model.input(
            self._on_model,
            inputs=[self.model],
            outputs=[self.status, self.tome_line, *(self.fields[name] for name in MODEL_FLAGS)],
            **quiet,
        )
        self.mode.change(
            lambda mode: gr.update(visible=mode == "img2img"), self.mode, self.start, **quiet
        )
        self.init.upload(  # the picture's own size, not the model's
            lambda: (None, None), outputs=[self.fields["W"], self.fields["H"]], **quiet
        )
        self.fields["preset"].input(_ratio_of, self.fields["preset"], ratio, **quiet)
        gr.on(
            [self.fields["preset"].change, ratio.change, self.fields["more"].change],
            lambda *values: self._tome_line(dict(zip(self.fields, values, strict=True))),
            inputs=form,
            outputs=self.tome_line,
            trigger_mode="always_last",
            **quiet,
        )
        results = [self.status, self.view, self.wipe, self.gallery, self.paths, self.chosen]
        self.draw.click(
            self._on_draw,
            inputs=[self.paths, self.model, self.mode, self.init, self.compare, *form],
            outputs=results,
            trigger_mode="multiple",
            **quiet,
        )
        self.stop.click(self._on_stop, queue=False, **quiet)
        self.gallery.select(
            self._on_select, inputs=self.paths, outputs=[self.view, self.wipe, self.chosen], **quiet
        )
        self.send.click(
            self._on_send,
            inputs=self.chosen,
            outputs=[self.status, self.mode, self.init, self.fields["W"], self.fields["H"]],
            **quiet,
        )
        for trigger, source in ((self.reuse.click, self.chosen), (self.dropped.upload, None)):
            trigger(
                self._on_reuse, inputs=source or self.dropped, outputs=[self.status, *form], **quiet
            )

    def _on_load(self) -> tuple[Any, ...]:
        folder = self.runner.gallery.folder / "samples"
        paths = sorted(map(str, folder.glob("*.png")))[: -N_SHOWN - 1 : -1]
        return self.runner.loaded, paths, paths, paths[0] if paths else None

    def _on_model(self, model: str, request: gr.Request) -> Iterator[Update]:
        lines = _Lines()
        for _ in self._follow(lines, request, lambda stop: self.runner.load(model, stop)):
            yield {self.status: lines.html()}
        if self.runner.pipeline is not None and self.runner.loaded == model:
            defaults = self.runner.pipeline.defaults
            values = {self.fields[name]: defaults.get(name) for name in MODEL_FLAGS}
            yield {self.status: lines.html(), **values}

    def _on_draw(
        self,
        request: gr.Request,
        paths: list[str],
        model: str,
        mode: str,
        init: str | None,
        compare: bool,
        *values: Any,
    ) -> Iterator[Update]:
        form = dict(zip(self.fields, values, strict=True))

        def start(stop: threading.Event) -> Iterator[Event]:
            if mode == "img2img" and init is None:
                raise InputError("img2img needs a picture to start from: drop one on the field")
            file = Path(init) if mode == "img2img" and init is not None else None
            job = read_form(self.args, form)
            task = Task(model, job, file, file.name if file else "", compare)
            return self.runner.draw(task, stop)

        lines = _Lines()
        pair: dict[bool, str] = {}
        for event in self._follow(lines, request, start):
            update: Update = {self.status: lines.html()}
            if isinstance(event, Progress) and event.preview is not None:
                update |= {
                    self.view: gr.update(value=event.preview, visible=True),
                    self.wipe: gr.update(visible=False),
                }
            elif isinstance(event, Drawn):
                path = str(event.path)
                pair.setdefault(event.is_merged, path)
                paths = [path, *paths][:N_SHOWN]
                update |= {self.gallery: paths, self.paths: paths, self.chosen: path}
                if len(pair) < 2:
                    update |= _shown(self, path)
                else:
                    update |= {
                        self.view: gr.update(visible=False),
                        self.wipe: gr.update(value=(pair[True], pair[False]), visible=True),
                    }
            yield update

    def _follow(
        self,
        lines: _Lines,
        request: gr.Request,
        start: Callable[[threading.Event], Iterator[Event]],
    ) -> Iterator[Event | None]:
        """What is told of a job, which is added to the lines; one that ends badly adds why."""
        stop = threading.Event()
        stops = self._stops[str(request.session_hash)]
        stops.add(stop)
        try:
            yield None
            for event in start(stop):
                lines.hear(event)
                yield event
            lines.end()
        except Stopped:
            lines.end("Stopped")
        except InputError as error:
            lines.end(error=str(error))
        except Exception as error:  # the server stays up, whatever happens in a job
            logger.exception("a job failed")
            lines.end(error=f"{type(error).__name__}: {error} (the terminal has more)")
        finally:
            stop.set()
            stops.discard(stop)
        yield None

    def _on_stop(self, request: gr.Request) -> None:
        for stop in list(self._stops[str(request.session_hash)]):
            stop.set()

    def _on_select(self, paths: list[str], event: gr.SelectData) -> Update:
        path = paths[event.index]
        return {**_shown(self, path), self.chosen: path}

    def _on_send(self, path: str | None) -> Update:
        if path is None:
            return {self.status: _error("there is no picture yet: draw one, or choose one below")}
        return {
            self.mode: "img2img",
            self.init: path,
            self.fields["W"]: None,
            self.fields["H"]: None,
        }

    def _on_reuse(self, path: str | None) -> Update:
        try:
            if path is None:
                raise InputError("there is no picture yet: draw one, or choose one below")
            name = Path(path).name
            try:
                about = read_settings(path)
            except InputError as error:
                raise InputError(str(error).replace(path, name)) from None
            form, note = form_of(self.args, about, self.runner.resolve)
        except InputError as error:
            return {self.status: _error(str(error))}
        says = f"These are the settings of {name}" + (f"; {note}" if note else "")
        update: Update = {self.fields[key]: value for key, value in form.items()}
        free = preset_ratio(form["preset"]) is not None
        update[self.fields["ratio"]] = gr.update(value=form["ratio"], interactive=free)
        return {**update, self.status: f"<p>{html.escape(says)}</p>"}

    def _tome_line(self, form: Form) -> str:
        try:
            line = self.runner.describe(read_form(self.args, form).tome)
        except InputError as error:
            return f'<div class="status">{_error(str(error))}</div>'
        return f"<p>{html.escape(line)}</p>"

    # --- serving ----------------------------------------------------------------------------

    def serve(self, host: str, port: int | None) -> str:
        """Start the server, which then runs in a thread; returns its address.

        Raises:
            InputError: it cannot listen there.
        """
        guard = Middleware(Guard, hosts=LOOPBACK if host in LOOPBACK else None)
        try:
            self.blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                inbrowser=False,
                prevent_thread_lock=True,
                ssr_mode=False,
                mcp_server=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                allowed_paths=[str((self.runner.gallery.folder / "samples").resolve())],
                max_file_size=UPLOAD_LIMIT,
                theme=gr.themes.Default(
                    font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
                ),
                css=CSS,
                app_kwargs={"middleware": [guard]},
            )
        except OSError as error:
            where = f"port {port}" if port is not None else "any port from 7860 on"
            raise InputError(f"cannot listen at {host}, {where} ({error})") from None
        return str(self.blocks.local_url)

    def close(self) -> None:
        """Stop what runs, and the server."""
        self.runner.close()
        self.blocks.close(verbose=False)


class _Lines:
    """What the page shows of a job: a bar while it runs, and the lines that stay."""

    def __init__(self) -> None:
        self.progress: Progress | None = Progress("Starting")
        self.lines: list[str] = []

    def hear(self, event: Event) -> None:
        """Take in what is told."""
        if isinstance(event, Progress):
            self.progress = event
        elif isinstance(event, Message):
            is_tome = event.text.startswith("ToMe:")
            kind = ' class="tome"' if is_tome else ""
            text = f"warning: {event.text}" if event.is_warning else event.text
            self.lines.append(f"<p{kind}>{html.escape(text)}</p>")
        elif isinstance(event, Drawn):
            self.progress = Progress("Saved", 1.0)
            self.lines.append(f"<p>Saved {html.escape(str(event.path))}</p>")
        elif isinstance(event, Finished):
            what = "With" if event.is_merged else "Without"
            step = "" if event.step_seconds is None else f", {event.step_seconds:.3g} s a step"
            self.lines.append(f"<p>{what} merging: {event.seconds:.3g} s{step}</p>")

    def end(self, text: str = "", error: str = "") -> None:
        """The job is over."""
        self.progress = None
        if text:
            self.lines.append(f"<p>{html.escape(text)}</p>")
        if error:
            self.lines.append(_error(error))

    def html(self) -> str:
        """All of it."""
        bar = ""
        if self.progress is not None:
            text = html.escape(self.progress.text)
            bar = f'<p>{text}</p><progress value="{self.progress.share:.3f}"></progress>'
        return bar + "".join(self.lines)


def _error(text: str) -> str:
    return f'<p class="error" role="alert">error: {html.escape(text)}</p>'


def _shown(page: Page, path: str) -> Update:
    return {
        page.view: gr.update(value=path, visible=True),
        page.wipe: gr.update(visible=False),
    }


def _ratio_of(preset: str) -> Any:
    """The slider, for a preset."""
    ratio = preset_ratio(preset)
    return gr.update(value=ratio or 0.0, interactive=ratio is not None)
