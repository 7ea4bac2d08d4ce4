"""What A1111's clients send, as settings: every value checked, what has no counterpart named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.addons import find_addons, offered
from ldm.checkpoint.files import stem_of
from ldm.cli.values import Wishes
from ldm.errors import InputError, escaped, shown
from ldm.settings import SCHEDULES
from ldm.text import check_kind
from ldm.web_ui import WEB_UI_SAMPLERS, WEB_UI_SCHEDULES, WEB_UI_UPSCALERS

Body = dict[str, Any]
# A1111's names of settings that mean the same here.
SAME = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "cfg_scale": "scale",
    "width": "W",
    "height": "H",
    "batch_size": "n_samples",
    "n_iter": "n_iter",
}
# Likewise, where more than the name differs.
THEIRS = {
    "strength": "denoising_strength",
    "sampler": "sampler_name",
    "schedule": "scheduler",
    "hires_scale": "hr_scale",
    "hires_strength": "denoising_strength",
    "hires_steps": "hr_second_pass_steps",
    "clip_skip": "CLIP_stop_at_last_layers",
}
WHOLE = {"seed", "steps", "W", "H", "n_samples", "n_iter", "hires_steps"}
# Values that change nothing, besides None, "", 0, False and empty lists.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "seed_resize_from_h": (-1,),
    "seed_resize_from_w": (-1,),
    "s_noise": (1,),
    "image_cfg_scale": (1.5,),
    "initial_noise_multiplier": (1,),
    "hr_checkpoint_name": ("Use same checkpoint",),
    "hr_sampler_name": ("Use same sampler",),
    "hr_scheduler": ("Use same scheduler",),
    "hr_additional_modules": (["Use same choices"],),
    "distilled_cfg_scale": (3.5,),  # of Forge, for Flux alone
    "seed_enable_extras": (True,),
    "styles": (["None"], ["None", "None"]),
}
# What the second pass may have of its own there; here it is the same.
AGAIN = {
    "hr_prompt": "prompt",
    "hr_negative_prompt": "negative_prompt",
    "hr_cfg": "cfg_scale",
    "hr_sampler_name": "sampler_name",
    "hr_scheduler": "scheduler",
}
# What says how to answer, not what to draw.
ABOUT_THE_ANSWER = {
    *("save_images", "do_not_save_samples", "do_not_save_grid", "include_init_images", "comments"),
    *("send_images", "force_task_id", "session_hash"),
    *("url", "auth"),  # of the server itself, which SillyTavern writes into the body, too
}
# Of painting inside a mask: done otherwise here, and said so.
OTHERWISE = (
    *("mask_blur", "mask_blur_x", "mask_blur_y", "mask_round"),
    *("inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding"),
)


@dataclass(frozen=True)
class Options:
    """What ``/sdapi/v1/options`` sets for all jobs, and ``override_settings`` for one.

    Attributes:
        model: a checkpoint's name; None: the one that the program was started with.
        ratio: share of tokens merged away; None: as the program was started.
        img2img_ratio: likewise, in img2img; None: as ``ratio``.
        hires_ratio: likewise, in the second pass.
        tome: keys of ``tome_config``, and ``preset``.
        clip_skip: which layer of the text encoder is used, 1 is the last; None: as the program was
            started.
        vae: a name among ``models/vae``; empty: the model's own.
        not_used: what was named and means nothing here.
    """

    model: str | None = None
    ratio: float | None = None
    img2img_ratio: float | None = None
    hires_ratio: float | None = None
    tome: Mapping[str, Any] = field(default_factory=dict)
    clip_skip: int | None = None
    vae: str = ""
    not_used: tuple[str, ...] = ()

    def changed(self, given: Any, models: Mapping[str, Path]) -> Options:
        """These options with others over them.

        Raises:
            InputError: a value cannot be used; the message names it.
        """
        new = self
        for name, value in check_kind(given, dict, "override_settings").items():
            if name == "sd_model_checkpoint":
                new = replace(new, model=None if value in (None, "") else _model(value, models))
            elif name == "token_merging_ratio":
                new = replace(new, ratio=_number(name, value))
            elif name == "token_merging_ratio_img2img":  # 0 of these two is A1111's for "as ratio"
                new = replace(new, img2img_ratio=_number(name, value) or None)
            elif name == "token_merging_ratio_hr":
                new = replace(new, hires_ratio=_number(name, value) or None)
            elif name == "tome":
                new = replace(new, tome=check_kind(value, dict, "tome"))
            elif name == "sd_vae":
                own = value in (None, "", "None", "Automatic")
                new = replace(new, vae="" if own else _vae(value))
            elif name == "CLIP_stop_at_last_layers":
                skip = None if value is None else check_kind(_whole(value), int, name)
                new = replace(new, clip_skip=skip)
            else:
                new = replace(new, not_used=(*new.not_used, escaped(name, 80)))
        return new

    def changes(self, has_picture: bool = False) -> Body:
        """What they change in the wishes, for a job with a picture to start from or without."""
        changes: Body = {}
        keys = dict(self.tome)
        ratio = self.ratio
        if has_picture and self.img2img_ratio is not None:
            ratio = self.img2img_ratio
        if ratio is not None or keys:
            changes["no_tome"] = None
        if "preset" in keys:
            changes["tome.preset"] = keys.pop("preset")
        if ratio is not None:
            changes["tome.ratio"] = ratio
        if self.hires_ratio is not None:
            changes["tome.hires_ratio"] = self.hires_ratio
        if self.clip_skip is not None:
            changes["clip_skip"] = self.clip_skip
        return {**changes, **({"tome": keys} if keys else {})}


@dataclass(frozen=True)
class Order:
    """What a body asks for; ``not_used`` names what of it means nothing here."""

    wishes: Wishes
    options: Options
    not_used: tuple[str, ...]


def read_body(
    body: Any,
    base: Wishes,
    options: Options,
    models: Mapping[str, Path],
    has_picture: bool = False,
) -> Order:
    """Read a body of ``txt2img`` or ``img2img``, but for its pictures.

    Args:
        body: as it came.
        base: the program's flags.
        options: that hold for all.
        models: by their names.
        has_picture: it is of ``img2img``.

    Raises:
        InputError: a value cannot be used, or asks for what cannot be had.
    """
    body = dict(check_kind(body, dict, "the request"))
    overrides = _open(body.pop("override_settings", None), {})
    options = options.changed(overrides, models)
    if overrides.get("token_merging_ratio"):  # then it is that of img2img, too
        options = replace(options, img2img_ratio=None)
    if "tome" in body:
        options = options.changed({"tome": body.pop("tome")}, models)
    skip = _whole(body.pop("clip_skip", None))  # so SD.Next calls it
    if skip:
        if overrides.get("CLIP_stop_at_last_layers") not in (None, skip):
            raise InputError(
                f"clip_skip {shown(skip)}: override_settings has another CLIP_stop_at_last_layers"
            )
        options = options.changed({"CLIP_stop_at_last_layers": skip}, models)
    for again, first in AGAIN.items():
        if again in body and body[again] == body.get(first):
            del body[again]
    changes, not_used = options.changes(has_picture), list(options.not_used)
    restores = body.pop("override_settings_restore_afterwards", None)
    if overrides and restores is False:  # overrides never outlive their request
        not_used.append("override_settings_restore_afterwards")
    if not body.get("subseed_strength"):
        body.pop("subseed", None)
    for theirs, ours in SAME.items():
        if body.get(theirs) is not None:
            changes[ours] = _whole(body[theirs]) if ours in WHOLE else body[theirs]
        body.pop(theirs, None)
    changes.setdefault("seed", -1)
    changes |= _sampler(body)
    if changes.get("sampler") == "ddim":
        changes["eta"] = body.pop("eta", None)
    elif body.pop("eta", None) not in (None, 0, 1):
        not_used.append("eta")
    changes |= _second_pass(body)
    has_mask = bool(body.get("mask"))
    if has_mask and changes.pop("strength", 1) != 1:  # what is in the hole is not looked at
        not_used.append(THEIRS["strength"])
    for name in ("init_images", "mask", "inpainting_mask_invert", *ABOUT_THE_ANSWER):
        body.pop(name, None)
    if body.pop("resize_mode", None) not in (None, 0, 1):  # 1 is what is done here
        not_used.append("resize_mode")
    for name in OTHERWISE:
        value = body.pop(name, None)
        if has_mask and value:
            not_used.append(name)
    for name, value in body.items():
        if value and value not in NEUTRAL.get(name, ()):
            is_option = not Options().changed({name: value}, models).not_used
            way = "put it into override_settings" if is_option else "this cannot be done here"
            raise InputError(f"{shown(name)} {shown(value)}: {way}")
    return Order(base.changed(changes), options, tuple(not_used))


def switch(value: Any, name: str) -> bool:
    """Whether something is on, which clients write as true or 1.

    Raises:
        InputError: it is neither on nor off.
    """
    if value not in (None, "", False, True):
        raise InputError(f"{name}: must be true or false, not {shown(value)}")
    return bool(value)


def in_their_words(text: str) -> str:
    """A message with the settings' names at its beginning as the clients have them."""
    theirs = THEIRS | {ours: name for name, ours in SAME.items()}
    return re.sub(r"\A\w+(?=[ :])", lambda name: theirs.get(name[0], name[0]), text)


