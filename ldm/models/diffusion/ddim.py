"""DDIM: denoising diffusion implicit models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.guidance import (
    Conditioning,
    check_batch_size,
    noise_predictor,
    sampling_run,
    uses_guidance,
)
from ldm.models.diffusion.sampler import Run, Sampler, Steps
from ldm.models.diffusion.schedule import StepCoefficients, to_numpy


def ddim_step(
    x: Tensor,
    eps: Tensor,
    c: StepCoefficients,
    noise: Tensor | None = None,
    quantize: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One DDIM update x_t -> x_prev.

    x_0 = (x - sqrt(1 - a) eps) / sqrt(a);
    x_prev = sqrt(a_prev) x_0 + sqrt(1 - a_prev - sigma^2) eps + sigma noise.

    Args:
        x: current latents, (B, C, h, w), scaled.
        eps: predicted noise, same shape; unit variance.
        c: the step's coefficients.
        noise: unit normal, same shape; None only if c.sigma == 0.
        quantize: applied to the predicted x_0, or None.

    Returns: (x_prev, predicted x_0), both (B, C, h, w).

    Raises:
        ValueError: noise is None while c.sigma > 0.

    Source: Song et al. 2021 (arXiv 2010.02502) eq. 12.
    """
    x0 = (x - c.noise * eps) / c.signal
    if quantize is not None:
        x0 = quantize(x0)
    x_prev = c.signal_prev * x0 + c.direction * eps
    if c.sigma > 0:
        if noise is None:
            raise ValueError(f"sigma is {c.sigma}: the step needs noise")
        x_prev = x_prev + c.sigma * noise
    return x_prev, x0


class DDIMSampler(Sampler):
    """DDIM with upstream's interface and, for a given seed, upstream's pictures.

    ``stochastic_encode(x0, t)`` adds the noise of step t, though ``decode`` of t steps begins at
    step t-1: upstream's mistake, which leaves noise in the picture where steps are few. Without
    ``encodes_as_upstream`` it adds that of step t-1.
    """

    name = "DDIM Sampler"
    fixed_eta = None

    def iterate(self, x: Tensor, steps: Sequence[StepCoefficients], run: Run) -> Steps:
        """See Sampler.iterate."""
        for c in steps:
            x = run.blend(x, c)
            eps = run.denoise(x, c.t, c.alpha_bar)
            x, x0 = ddim_step(x, eps, c, run.draw(c.sigma), run.quantize)
            yield x, x0

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Conditioning,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        callback: Callable[[int], Any] | None = None,
        verbose: bool = True,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The first ``t_enc`` steps the other way: noise from which ``decode`` draws x0 again.

        The model is asked at the step that is gone to; with ``encodes_as_upstream`` at 0, 1, 2,
        ..., upstream's mistake where steps are not those of training.

        Args:
            x0: latents, (B, C, h, w), scaled.
            c: conditioning with B rows.
            t_enc: number of steps.
            use_original_steps: count training steps instead.
            return_intermediates: about how many results to keep on the way.
            unconditional_guidance_scale: 1 is without guidance, and inverts best.
            unconditional_conditioning: of the same kind and rows as c.
            callback: called with the number of each step.
            verbose: show a progress bar.

        Returns:
            Latents (B, C, h, w); ``x_encoded``, the same, ``intermediate_steps``, numbers of
            the steps that are kept, and ``intermediates``, if asked for, their latents.

        Raises:
            ValueError: the conditioning has not B rows, or there are not so many steps.

        Source: Song et al. 2021 (arXiv 2010.02502) section 4.3; Stable Diffusion 2's sampler.
        """
        check_batch_size(c, x0.shape[0])
        steps = self._first_steps("t_enc", t_enc, use_original_steps)
        negative, scale = unconditional_conditioning, unconditional_guidance_scale
        denoise = noise_predictor(self.model, c, negative, scale)
        levels = to_numpy(self.model.alphas_cumprod).tolist()
        every = max(t_enc // (return_intermediates or 1), 1)
        x, kept = x0, {}
        with sampling_run(self.model, uses_guidance(negative, scale)):
            for i, step in enumerate(self.shown(steps, t_enc, verbose)):
                t = i if self.encodes_as_upstream else int(step.t)
                eps = denoise(x, t, levels[t])
                before = (1 - step.alpha_bar_prev) ** 0.5
                x = step.signal * (x - before * eps) / step.signal_prev + step.noise * eps
                if return_intermediates and (i % every == 0 or i >= t_enc - 2):
                    kept[i] = x
                if callback is not None:
                    callback(i)
        found: dict[str, Any] = {"x_encoded": x, "intermediate_steps": [*kept]}
        if return_intermediates:
            found["intermediates"] = [*kept.values()]
        return x, found

    def _upstream_levels(self, steps: list[StepCoefficients]) -> list[float]:
        return [c.alpha_bar for c in steps]
