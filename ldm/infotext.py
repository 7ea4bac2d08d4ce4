"""What the settings inside a picture come to here, and what of them cannot be used.

Our own JSON is understood, and the ``parameters`` text of the A1111 web UI. Everything is data: the
values are checked by `ldm.cli.values` like those of a job line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldm.addons import embeddings_in, find_addons, taken_loras, usable_tags, without_tags
from ldm.config import load_preset
from ldm.errors import InputError, shown
from ldm.modules.encoders.emphasis import BREAK, parse_emphasis, syntax_remarks
from ldm.modules.tome.config import ToMeConfig, overlay
from ldm.modules.tome.keys import KEYS
from ldm.settings import NUMBERS, SAMPLERS, SCHEDULES, SIGMA_SAMPLERS, Settings
from ldm.text import MAX_CHARACTERS, check_text, parse_json
from ldm.web_ui import WEB_UI_AUTOMATIC, WEB_UI_SAMPLERS, WEB_UI_UPSCALERS

# What other programs call their text; none of these is read.
OTHERS = {
    "workflow": "a ComfyUI graph",
    "invokeai_metadata": "InvokeAI's settings",
    "sd-metadata": "InvokeAI's settings",
    "Dream": "InvokeAI's settings",
    "fooocus_scheme": "Fooocus's settings",
    "prompt": "a ComfyUI graph",
}
_OVER_ANOTHER = "it was drawn over another picture (img2img --init-img)"
_PAIR = re.compile(r'\s*(\w[\w \-/]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_STEPS = re.compile(r"\s*Steps: \d")  # with which a line of settings begins, mostly
_NEGATIVE = re.compile(r"^[ \t]*Negative prompt:", re.MULTILINE)
_NAMES = {name: own for own, name in WEB_UI_SAMPLERS.items()}  # of two, the last
_FIELDS = {field.name for field in dataclasses.fields(Settings)}


@dataclass
class Found:
    """What a picture says of how it was made.

    Attributes:
        settings: fields of `Settings`, by name.
        tome: Token Merging settings; False: nothing was merged; None: it does not say.
        left_out: what it says and cannot be used, each with a reason.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    tome: dict[str, Any] | Literal[False] | None = None
    left_out: list[str] = field(default_factory=list)

    def without_missing_loras(self) -> Found:
        """This, with only those LoRAs in the prompt that are here; the others are left out."""
        prompt = self.settings.get("prompt")
        if not isinstance(prompt, str):
            return self
        prompt, missing = usable_tags(prompt)
        settings, left_out = {**self.settings, "prompt": prompt}, [*self.left_out, *missing]
        return dataclasses.replace(self, settings=settings, left_out=left_out)


def understood(texts: Mapping[str, str], where: str) -> Found:
    """Read the texts of a picture.

    Args:
        texts: by their keywords; see `ldm.images.picture_texts`.
        where: the file, for messages.

    Raises:
        InputError: it does not say how it was made, or what it says is damaged.
    """
    if "ldm" in texts:
        return fitting(_own(parse_json(texts["ldm"], f"{where}, its settings")))
    if "parameters" in texts and not _is_json(texts["parameters"]):
        return fitting(_web_ui(check_text(texts["parameters"], f"{where}, its settings"), where))
    for keyword, kind in OTHERS.items():
        if keyword in texts:
            if keyword == "prompt" and not _is_json(texts[keyword]):
                kind = "another program's settings"
            raise InputError(f"{where}: this picture holds {kind}, which cannot be read here")
    if "parameters" in texts:  # so do SwarmUI and Fooocus
        raise InputError(f"{where}: this picture holds JSON of another program, not read here")
    if texts.get("Software") == "NovelAI":
        raise InputError(
            f"{where}: this picture holds NovelAI's settings, which cannot be read here"
        )
    raise InputError(f"{where}: this picture does not say how it was made")


def fitting(found: Found) -> Found:
    """This without what its sampler does not have, or one that is taken instead might not have."""
    given = found.settings
    sampler = given.get("sampler")
    if given.get("schedule", "uniform") != "uniform" and sampler not in SIGMA_SAMPLERS:
        found.left_out.append(f"schedule {shown(given.pop('schedule'))} (not with this sampler)")
    if given.get("eta") and sampler != "ddim":
        found.left_out.append(f"eta {shown(given.pop('eta'))} (not with this sampler)")
    return found