def _sampler(body: Body) -> Body:
    """Sampler and schedule; in older clients one name has both."""
    index = _open(body.pop("sampler_index", None), None)
    name = _open(body.pop("sampler_name", None), index)
    schedule = _open(body.pop("scheduler", None), "")
    known = {theirs.lower(): ours for ours, theirs in WEB_UI_SAMPLERS.items()}
    changes: Body = {}
    if name is not None:
        words = check_kind(name, str, "sampler_name").lower()
        for spacing, label in WEB_UI_SCHEDULES.items():
            is_open = schedule in (None, "", "Automatic", "automatic", spacing, label)
            before = words.removesuffix(f" {label.lower()}")
            if is_open and before != words and before in known:
                words, schedule = before, spacing
        if known.get(words, words) not in WEB_UI_SAMPLERS:
            names = ", ".join(dict.fromkeys(WEB_UI_SAMPLERS.values()))
            raise InputError(f"sampler_name {shown(name)}: allowed is {names}")
        changes["sampler"] = known.get(words, words)
    if schedule != "":
        words = check_kind(schedule, str, "scheduler").lower().replace(" ", "_")
        if words not in ("automatic", *SCHEDULES):
            raise InputError(f"scheduler {shown(schedule)}: allowed is {', '.join(SCHEDULES)}")
        if words != "automatic":
            changes["schedule"] = words
    return changes


