"""The form's fields, which all kinds of drawing share."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.addons import embedding_words, find_addons, offered
from ldm.errors import InputError, OutOfMemory
from ldm.images import Pixels, load_rgb
from ldm.settings import SAMPLERS, SCHEDULES, UPSCALERS
from ldm.text import check_kind
from ldm.web.form import NO_PRESET, Base, Form, read_form
from ldm.web.limits import LABELS, in_labels
from ldm.web.runner import Runner
from ldm.web.task import Guide
from ldm.web.uploads import named
from ldm.web.words import line_of

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
CONTROL = ("controlnet", "control_strength", "control_canny")
TOME = ("preset", "ratio", "hires_ratio", "more")  # fields that the line about merging depends on


class Fields:
    """Components by the names of a form's entries.

    Args:
        runner: knows models, and what merging comes to.
        base: the command line.
        first: what the fields say at first.
    """

    def __init__(self, runner: Runner, base: Base, first: Form) -> None:
        self.runner = runner
        self.base = base
        self.first = first
        self.by_name: dict[str, Any] = {}

    # --- layout -----------------------------------------------------------------------------

    def lay_out_prompt(self) -> None:
        """Model and prompts."""
        names = list(self.runner.models)
        self.model = gr.Dropdown(
            names, value=self.runner.loaded or names[0], label="Model", elem_id="model"
        )
        self._text("prompt", lines=3, info="Ctrl+Enter draws")
        self._text("negative_prompt", lines=1)

    def lay_out_settings(self) -> None:
        """Everything else."""
        with gr.Row():
            for name in ("W", "H", "n_iter", "n_samples"):
                self._number(name)
        with gr.Row():
            self._choice("sampler", SAMPLERS)
            self._choice("schedule", SCHEDULES)
        with gr.Row():
            self._number("steps")
            self._number("scale", precision=None)
        with gr.Row(elem_classes="seed-row"):
            self._number("seed", label="Seed (-1: any)", min_width=140)
            self.any_seed = gr.Button("Random seed", elem_id="any-seed", min_width=100, size="sm")
            self.same_seed = gr.Button("Reuse seed", elem_id="same-seed", min_width=100, size="sm")
        self._lay_out_tome()
        with gr.Accordion("Second pass: enlarge and redraw", open=self.first["hires_scale"] > 1):
            with gr.Row():
                self._number("hires_scale", precision=None, info="1 is off")
                self._slider("hires_strength", 0, 1, 0.01)
            with gr.Row():
                self._number("hires_steps", info="0: as many as above")
                self._choice("hires_upscaler", UPSCALERS)
            with gr.Row():
                self._text("hires_ratio", "ToMe ratio", info="empty: as above", min_width=80)
        with gr.Accordion("LoRAs, embeddings and VAE", open=False):
            self._lay_out_addons()
        with gr.Accordion("ControlNet: a picture guides the layout", open=False):
            self._lay_out_control()
        with gr.Accordion("More settings", open=bool(self.first["more"])):
            self._check("emphasis", "Emphasis: (word:1.2), (word) and [word] are weights")
            self._check("long_prompt", "Long prompts: read all of it, not only 75 tokens")
            with gr.Row():
                self._number("clip_skip", info="1: all layers; 2: without the last")
                self._number(
                    "reuse_deep", info="2: in every second step (DeepCache); 0: as the model"
                )
            self._text(
                "more",
                label="Any other setting, a name and its value on each line",
                lines=2,
                placeholder="tome.window 5\neta 0.5",
            )

    def _lay_out_tome(self) -> None:
        presets = [NO_PRESET, *self.base.presets]
        with gr.Group():
            self.by_name["preset"] = gr.Dropdown(
                [(_titled(name), name) for name in presets],
                value=self.first["preset"],
                label="ToMe preset",
                elem_id="preset",
            )
            self._slider("ratio", 0, 0.95, 0.0025, "ToMe ratio", "share merged away; 0 is off")
            self.by_name["ratio"].interactive = (
                self.base.preset_ratio(self.first["preset"]) is not None
            )
            self.tome_line = gr.HTML(
                self.tome_says(self.first), padding=True, elem_classes="tome-line"
            )
            self.compare = gr.Checkbox(
                label="Compare: draw it without merging, too", elem_id="compare"
            )

    def _lay_out_addons(self) -> None:
        loras, words = list(find_addons("lora")), list(embedding_words())
        gr.Markdown(
            "They are added to the prompt. Files come from `models/lora` and `models/embeddings`."
        )
        with gr.Row():
            self.lora = gr.Dropdown(loras, label="LoRA", elem_id="lora", value=None)
            self.weight = gr.Number(0.8, label="Weight", min_width=80, elem_id="lora-weight")
            self.add_lora = gr.Button("Add", elem_id="add-lora", min_width=80)
        with gr.Row():
            self.word = gr.Dropdown(words, label="Embedding", elem_id="embedding", value=None)
            self.add_word = gr.Button("Add", elem_id="add-embedding", min_width=80)
        self.by_name["vae"] = gr.Dropdown(
            [("the model's own", ""), *find_addons("vae")],
            value="",
            label="VAE",
            info="files of models/vae",
            elem_id="vae",
        )

    def _lay_out_control(self) -> None:
        self.by_name["controlnet"] = gr.Dropdown(
            [("none", ""), *find_addons("controlnet")],
            value="",
            label=LABELS["controlnet"],
            info="files of models/controlnet",
            elem_id="controlnet",
        )
        self.control = picture_field("Control picture: edges, depth, ...", "control")
        self._check("control_canny", "Find its edges first (Canny), from any picture")
        self._slider("control_strength", 0, 2, 0.05)

    def guide(self, form: Form, picture: str | None) -> Guide | None:
        """The ControlNet that a form asks for.

        Args:
            form: the fields' values.
            picture: the control picture's file.

        Raises:
            InputError: a value is none of those that can be chosen, or the picture is missing.
        """
        net, strength, canny = (form[name] for name in CONTROL)
        if net in (None, ""):
            return None
        offered("controlnet", net)
        if not 0 <= check_kind(strength, float, "control_strength") <= 2:
            raise InputError(f"control_strength {strength}: allowed is 0 to 2")
        if picture is None:
            raise InputError("controlnet needs a control picture: drop one on its field")
        edges = check_kind(canny, bool, "control_canny")
        return Guide(net, pixels_of(picture), float(strength), edges)

    def _text(self, name: str, label: str = "", **kwargs: Any) -> None:
        self.by_name[name] = gr.Textbox(
            self.first[name], label=label or LABELS[name], elem_id=name, **kwargs
        )

    def _number(self, name: str, label: str = "", precision: int | None = 0, **kwargs: Any) -> None:
        kwargs.setdefault("min_width", 80)
        self.by_name[name] = gr.Number(
            self.first[name],
            label=label or LABELS[name],
            precision=precision,
            elem_id=name,
            **kwargs,
        )

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        self.by_name[name] = gr.Dropdown(
            list(choices), value=self.first[name], label=LABELS[name], min_width=110, elem_id=name
        )

    def _check(self, name: str, label: str) -> None:
        self.by_name[name] = gr.Checkbox(self.first[name], label=label, elem_id=name)

    def slider_of_strength(self) -> None:
        """How much of a picture to start from is redrawn."""
        self._slider("strength", 0, 1, 0.01, info="how much is redrawn; 1 ignores the picture")

    def _slider(
        self, name: str, low: float, high: float, step: float, label: str = "", info: str = ""
    ) -> None:
        self.by_name[name] = gr.Slider(
            minimum=low,
            maximum=high,
            value=self.first[name],
            step=step,
            label=label or LABELS[name],
            info=info or None,
            elem_id=name,
        )

    # --- what happens -----------------------------------------------------------------------

    def connect(self) -> None:
        """What fields do to each other."""
        get = self.by_name
        get["preset"].input(self._on_preset, get["preset"], get["ratio"], **QUIET)
        gr.on(
            [get[name].change for name in TOME] + [self.model.change],
            self._on_tome,
            inputs=[self.model, *get.values()],
            outputs=self.tome_line,
            trigger_mode="always_last",
            **QUIET,
        )
        self.any_seed.click(None, js="() => -1", outputs=get["seed"], **QUIET)
        self.same_seed.click(None, js="() => ldm.lastSeed()", outputs=get["seed"], **QUIET)
        self.add_lora.click(
            None,
            js="(prompt, name, weight) => ldm.withLora(prompt, name, weight)",
            inputs=[get["prompt"], self.lora, self.weight],
            outputs=get["prompt"],
            **QUIET,
        )
        self.add_word.click(
            None,
            js="(prompt, word) => ldm.withWord(prompt, word)",
            inputs=[get["prompt"], self.word],
            outputs=get["prompt"],
            **QUIET,
        )

    def form(self, values: tuple[Any, ...]) -> Form:
        """The fields' values by their names."""
        return dict(zip(self.by_name, values, strict=True))

    def updates(self, form: Form) -> dict[Any, Any]:
        """What fills the fields with a form's values."""
        update = {self.by_name[name]: form[name] for name in self.by_name if name in form}
        if "preset" in form:
            is_free = self.base.preset_ratio(form["preset"]) is not None
            update[self.by_name["ratio"]] = gr.update(value=form["ratio"], interactive=is_free)
        return update

    def _on_preset(self, preset: str) -> Any:
        ratio = self.base.preset_ratio(preset)
        return gr.update(value=ratio or 0.0, interactive=ratio is not None)

    def _on_tome(self, model: str, *values: Any) -> str:
        return self.tome_says(self.form(values), model)

    def tome_says(self, form: Form, model: str | None = None) -> str:
        """The line about merging, or what is wrong with it."""
        model = model or self.runner.loaded or next(iter(self.runner.models))
        try:
            line = self.runner.describe(model, read_form(self.base, {**form, "seed": 0}).tome)
        except InputError as error:
            return failure(error)
        words = "" if form["preset"] == NO_PRESET else line_of(form["preset"])
        return f"<p>{html.escape(line)}</p><small>{html.escape(words)}</small>"


def picture_field(label: str, name: str, height: int = 200) -> gr.Image:
    """A field that takes a picture."""
    return gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=height,
        elem_id=name,
    )


def pixels_of(file: str) -> Pixels:
    """What was dropped on a field, (H, W, 3); errors say its name, not where it lies."""
    with named(file, Path(file).name):
        return load_rgb(file)


def failure(error: InputError) -> str:
    """An error, as the page shows it."""
    text = str(error) if isinstance(error, OutOfMemory) else in_labels(str(error))
    return f'<p class="error" role="alert">error: {html.escape(text)}</p>'


def _titled(preset: str) -> str:
    words = line_of(preset)
    return f"{preset}: {words}" if words else preset
