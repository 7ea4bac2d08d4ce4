"""Settings in the words of the web UIs, as the texts of their pictures have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ldm.settings import SIGMA_SAMPLERS

# our names -> the web UIs'
WEB_UI_SAMPLERS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpm_solver": "DPM++ 2M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "heun": "Heun",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
WEB_UI_SCHEDULES = {"uniform": "Uniform", "karras": "Karras", "sgm_uniform": "SGM Uniform"}
WEB_UI_AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_sde": "karras"}  # elsewhere it is uniform
WEB_UI_UPSCALERS = {"latent": "Latent", "lanczos": "Lanczos"}


def web_ui_text(settings: Mapping[str, Any]) -> str:
    """Settings in the form that the web UIs write and read: prompts, then a line of names.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py.
    """
    model = settings.get("model", {})
    tome = settings.get("tome", {})
    loras = settings.get("loras", ())
    named = {
        "Steps": settings.get("steps"),
        "Sampler": WEB_UI_SAMPLERS.get(settings.get("sampler", "")),
        "Schedule type": _schedule_type(settings),
        "CFG scale": settings.get("scale"),
        "Seed": settings.get("seed"),
        "Size": f"{settings['W']}x{settings['H']}" if "W" in settings else None,
        "Model hash": model.get("hash"),
        "Model": model.get("name"),
        "Denoising strength": settings.get("strength", settings.get("hires_strength")),
        "Hires upscale": settings.get("hires_scale"),
        "Hires steps": settings.get("hires_steps"),
        "Hires upscaler": WEB_UI_UPSCALERS.get(settings.get("hires_upscaler", "")),
        "Eta DDIM": settings.get("eta") or None,  # which is ddim's alone
        "Token merging ratio": tome.get("ratio") or None,
        "Token merging ratio hr": (tome.get("hires") or {}).get("ratio"),
        "Loras": ", ".join(f"{one['name']}:{one['weight']:g}" for one in loras) or None,
        "Embeddings": ", ".join(one["name"] for one in settings.get("embeddings", ())) or None,
        "Clip skip": settings.get("clip_skip", 1) if settings.get("clip_skip", 1) > 1 else None,
        "RNG": "CPU" if settings.get("rng") == "image" else None,
        "Version": settings.get("version"),
    }
    line = ", ".join(
        f"{name}: {_quoted(value)}" for name, value in named.items() if value is not None
    )
    negative = settings.get("negative_prompt")
    return "\n".join(
        [
            settings.get("prompt", ""),
            *([f"Negative prompt: {negative}"] if negative else []),
            line,
        ]
    )


def _schedule_type(settings: Mapping[str, Any]) -> str | None:
    """The name of the steps' spacing, for the samplers that have a choice."""
    has_choice = settings.get("sampler") in SIGMA_SAMPLERS
    return WEB_UI_SCHEDULES.get(settings["schedule"]) if has_choice else None


def _quoted(value: object) -> str:
    """A value as text, in JSON's quotes where it holds what separates values."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text