def _is_json(text: str) -> bool:
    try:
        return text.lstrip().startswith("{") and bool(parse_json(text, ""))
    except InputError:
        return False


# --- our own ------------------------------------------------------------------------------------


def _own(about: Mapping[str, Any]) -> Found:
    found = Found({key: about[key] for key in about if key in _FIELDS and about[key] is not None})
    found.settings |= {"n_samples": 1, "n_iter": 1}  # it is one picture of its run
    if "grid" in about:
        found.left_out.append("it is a grid; the settings are those of its first picture")
    if "mask" in about:
        found.left_out.append("it was painted inside a mask (inpaint --mask)")
    elif "init_img" in about:
        found.left_out.append(_OVER_ANOTHER)
    if _shared_noise(about):
        found.left_out.append(
            "its noise, which it shared with others of its run (begun by --seed "
            f"{shown(about.get('first_seed'))} --n_samples {shown(about.get('n_samples'))})"
        )
    model = about.get("model")
    if isinstance(model, Mapping):
        found.left_out.append(f"its model, {shown(model.get('name'))} (--ckpt)")
        if model.get("vae"):
            found.left_out.append(f"its VAE, {shown(model['vae'])} (--vae)")
        if model.get("ema"):
            found.left_out.append("its averaged weights (--ema)")
    _restore_addons(found, about)
    wanted = about.get("tome")
    if isinstance(wanted, Mapping):
        keys = tome_keys(wanted)
        found.tome = False if keys == {} else keys
        if keys is None:
            found.left_out.append(
                "its Token Merging settings, which are damaged or of another version"
            )
    return found


def _shared_noise(about: Mapping[str, Any]) -> bool:
    """Whether its seed alone does not give a picture's noise."""
    seed = about.get("seed")
    is_first = about.get("first_seed", seed) == seed
    if about.get("rng") == "upstream":  # one stream, in the order of the whole run
        return not is_first or about.get("n_samples") != 1
    return about.get("fixed_code") is True and not is_first


def _restore_addons(found: Found, about: Mapping[str, Any]) -> None:
    """Name in the prompt what was added to the model, where ``models/`` has that file.

    Without a tag of its own a LoRA was added by a flag, and now gets one.
    """
    prompt = str(found.settings.get("prompt", ""))
    said = usable_tags(prompt)[0] if len(prompt) <= MAX_CHARACTERS else ""
    tagged = {Path(name).name for name, _ in taken_loras(said)[1]}
    loras = {path.stem: name for name, path in reversed(find_addons("lora").items())}
    words = embeddings_in([prompt, str(about.get("negative_prompt", ""))])
    flags = {"loras": "--lora", "embeddings": "--embedding", "controlnets": "--controlnet"}
    known = {"loras": tagged, "embeddings": {*words}, "controlnets": set()}
    for what, flag in flags.items():
        entries = about.get(what)
        for one in entries if isinstance(entries, list) else ():
            name = one.get("name") if isinstance(one, Mapping) else one
            weight = one.get("weight", 1) if isinstance(one, Mapping) else 1
            if not isinstance(name, str) or not isinstance(weight, int | float):
                found.left_out.append(f"{shown(name)} ({flag})")
            elif what == "loras" and name in loras and name not in tagged:
                prompt += f"<lora:{loras[name]}:{weight}>"
            elif name not in known[what]:
                found.left_out.append(f"{shown(name)} ({flag}{_of_control(one)})")
    if isinstance(found.settings.get("prompt"), str):
        found.settings["prompt"] = prompt


def _of_control(noted: Any) -> str:
    """How a picture's ControlNet guided, as flags."""
    about = noted if isinstance(noted, Mapping) else {}
    strength = about.get("strength", 1)
    flags = "" if strength == 1 else f" --control_strength {shown(strength)}"
    return flags + (" --control_canny" if about.get("canny") is True else "")


