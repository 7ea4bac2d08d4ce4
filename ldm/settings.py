"""What one run draws, and how: checked once, at the boundary, before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.errors import InputError

SIGMA_SAMPLERS = ("euler", "euler_a", "dpmpp_2m")
SAMPLERS = ("ddim", "plms", "dpm_solver", *SIGMA_SAMPLERS)
SCHEDULES = ("uniform", "karras")
UPSCALERS = ("latent", "lanczos")
NOISE_ORDERS = ("image", "upstream")
SIZE_STEP = 8  # pixels; heights and widths are multiples of it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What to draw and how. None stands for what the model's YAML has under ``defaults``.

    Attributes:
        prompt: what to draw; one text for all pictures, or one for each.
        negative_prompt: what guidance steers away from.
        long_prompt: read prompts of any length, in chunks of 75 tokens; else the end of a long one
            is cut off.
        emphasis: read ``(word:1.2)``, ``(word)`` and ``[word]`` as the web UIs do; brackets that
            are meant are written with a backslash.
        n_samples: pictures in a batch; with a single prompt, also pictures in an iteration.
        n_iter: how often to go through the prompts.
        seed: of the first picture; -1 chooses one.
        steps: of the sampler.
        sampler: ddim, plms, dpm_solver, euler, euler_a or dpmpp_2m.
        schedule: where the last three of them take their steps: uniform in time, or karras, which
            has more of them at little noise.
        scale: of the guidance: e_u + scale * (e_c - e_u); 1 does without e_u.
        eta: of DDIM: 0 is deterministic, 1 adds as much noise as the training process.
        H: height in pixels; rounded to a multiple of 8.
        W: width in pixels; rounded to a multiple of 8.
        C: channels of a latent; the model has one number of them, so this is only checked.
        f: pixels to a latent; only checked, likewise.
        strength: img2img: share of the steps that are taken; 1 ignores the picture.
        hires_scale: txt2img: draw the picture once more, enlarged by this factor; 1 does not.
        hires_strength: of that second pass, as ``strength``.
        hires_steps: of the sampler in the second pass, ``hires_strength``'s share of which is
            taken; None: as many as in the first.
        hires_upscaler: what is enlarged: ``latent``, the latents (bilinear), or ``lanczos``, the
            picture, which stays closer to the first pass.
        rng: ``image``: picture i has noise of its own, from seed + i, whatever the batch size or
            device; ``upstream``: one stream of noise for the whole run, in upstream's order.
        fixed_code: start all pictures from the same noise; with rng upstream, all batches.

    Raises:
        InputError: a value is out of range.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str = ""
    long_prompt: bool = False
    emphasis: bool = False
    n_samples: int = 1
    n_iter: int = 1
    seed: int = 42
    steps: int | None = None
    sampler: str | None = None
    schedule: str = "uniform"
    scale: float | None = None
    eta: float = 0.0
    H: int | None = None
    W: int | None = None
    C: int | None = None
    f: int | None = None
    strength: float = 0.75
    hires_scale: float = 1.0
    hires_strength: float = 0.6
    hires_steps: int | None = None
    hires_upscaler: str = "latent"
    rng: str = "image"
    fixed_code: bool = False

    def __post_init__(self) -> None:
        """Check every value; round the size and choose the seed where that was asked for."""
        for name in ("n_samples", "n_iter"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("steps", "hires_steps"):
            steps = getattr(self, name)
            _require(steps is None or 1 <= steps <= 1000, name, steps, "1 to 1000")
        if self.sampler is not None:
            _require(self.sampler in SAMPLERS, "sampler", self.sampler, ", ".join(SAMPLERS))
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, ", ".join(SCHEDULES))
        if self.scale is not None:
            _require(math.isfinite(self.scale), "scale", self.scale, "a finite number")
        _require(0 <= self.eta <= 1, "eta", self.eta, "0 to 1")
        for name in ("strength", "hires_strength"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        _require(1 <= self.hires_scale <= 8, "hires_scale", self.hires_scale, "1 (off) to 8")
        _require(
            self.hires_upscaler in UPSCALERS,
            "hires_upscaler",
            self.hires_upscaler,
            ", ".join(UPSCALERS),
        )
        _require(self.rng in NOISE_ORDERS, "rng", self.rng, ", ".join(NOISE_ORDERS))
        _require(-1 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1, or -1 for any")
        if self.eta > 0 and self.sampler not in (None, "ddim"):
            raise InputError(f"eta {self.eta:g} needs the ddim sampler, not {self.sampler}")
        if self.schedule != "uniform" and self.sampler not in (None, *SIGMA_SAMPLERS):
            raise InputError(
                f"schedule {self.schedule} needs one of the samplers {', '.join(SIGMA_SAMPLERS)}, "
                f"not {self.sampler}"
            )
        if self.prompt is not None and not isinstance(self.prompt, str):
            _require(len(self.prompt) > 0, "prompt", "()", "at least one text")
            object.__setattr__(self, "prompt", tuple(self.prompt))
        if self.seed == -1:
            object.__setattr__(self, "seed", secrets.randbelow(2**32))
            logger.info("The seed is %d", self.seed)
        for name in ("H", "W"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _rounded(name, getattr(self, name)))

    def filled(self, defaults: Mapping[str, Any]) -> Settings:
        """These settings with the model's defaults in place of None."""
        missing = {
            field.name: defaults[field.name]
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is None and field.name in defaults
        }
        return dataclasses.replace(self, **missing)

    def second_pass(self) -> Settings:
        """What the second pass of hires_scale does, for settings that are filled."""
        assert self.H is not None
        assert self.W is not None
        height, width = (
            round(side * self.hires_scale / SIZE_STEP) * SIZE_STEP for side in (self.H, self.W)
        )
        return dataclasses.replace(
            self,
            H=height,
            W=width,
            steps=self.hires_steps or self.steps,
            strength=self.hires_strength,
            hires_scale=1.0,
            fixed_code=False,
        )

    def batches(self) -> list[list[tuple[str, int]]]:
        """Prompt and seed of every picture, batch by batch; the last of an iteration may be short.

        Raises:
            InputError: there is no prompt.
        """
        if self.prompt is None:
            raise InputError("there is no prompt: neither given nor among the model's defaults")
        if isinstance(self.prompt, str):
            prompts: Sequence[str] = (self.prompt,) * self.n_samples
        else:
            prompts = self.prompt
        chunks = [
            prompts[start : start + self.n_samples]
            for start in range(0, len(prompts), self.n_samples)
        ]
        seeds = itertools.count(self.seed)
        return [[(prompt, next(seeds)) for prompt in chunk] for chunk in chunks * self.n_iter]


def _require(is_met: bool, name: str, value: object, allowed: str) -> None:
    if not is_met:
        raise InputError(f"{name} {value}: allowed is {allowed}")


def _rounded(name: str, pixels: int) -> int:
    """The nearest multiple of 8 above 0, with a message where that is another number."""
    _require(pixels >= 1, name, pixels, "a number of pixels above 0")
    rounded = max(SIZE_STEP, round(pixels / SIZE_STEP) * SIZE_STEP)
    if rounded != pixels:
        logger.info("%s %d is not a multiple of %d; using %d", name, pixels, SIZE_STEP, rounded)
    return rounded
