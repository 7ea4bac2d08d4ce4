"""What all samplers share: the arguments, the randomness, inpainting, image to image, progress.

A sampler itself is a generator: given a denoiser, noisy latents and the schedule's coefficients it
yields the latents after each step. ``Sampler`` is the shell that callers know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.errors import InputError
from ldm.models.diffusion.guidance import (
    Conditioning,
    Denoiser,
    DiffusionModel,
    Scale,
    check_batch_size,
    noise_predictor,
    sampling_run,
    uses_guidance,
)
from ldm.models.diffusion.schedule import (
    StepCoefficients,
    ddim_coefficients,
    make_ddim_timesteps,
    original_coefficients,
)

T = TypeVar("T")

NoiseSource: TypeAlias = Callable[[torch.Size], Tensor]
"""shape -> unit normal noise of that shape, on any device."""

Draw: TypeAlias = Callable[[float], "Tensor | None"]
"""sigma -> noise for a step with that standard deviation; None where the step needs none."""

Blend: TypeAlias = Callable[[Tensor, StepCoefficients], Tensor]
"""(x_t, coefficients) -> x_t with its known region replaced."""

Steps: TypeAlias = Iterator[tuple[Tensor, Tensor]]
"""(latents after the step, predicted x_0), once for each step."""


@dataclass(frozen=True)
class Run:
    """What a sampler's steps take.

    Attributes:
        denoise: predicts the noise in latents.
        draw: fresh noise; asked as often as upstream asks.
        blend: applied to the latents before each step.
        quantize: applied to predictions of x_0, or None.
    """

    denoise: Denoiser
    draw: Draw
    blend: Blend
    quantize: Callable[[Tensor], Tensor] | None = None

    def predicted(self, x: Tensor, c: StepCoefficients) -> Tensor:
        """The predicted x_0 at the start of a step, (B, C, h, w)."""
        x0 = (x - c.noise * self.denoise(x, c.t, c.alpha_bar)) / c.signal
        return x0 if self.quantize is None else self.quantize(x0)


class Sampler:
    """Base of the samplers: upstream's interface around ``iterate``.

    Args:
        model: what to sample from.
        schedule: upstream's argument, without effect there and here.
        device: where to sample; the model's device by default.

    Attributes:
        steps: coefficients of the steps, from the lowest t to the highest; set by make_schedule.
        encodes_as_upstream: ``stochastic_encode`` adds upstream's noise, not that from which
            ``decode`` goes on; see DDIMSampler.
    """

    name = "Sampler"
    fixed_eta: float | None = 0.0  # None: the caller chooses
    redraws_mask_noise = True  # upstream does, before every step

    def __init__(
        self,
        model: DiffusionModel,
        schedule: str = "linear",
        device: torch.device | str | None = None,
    ) -> None:
        self.model = model
        self.device = torch.device(model.device if device is None else device)
        self.steps: list[StepCoefficients] = []
        self.eta = self.fixed_eta or 0.0
        self.encodes_as_upstream = True

    def iterate(self, x: Tensor, steps: Sequence[StepCoefficients], run: Run) -> Steps:
        """Take the steps, which come from the highest t to the lowest.

        Args:
            x: noisy latents at the first step's alpha_bar, (B, C, h, w).
            steps: at least one.
            run: what it takes.
        """
        raise NotImplementedError

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Choose the steps for ``stochastic_encode`` and ``decode``; ``sample`` does so itself.

        Args:
            ddim_num_steps: how many; see make_ddim_timesteps for the counts that come out.
            ddim_discretize: ``uniform`` or ``quad``; for those that step through sigma
                ``uniform``, ``karras`` or ``sgm_uniform``.
            ddim_eta: 0 is deterministic, 1 has the variance of ancestral sampling; DDIM only.
            verbose: upstream's argument, without effect: nothing is printed.

        Raises:
            InputError: a value that this sampler or the model cannot use.
        """
        is_free = self.fixed_eta is None
        if ddim_eta < 0 or (ddim_eta and not is_free):
            limit = "at least 0" if is_free else "0: it is a setting of DDIM"
            raise InputError(f"{self.name}: eta is {ddim_eta}, but it must be {limit}")
        self.eta = ddim_eta if self.fixed_eta is None else self.fixed_eta
        self.steps = self._choose_steps(ddim_num_steps, ddim_discretize)

    def _choose_steps(self, n_steps: int, discretization: str) -> list[StepCoefficients]:
        timesteps = make_ddim_timesteps(discretization, n_steps, self.model.num_timesteps)
        return ddim_coefficients(self.model.alphas_cumprod, timesteps, self.eta)

    def _original_steps(self) -> list[StepCoefficients]:
        model = self.model
        return original_coefficients(model.alphas_cumprod, model.alphas_cumprod_prev, self.eta)

    def _steps(self, use_original_steps: bool) -> list[StepCoefficients]:
        if use_original_steps:
            return self._original_steps()
        if not self.steps:
            raise ValueError("call make_schedule first")
        return self.steps

    def _first_steps(self, name: str, n: int, use_original_steps: bool) -> list[StepCoefficients]:
        """The n steps with the least noise; name is that of the argument that asks for them."""
        steps = self._steps(use_original_steps)
        if not 0 <= n <= len(steps):
            raise ValueError(f"{name} is {n}, but the schedule has {len(steps)} steps")
        return steps[:n]

    def _levels(self, steps: list[StepCoefficients]) -> list[float]:
        """alpha_bar of latents from which ``decode`` takes 0, 1, 2, ... steps, but for all."""
        return [1.0, *(c.alpha_bar for c in steps[:-1])]

    def _upstream_levels(self, steps: list[StepCoefficients]) -> list[float]:
        """The same as upstream has it."""
        return [c.alpha_bar_prev for c in steps]

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning = None,
        callback: Callable[[int], Any] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        ucg_schedule: Sequence[float] | None = None,
        noise_source: NoiseSource | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Draw latents.

        Args:
            S: number of steps.
            batch_size: number of pictures B.
            shape: (C, h, w) of one picture's latents.
            conditioning: a tensor, list or dict with B rows, or None.
            callback: called with the number of each step, 0, 1, 2, ...
            normals_sequence: upstream's argument, without effect there and here.
            img_callback: called with the predicted x_0 and the number of each step.
            quantize_x0: replace each predicted x_0 by ``model.first_stage_model.quantize``'s.
            eta: 0 is deterministic, 1 has the variance of ancestral sampling; DDIM only.
            mask: 1 where x0 is kept, 0 where it is painted anew; broadcast to (B, C, h, w).
            x0: latents to keep, (B, C, h, w), scaled; required with a mask.
            temperature: factor on the noise that the steps add.
            noise_dropout: share of that noise to drop.
            score_corrector: its ``modify_score(model, eps, x, t, conditioning,
                **corrector_kwargs)`` replaces the predicted noise.
            corrector_kwargs: see score_corrector.
            verbose: show a progress bar.
            x_T: noise to start from, (B, C, h, w); drawn by default.
            log_every_t: how often to keep intermediate results, in steps.
            unconditional_guidance_scale: 1 is without guidance.
            unconditional_conditioning: of the same kind and rows as conditioning.
            ucg_schedule: the guidance scale of each step, from the first to the last, instead.
            noise_source: where all noise comes from, which then is asked only for noise that is
                used. By default it is drawn from torch's global generator on the sampler's
                device in upstream's order, so a seed gives upstream's picture.

        Returns:
            The latents (B, C, h, w), and lists ``x_inter`` and ``pred_x0`` of what was kept.

        Raises:
            InputError: steps, eta, discretisation or ucg_schedule cannot be used.
            ValueError: the conditioning, the unconditional one or x_T has not B rows, or there is
                a mask without x0.
        """
        check_batch_size(conditioning, batch_size)
        self.make_schedule(S, ddim_eta=eta)
        scale: Scale = unconditional_guidance_scale
        if ucg_schedule is not None:
            scale = self._scale_by_step(ucg_schedule)
        size = torch.Size((batch_size, *shape))
        if x_T is None:
            x_T = self._noise(size, noise_source)
        elif x_T.shape[0] != batch_size:
            raise ValueError(f"x_T has {x_T.shape[0]} rows, but the batch size is {batch_size}")
        denoise = noise_predictor(self.model, conditioning, unconditional_conditioning, scale)
        if score_corrector is not None:
            denoise = _corrected(
                denoise, score_corrector, self.model, conditioning, corrector_kwargs or {}
            )
        changes = temperature, noise_dropout, quantize_x0
        taken = self._begun(denoise, x_T, self.steps, noise_source, mask, x0, *changes)
        n, x = len(self.steps), x_T
        kept: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}
        with sampling_run(self.model, uses_guidance(unconditional_conditioning, scale)):
            for i, (x, predicted) in enumerate(self.shown(taken, n, verbose)):
                if callback is not None:
                    callback(i)
                if img_callback is not None:
                    img_callback(predicted, i)
                if (n - 1 - i) % log_every_t == 0 or i == 0:
                    kept["x_inter"].append(x)
                    kept["pred_x0"].append(predicted)
        return x, kept

    @torch.no_grad()
    def stochastic_encode(
        self,
        x0: Tensor,
        t: Tensor | int,
        use_original_steps: bool = False,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Add the noise from which ``decode`` takes ``t`` steps back to a picture.

        No steps need no noise, and all of them noise alone. With ``encodes_as_upstream`` the
        latents of no steps have a little, and those of DDIM have more than ``decode`` removes.

        Args:
            x0: latents, (B, C, h, w), scaled.
            t: number of steps, 0 .. number of steps of the schedule (where upstream fails), for
                each row (B,) or for all.
            use_original_steps: count training steps instead.
            noise: unit normal, shape of x0; drawn from the global generator by default.

        Raises:
            ValueError: t is outside of the schedule.
        """
        steps = self._steps(use_original_steps)
        before = self._upstream_levels if self.encodes_as_upstream else self._levels
        levels = [*before(steps), 0.0]
        t = torch.as_tensor(t).cpu()
        if t.min() < 0 or t.max() >= len(levels):
            raise ValueError(f"t is {t.tolist()}, but the schedule has {len(levels) - 1} steps")
        alpha_bar = torch.tensor(levels, dtype=torch.float32)[t].reshape(-1, 1, 1, 1)
        noise = torch.randn_like(x0) if noise is None else noise.to(x0)
        # roots in float32: a half type takes little noise for none at all
        return alpha_bar.sqrt().to(x0) * x0 + (1 - alpha_bar).sqrt().to(x0) * noise

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        use_original_steps: bool = False,
        callback: Callable[[int], Any] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        noise_source: NoiseSource | None = None,
        verbose: bool = True,
        img_callback: Callable[[Tensor, int], Any] | None = None,
    ) -> Tensor:
        """Take the last ``t_start`` steps of the schedule, from ``stochastic_encode``'s result.

        Args:
            x_latent: noisy latents, (B, C, h, w).
            cond: conditioning with B rows.
            t_start: number of steps; 0 returns the latents as they are.
            unconditional_guidance_scale: 1 is without guidance.
            unconditional_conditioning: of the same kind and rows as cond.
            use_original_steps: count training steps instead.
            callback: called with the number of each step.
            mask: see sample.
            x0: see sample.
            noise_source: see sample.
            verbose: show a progress bar.
            img_callback: see sample.

        Returns: latents, (B, C, h, w).
        """
        scale, negative = unconditional_guidance_scale, unconditional_conditioning
        taken = self.steps_back(
            x_latent, cond, t_start, scale, negative, use_original_steps, mask, x0, noise_source
        )
        with sampling_run(self.model, uses_guidance(negative, scale)):
            for i, result in enumerate(self.shown(taken, t_start, verbose)):
                x_latent, predicted = result
                if callback is not None:
                    callback(i)
                if img_callback is not None:
                    img_callback(predicted, i)
        return x_latent

    def steps_back(
        self,
        x_latent: Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        use_original_steps: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        noise_source: NoiseSource | None = None,
    ) -> Steps:
        """The steps of ``decode``, one by one, to be taken within a `sampling_run`.

        Raises:
            ValueError: the conditioning has not B rows, there are not so many steps, or there is a
                mask without x0.
        """
        check_batch_size(cond, x_latent.shape[0])
        steps = self._first_steps("t_start", t_start, use_original_steps)
        denoise = noise_predictor(
            self.model, cond, unconditional_conditioning, unconditional_guidance_scale
        )
        return self._begun(denoise, x_latent, steps, noise_source, mask, x0)

    def shown(self, steps: Iterable[T], n: int, is_shown: bool = True) -> Iterator[T]:
        """The steps behind a progress bar."""
        return iter(tqdm(steps, desc=self.name, total=n, disable=not is_shown))

    def _begun(
        self,
        denoise: Denoiser,
        x: Tensor,
        steps: Sequence[StepCoefficients],
        noise_source: NoiseSource | None,
        mask: Tensor | None,
        x0: Tensor | None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        quantize_x0: bool = False,
    ) -> Steps:
        """`iterate`, with what the arguments of ``sample`` say of noise and mask."""
        if mask is not None and x0 is None:
            raise ValueError("a mask needs x0, the latents to keep")

        def draw(sigma: float) -> Tensor | None:
            if noise_source is not None and sigma == 0:
                return None
            noise = self._noise(x.shape, noise_source)
            return F.dropout(noise * temperature, noise_dropout)

        mask_noise: Tensor | None = None

        def blend(x_t: Tensor, c: StepCoefficients) -> Tensor:
            nonlocal mask_noise
            if mask is None or x0 is None:
                return x_t
            if mask_noise is None or self.redraws_mask_noise:
                mask_noise = self._noise(x0.shape, noise_source)
            known = c.signal * x0 + c.noise * mask_noise
            return known * mask + (1 - mask) * x_t

        quantize = _quantizer(self.model) if quantize_x0 else None
        return self.iterate(x, steps[::-1], Run(denoise, draw, blend, quantize))

    def _scale_by_step(self, scales: Sequence[float]) -> Scale:
        steps = [c.t for c in self.steps]
        if len(scales) != len(steps):
            raise InputError(f"ucg_schedule has {len(scales)} scales for {len(steps)} steps")
        known = list(zip(steps, reversed(scales), strict=True))
        # what is evaluated between two steps belongs to the one that comes first
        return lambda t: next((scale for step, scale in known if step >= t), known[-1][1])

    def _noise(self, shape: torch.Size, source: NoiseSource | None) -> Tensor:
        if source is None:
            return torch.randn(shape, device=self.device)
        return source(shape).to(self.device)


def _quantizer(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda latents: model.first_stage_model.quantize(latents)[0]


def _corrected(
    denoise: Denoiser,
    corrector: Any,
    model: DiffusionModel,
    conditioning: Conditioning,
    kwargs: dict[str, Any],
) -> Denoiser:
    def corrected(x: Tensor, t: int | float, alpha_bar: float) -> Tensor:
        steps = torch.full((x.shape[0],), t, device=x.device)
        eps = denoise(x, t, alpha_bar)
        return corrector.modify_score(model, eps, x, steps, conditioning, **kwargs)

    return corrected