def tome_keys(wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keys that make a complete configuration, as few as will do; None: there are none.

    Args:
        wanted: a configuration as `ldm.pipeline.Pipeline.about` notes it.
    """
    usual = plain(ToMeConfig())
    known = {key: value for key, value in wanted.items() if key in KEYS}
    given = {key: value for key, value in known.items() if value != []}
    if isinstance(given.get("rules"), list):
        given["rules"] = [_rule(entry, known) for entry in given["rules"]]
    if isinstance(given.get("hires"), Mapping):
        given["hires"] = tome_keys(given["hires"]) or {}
    unusual = {key: value for key, value in given.items() if known[key] != usual.get(key)}
    for keys in (unusual, {key: value for key, value in given.items() if value is not None}):
        for _ in range(len(keys) + 1):
            try:
                if plain(ToMeConfig.from_mapping(keys)) == known:
                    return keys
                break
            except (InputError, TypeError, AttributeError) as error:
                # a configuration also has keys that mean nothing to its method, and follow from it
                idle = re.match(r"ToMe (\w+)=", str(error))
                if idle is None or keys.pop(idle[1], None) is None:
                    break
    return None


def _rule(entry: Any, beside: Mapping[str, Any]) -> Any:
    """What an entry of ``rules`` says otherwise than the keys beside it."""
    if not isinstance(entry, Mapping):
        return entry
    allowed = {key: value for key, value in entry.items() if key in KEYS and KEYS[key].in_rules}
    always = ("min_tokens", "max_downsample")
    return {k: v for k, v in allowed.items() if k in always or v != beside.get(k)}


def plain(config: ToMeConfig) -> dict[str, Any]:
    """A configuration as a picture's JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


# --- the web UIs' -------------------------------------------------------------------------------


def _web_ui(text: str, where: str) -> Found:
    """Read prompts, and a line of ``Name: value`` pairs below them.

    Source: the form that AUTOMATIC1111/stable-diffusion-webui writes.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{where}: its settings are longer than {MAX_CHARACTERS} characters")
    lines = text.strip().split("\n")
    begun = (i for i, line in enumerate(lines) if _STEPS.match(line) and len(_pairs(line)) > 2)
    last = next(begun, len(lines) - 1)
    pairs = _pairs(lines[last])
    lines, after = (lines[:last], lines[last + 1 :]) if len(pairs) > 2 else (lines, [])
    pairs = pairs if len(pairs) > 2 else {}
    prompt, *others = _NEGATIVE.split("\n".join(lines), maxsplit=1)
    negative = "".join(others)
    found = Found({"prompt": prompt.strip(), "negative_prompt": negative.strip()})
    if any(line.strip() for line in after):  # of an extension, such as the template of a prompt
        found.left_out.append(f"what stands below its settings: {shown(' '.join(after))}")
    # the web UIs always read weights and the whole of a prompt
    found.settings |= {"emphasis": True, "long_prompt": True}
    for text in (without_tags(prompt), negative):
        found.left_out += syntax_remarks(text, is_long=True, has_emphasis=True)
    tome: dict[str, Any] = {}
    is_hires = any(name.startswith("Hires ") for name in pairs)
    if "Denoising strength" in pairs and not is_hires:
        found.left_out.append(_OVER_ANOTHER)
    for name, value in pairs.items():
        try:
            known = _READERS[name](value.strip())
        except KeyError:
            why = _FLAGS.get(name, "has no counterpart here")
            found.left_out.append(f"{name} {shown(value)} ({why})")
        except ValueError:
            found.left_out.append(f"{name} {shown(value)} (cannot be used here)")
        else:
            tome |= known.pop("tome", {})
            if name == "Denoising strength" and is_hires:
                known = {"hires_strength": known["strength"]}
            found.settings |= known
    sampler = found.settings.get("sampler")
    if pairs.get("Schedule type") == "Automatic" and sampler in WEB_UI_AUTOMATIC:
        found.settings["schedule"] = WEB_UI_AUTOMATIC[sampler]
    n_again = found.settings.get("hires_steps") or found.settings.get("steps", 0)
    strength = found.settings.get("hires_strength", 1)
    if is_hires and 0 < strength < 1 and 0 < n_again / strength <= NUMBERS["hires_steps"][2]:
        found.left_out.append(
            f"that its second pass ran {n_again} steps; here strength x steps are run, so "
            f"--hires_steps {math.ceil(n_again / strength)} does"
        )
    found.left_out += _drawn_otherwise(found.settings, pairs)
    if tome:  # there it is the way of the tomesd package, with use_rand=False; no ratio is 0
        found.tome = overlay(load_preset("tomesd"), {"random": False, "ratio": 0.0, **tome})
    return found


def _drawn_otherwise(settings: Mapping[str, Any], pairs: Mapping[str, str]) -> Iterator[str]:
    """What the same settings do otherwise in the web UI.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/rng.py and modules/sd_emphasis.py.
    """
    if "seed" in settings and pairs.get("RNG", "GPU") != "CPU":
        yield (
            "its noise: the web UI draws it on the graphics card, unless it says RNG: CPU, and "
            "there a seed gives other noise than here"
        )
    try:
        texts = (settings["prompt"], settings["negative_prompt"])
        weights = {weight for text in texts for _, weight in parse_emphasis(without_tags(text))}
    except InputError:  # a weight beyond the limit, which is said when it is to be drawn
        return
    if weights - {1.0, BREAK[1]}:
        yield (
            "how its weights act: the web UI multiplies the embedding of a word, here it moves "
            "away from the empty prompt's, as in ComfyUI"
        )


def _pairs(line: str) -> dict[str, str]:
    """The settings of a line by their names; of two the first, as what follows may be JSON."""
    found: dict[str, str] = {}
    for name, value in _PAIR.findall(line):
        found.setdefault(name, _unquoted(value))
    return found


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value.strip('"')
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _size(text: str) -> dict[str, Any]:
    width, height = text.split("x")
    return {"W": int(width), "H": int(height)}


def _sampler(text: str) -> dict[str, Any]:
    """A sampler's name, which in older files ends with that of a schedule."""
    for schedule in reversed(SCHEDULES):
        if text.lower().endswith(f" {schedule.replace('_', ' ')}"):
            return {**_sampler(text[: -len(schedule) - 1]), "schedule": schedule}
    if _NAMES.get(text) not in SAMPLERS:
        raise ValueError(text)
    return {"sampler": _NAMES[text]}


def _schedule(text: str) -> dict[str, Any]:
    name = text.lower().replace(" ", "_")
    if name == "automatic":
        return {}
    if name not in SCHEDULES:
        raise ValueError(text)
    return {"schedule": name}


def _upscaler(text: str) -> dict[str, Any]:
    names = {name: own for own, name in WEB_UI_UPSCALERS.items()}
    if text not in names:
        raise ValueError(text)
    return {"hires_upscaler": names[text]}


def _as(name: str, kind: Callable[[str], Any]) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        if name not in _FIELDS or len(text) > 30:
            raise ValueError(text)
        return {name: kind(text)}

    return read


def _rng(text: str) -> dict[str, Any]:
    """Whose noise it is; only the CPU's is like ours."""
    if text != "CPU":
        raise ValueError(text)
    return {}


def _ratio(text: str) -> dict[str, Any]:
    return {"tome": {"ratio": _finite(text)}}


def _hires_ratio(text: str) -> dict[str, Any]:
    return {"tome": {"hires": {"ratio": _finite(text)}}}


# What a picture does not set, and the flag that does.
_FLAGS = {"Model": "--ckpt", "Model hash": "--ckpt", "VAE": "--vae", "VAE hash": "--vae"}
_READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "Steps": _as("steps", int),
    "Sampler": _sampler,
    "Schedule type": _schedule,
    "CFG scale": _as("scale", _finite),
    "Seed": _as("seed", int),
    "Size": _size,
    "Denoising strength": _as("strength", _finite),
    "Hires upscale": _as("hires_scale", _finite),
    "Hires steps": _as("hires_steps", int),
    "Hires upscaler": _upscaler,
    "Clip skip": _as("clip_skip", int),
    "Eta": _as("eta", _finite),
    "Eta DDIM": _as("eta", _finite),
    "Token merging ratio": _ratio,
    "Token merging ratio hr": _hires_ratio,
    "Version": lambda text: {},
    "RNG": _rng,
}