def _second_pass(body: Body) -> Body:
    """The pass on the enlarged picture; ``denoising_strength`` is its own, where there is one."""
    is_on = switch(body.pop("enable_hr", None), "enable_hr")
    strength, scale = body.pop("denoising_strength", None), body.pop("hr_scale", None)
    steps, upscaler = body.pop("hr_second_pass_steps", None), body.pop("hr_upscaler", None)
    if not is_on:
        for name in [name for name in body if name.startswith("hr_")]:
            del body[name]
        return {} if strength is None else {"strength": strength}
    names = {theirs: ours for ours, theirs in WEB_UI_UPSCALERS.items()}
    upscaler = check_kind(_open(upscaler, "Latent"), str, "hr_upscaler")
    if upscaler not in names:
        raise InputError(f"hr_upscaler {shown(upscaler)}: allowed is {', '.join(names)}")
    changes = {"hires_scale": 2.0 if scale is None else scale, "hires_upscaler": names[upscaler]}
    changes |= {"hires_steps": _whole(steps) or None}
    return changes if strength is None else {**changes, "hires_strength": strength}


def _open(value: Any, otherwise: Any) -> Any:
    """A value, or what holds where there is none: null or an empty text."""
    return otherwise if value is None or value == "" else value


def _whole(value: Any) -> Any:
    """A whole number, which some clients write as 20.0."""
    is_whole = isinstance(value, float) and abs(value) < 2**53 and value == int(value)
    return int(value) if is_whole else value


def _number(name: str, value: Any) -> float | None:
    return None if value is None else float(check_kind(value, float, name))


def _vae(value: Any) -> str:
    """A VAE by its name or its file's."""
    name = check_kind(value, str, "sd_vae")
    files = find_addons("vae")
    if name not in files:
        name = _only_one(name, [one for one, path in files.items() if path.name == name], "sd_vae")
    offered("vae", name)
    return name


def _model(value: Any, models: Mapping[str, Path]) -> str:
    """A checkpoint by its name, its title (name and hash), or its file's name without ending."""
    name = check_kind(value, str, "sd_model_checkpoint").partition(" [")[0]
    if name not in models:
        alike = [one for one, path in models.items() if name in (path.name, stem_of(path))]
        name = _only_one(name, alike, "sd_model_checkpoint")
    if name not in models:
        raise InputError(f"sd_model_checkpoint {shown(value)}: choose one of {', '.join(models)}")
    return name


def _only_one(name: str, alike: list[str], option: str) -> str:
    """The one of the full names that a file's name stands for; where there is none, that name."""
    if len(alike) > 1:
        raise InputError(f"{option} {shown(name)}: choose one of {', '.join(alike)}")
    return alike[0] if alike else name
