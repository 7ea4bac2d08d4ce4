"""What one run draws, and how: checked once, at the boundary, before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import logging
import numbers
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.errors import InputError, escaped, shown

SIGMA_SAMPLERS = ("euler", "euler_a", "dpmpp_2m", "heun", "dpmpp_sde", "unipc", "lcm")
SAMPLERS = ("ddim", "plms", "dpm_solver", *SIGMA_SAMPLERS)
SCHEDULES = ("uniform", "karras", "sgm_uniform")
UPSCALERS = ("latent", "lanczos")
NOISE_ORDERS = ("image", "upstream")
SIZE_STEP = 8  # pixels; heights and widths are multiples of it
MAX_TEXT = 100_000  # characters of a prompt
# Numbers: their kind, and the least and the greatest that has a meaning.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "n_samples": (int, 1, 4096),
    "n_iter": (int, 1, 10**6),
    "clip_skip": (int, 1, 24),
    "seed": (int, -1, 2**63 - 1),
    "steps": (int, 1, 1000),
    "hires_steps": (int, 1, 1000),
    "reuse_deep": (int, 1, 1000),
    "scale": (float, -1000, 1000),
    "eta": (float, 0, 1),
    "H": (int, 1, 16384),
    "W": (int, 1, 16384),
    "C": (int, 1, 1024),
    "f": (int, 1, 1024),
    "strength": (float, 0, 1),
    "hires_scale": (float, 1, 8),
    "hires_strength": (float, 0, 1),
}
# Where the limits need other words than "LEAST to GREATEST".
LIMITS = {"seed": "0 to 2**63 - 1, or -1 for any", "hires_scale": "1 (off) to 8"}
CHOICES = {
    "sampler": SAMPLERS,
    "schedule": SCHEDULES,
    "hires_upscaler": UPSCALERS,
    "rng": NOISE_ORDERS,
}
# What the model's YAML fills in where it is None.
OPEN = {"sampler", "steps", "hires_steps", "reuse_deep", "scale", "H", "W", "C", "f"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What to draw and how. None stands for what the model's YAML has under ``defaults``.

    Attributes:
        prompt: what to draw; one text for all pictures, or one for each.
        negative_prompt: what guidance steers away from.
        long_prompt: read prompts of any length, in chunks of 75 tokens; else the end of a long one
            is cut off.
        emphasis: read ``(word:1.2)``, ``(word)``, ``[word]`` and, with long_prompt, ``BREAK`` as
            the web UIs do; brackets that are meant are written with a backslash.
        clip_skip: which layer of the text encoder is used: 1 the one that the model was trained
            with, 2 the one before it, and so on.
        n_samples: pictures in a batch; with a single prompt, also pictures in an iteration.
        n_iter: how often to go through the prompts.
        seed: of the first picture; -1 chooses one.
        steps: of the sampler.
        sampler: ddim, plms, dpm_solver, euler, euler_a, dpmpp_2m, heun, dpmpp_sde, unipc or lcm
            (for models distilled for it).
        schedule: where those from euler on take their steps: uniform in time; karras, which has
            more of them at little noise; or sgm_uniform, in time with a longer last step.
        reuse_deep: compute the deep half of the U-Net in one of so many steps, and reuse it in
            those between (DeepCache); 1 computes all of it in each.
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
    clip_skip: int = 1
    n_samples: int = 1
    n_iter: int = 1
    seed: int = 42
    steps: int | None = None
    sampler: str | None = None
    schedule: str = "uniform"
    reuse_deep: int | None = None
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
        for name, (kind, lowest, highest) in NUMBERS.items():
            if getattr(self, name) is not None or name not in OPEN:
                value = _checked_number(name, getattr(self, name), kind, lowest, highest)
                object.__setattr__(self, name, value)
        for name, choices in CHOICES.items():
            if getattr(self, name) is not None or name not in OPEN:
                _require(getattr(self, name) in choices, name, getattr(self, name), choices)
        for name in ("long_prompt", "emphasis", "fixed_code"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, value, ("true", "false"))
        if self.prompt is not None and not isinstance(self.prompt, str):
            _require(isinstance(self.prompt, Iterable), "prompt", self.prompt, ("a text", "texts"))
            object.__setattr__(self, "prompt", tuple(self.prompt))
            _require(len(self.prompt) > 0, "prompt", (), ("at least one text",))
        _check_text("negative_prompt", self.negative_prompt)
        for text in self.prompts:
            _check_text("prompt", text)
        if self.eta > 0 and self.sampler not in (None, "ddim"):
            raise InputError(f"eta {self.eta:g} needs the ddim sampler, not {self.sampler}")
        if self.schedule != "uniform" and self.sampler not in (None, *SIGMA_SAMPLERS):
            raise InputError(
                f"schedule {self.schedule} needs one of the samplers {', '.join(SIGMA_SAMPLERS)}, "
                f"not {self.sampler}"
            )
        if self.seed == -1:
            object.__setattr__(self, "seed", secrets.randbelow(2**32))
            logger.info("The seed is %d", self.seed)
        for name in ("H", "W"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _rounded(name, getattr(self, name)))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of an iteration, without repetition."""
        if self.prompt is None:
            return ()
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, of settings that are filled."""
        assert self.H is not None
        assert self.W is not None
        return self.H, self.W

    def filled(self, defaults: Mapping[str, Any]) -> Settings:
        """These settings with the model's defaults in place of None."""
        missing = {
            field.name: defaults[field.name]
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is None and field.name in defaults
        }
        return dataclasses.replace(self, **missing)

    def second_pass(self) -> Settings:
        """What the second pass of hires_scale does, for settings that are filled.

        Raises:
            InputError: the enlarged picture is larger than any may be.
        """
        height, width = (
            round(side * self.hires_scale / SIZE_STEP) * SIZE_STEP for side in self.size
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

    def noted(self, has_strength: bool) -> dict[str, Any]:
        """What of these a picture remembers, besides its own prompt and seed."""
        hidden = {"prompt", "seed", *(() if has_strength else ("strength",))}
        if self.hires_scale == 1:
            hidden |= {"hires_scale", "hires_strength", "hires_steps", "hires_upscaler"}
        names = [field.name for field in dataclasses.fields(self) if field.name not in hidden]
        return {**{name: getattr(self, name) for name in names}, "first_seed": self.seed}

    @property
    def n_drawn(self) -> int:
        """Pictures in an iteration."""
        return len(self.prompt) if isinstance(self.prompt, tuple) else self.n_samples

    @property
    def n_pictures(self) -> int:
        """Pictures in all iterations."""
        return self.n_drawn * self.n_iter

    def batches(self) -> Batches:
        """Prompt and seed of every picture, batch by batch; the last of an iteration may be short.

        Raises:
            InputError: there is no prompt.
        """
        if self.prompt is None:
            raise InputError("there is no prompt: neither given nor among the model's defaults")
        return Batches(self, range(-(-self.n_drawn // self.n_samples) * self.n_iter))


@dataclass(frozen=True)
class Batches(Sequence[list[tuple[str, int]]]):
    """Prompt and seed of each picture of each batch, made when they are asked for."""

    settings: Settings
    numbers: range

    def __len__(self) -> int:
        """How many batches."""
        return len(self.numbers)

    def __getitem__(self, key: Any) -> Any:
        """A batch, or for a slice some of them."""
        if isinstance(key, slice):
            return dataclasses.replace(self, numbers=self.numbers[key])
        one, n, size = self.settings, self.settings.n_drawn, self.settings.n_samples
        iteration, batch = divmod(self.numbers[key], -(-n // size))
        return [
            (one.prompts[i % len(one.prompts)], one.seed + iteration * n + i)
            for i in range(batch * size, min((batch + 1) * size, n))
        ]


def _checked_number(name: str, value: Any, kind: type, lowest: float, highest: float) -> Any:
    """A plain number; refuse what is none, not finite or out of range; a whole one is a float too.

    numpy's numbers are numbers, which its arrays hand out.
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool | int):
        value = float(value)
    kinds = (int,) if kind is int else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    limits = LIMITS.get(name, f"{lowest:.15g} to {highest:.15g}")
    if not is_number:
        limits = f"{'a whole' if kind is int else 'a'} number, {limits}"
    if not (is_number and lowest <= value <= highest):  # NaN is in no range
        raise InputError(f"{name} {shown(value)}: allowed is {limits}")
    return value


def _check_text(name: str, text: Any) -> None:
    _require(isinstance(text, str), name, text, ("a text",))
    _require(len(text) <= MAX_TEXT, name, text, (f"a text of at most {MAX_TEXT} characters",))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} {shown(text)}: character {error.start + 1} is half of one (a lone surrogate)"
        ) from None


def _require(is_met: bool, name: str, value: object, allowed: Sequence[str]) -> None:
    if not is_met:
        given = escaped(value) if isinstance(value, str) else shown(value)
        raise InputError(f"{name} {given}: allowed is {', '.join(allowed)}")


def _rounded(name: str, pixels: int) -> int:
    """The nearest multiple of 8 above 0, with a message where that is another number."""
    rounded = max(SIZE_STEP, round(pixels / SIZE_STEP) * SIZE_STEP)
    if rounded != pixels:
        logger.info("%s %d is not a multiple of %d; using %d", name, pixels, SIZE_STEP, rounded)
    return rounded
