"""What is too much for a job, found before it is accepted and said in the labels' words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.load import CheckpointInfo
from ldm.errors import InputError
from ldm.modules.diffusionmodules.strips import LARGE
from ldm.settings import Settings

MOST_PICTURES = 1000  # of a job
MOST_CHARACTERS = 20_000  # of a prompt
MOST_PIXELS = 2**26  # of a picture, whatever the memory: 8192 x 8192
# Feature maps alive at the peak, in maps of the U-Net's first level and of twice the first stage's
# width at full size: SD 1.5 in bfloat16 takes 0.8 KB a pixel in a step (two rows). In decoding it
# takes 5 KB a pixel up to 512x512, with all that torch keeps, and 1.5 KB for those beyond, which
# are worked on in strips: 7.3 GB with the weights at 2048x2048 (docs/performance.md).
_UNET_MAPS, _DECODER_MAPS, _STRIPPED_MAPS = 40, 10, 3
LABELS = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "W": "Width",
    "H": "Height",
    "n_iter": "Pictures",
    "n_samples": "At a time",
    "sampler": "Sampler",
    "schedule": "Schedule",
    "steps": "Steps",
    "scale": "Guidance scale",
    "seed": "Seed",
    "strength": "Strength",
    "hires_scale": "Enlarge by",
    "hires_strength": "Redraw strength",
    "hires_steps": "Redraw steps",
    "hires_upscaler": "Upscaler",
    "clip_skip": "Clip skip",
    "reuse_deep": "Reuse deep features",
    "controlnet": "ControlNet",
    "control_strength": "ControlNet strength",
}


def in_labels(text: str) -> str:
    """A message with the settings' names at its beginning in the words of the form."""
    text = re.sub(r"\A--tome-([\w-]+)", lambda key: f"ToMe {key[1].replace('-', ' ')}", text)
    text = text.replace(" (--help lists the flags)", "")
    return re.sub(r"\A(--)?(\w+)(?=[ :=])", lambda name: LABELS.get(name[2], name[0]), text)


def check(settings: Settings, info: CheckpointInfo, dtype: str, room: int | None) -> None:
    """Refuse what is too much, for settings that are filled.

    Args:
        settings: without None.
        info: of the model.
        dtype: of its weights.
        room: bytes of memory that can be had; None: not known.

    Raises:
        InputError: it is too much; the message says what the most is.
    """
    assert settings.W is not None
    assert settings.H is not None
    n = settings.n_samples * settings.n_iter
    if n > MOST_PICTURES:
        raise InputError(f"Pictures {n}: allowed are {MOST_PICTURES} in a job")
    if settings.seed + n > 2**63:
        raise InputError(f"Seed {settings.seed}: there are not {n} seeds from here to 2**63")
    for name in ("prompt", "negative_prompt"):
        text = getattr(settings, name)
        if isinstance(text, str) and len(text) > MOST_CHARACTERS:
            raise InputError(f"{LABELS[name]}: {len(text)} characters; allowed are 20,000")
    largest = settings.second_pass() if settings.hires_scale > 1 else settings
    assert largest.W is not None
    assert largest.H is not None
    pixels = largest.W * largest.H
    size = f"Width {largest.W}, Height {largest.H}"
    if pixels > MOST_PIXELS:
        raise InputError(f"{size}: allowed are {MOST_PIXELS // 2**20} million pixels")
    needed = estimate(pixels, settings.n_samples, info.config["model"]["params"], dtype)
    if room is not None and needed > room:
        at_once = f" and {settings.n_samples} at a time" if settings.n_samples > 1 else ""
        raise InputError(
            f"{size}{at_once}: that takes about {needed / 2**30:.1f} GiB of memory, and "
            f"{room / 2**30:.1f} GiB are free"
        )


def estimate(pixels: int, n_samples: int, params: dict[str, Any], dtype: str) -> int:
    """Bytes that activations take at the peak, roughly.

    Args:
        pixels: of a picture.
        n_samples: pictures in a batch; each is two rows of the U-Net, and decoded by itself.
        params: of the model's configuration.
        dtype: of its weights.
    """
    size = 4 if dtype == "float32" else 2
    unet = params["unet_config"]["params"]
    first_stage = params["first_stage_config"]["params"]["ddconfig"]
    f = 2 ** (len(first_stage["ch_mult"]) - 1)
    step = _UNET_MAPS * 2 * n_samples * unet["model_channels"] * pixels // f**2
    n_elements = 2 * first_stage["ch"] * pixels
    whole = min(n_elements, LARGE)
    decoding = _DECODER_MAPS * whole + _STRIPPED_MAPS * (n_elements - whole)
    return size * max(step, decoding)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device can still give; None where it does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    if device.type == "cpu":
        return _free_main_memory()
    return None


def _free_main_memory() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    free = int(found[1]) * 1024 if found else None
    return min((one for one in (free, _room_of_the_group()) if one is not None), default=None)


def _room_of_the_group() -> int | None:
    """What a container's limit leaves, where there is one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        text = (folder / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    found = re.search(r"^inactive_file (\d+)$", text, re.MULTILINE)
    reclaimable = int(found[1]) if found else 0
    return None if limit == "max" else max(0, int(limit) - used + reclaimable)
