"""Models whose output is a formula: what sampler tests draw from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.schedule import (
    make_beta_schedule,
    rescale_zero_terminal_snr,
    schedule_buffers,
)


class ClosedFormModel:
    """What samplers need of a model, around a function (x, t, c) -> output; it notes each call."""

    num_timesteps = 1000
    zero_snr = False
    device = torch.device("cpu")

    def __init__(self, function, parameterization="eps"):
        self.function = function
        self.parameterization = parameterization
        self.calls: list[float] = []
        self.rows: list[int] = []
        self.n_runs = 0
        betas = make_beta_schedule("linear", self.num_timesteps, 0.00085, 0.0120)
        if self.zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        for name, buffer in schedule_buffers(betas).items():
            setattr(self, name, buffer)

    def begin_run(self, is_guided):
        self.n_runs += 1
        self.is_guided = is_guided

    def apply_model(self, x, t, c):
        self.calls.append(t[0].item())
        self.rows.append(len(x))
        return self.function(x, t, c)

    def level(self, t: float) -> float:
        """alpha_bar at a step, which may be a fraction."""
        table = np.log(np.maximum(self.alphas_cumprod.double().numpy(), 2.0**-24))
        return float(np.exp(np.interp(t, np.arange(self.num_timesteps), table)))


class GaussianModel(ClosedFormModel):
    """The best possible predictor for latents whose elements are independent N(mean, std^2)."""

    def __init__(self, parameterization="eps", mean=1.5, std=0.5):
        super().__init__(self.predict, parameterization)
        self.mean, self.std = mean, std

    def moments(self, alpha_bar: float) -> tuple[float, float]:
        """Mean and standard deviation of noisy latents."""
        return alpha_bar**0.5 * self.mean, (alpha_bar * self.std**2 + 1 - alpha_bar) ** 0.5

    def predict(self, x, t, c):
        a = self.level(t[0].item())
        mean, std = self.moments(a)
        eps = (1 - a) ** 0.5 * (x - mean) / std**2
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        v = a**0.5 * eps - (1 - a) ** 0.5 * x0
        return {"eps": eps, "x0": x0, "v": v}[self.parameterization]

    def flow(self, x: Tensor, start: float, end: float) -> Tensor:
        """Exact solution of the probability flow from one alpha_bar to another."""
        mean, std = self.moments(start)
        end_mean, end_std = self.moments(end)
        return end_mean + end_std / std * (x - mean)


def golden_model(parameterization="eps") -> ClosedFormModel:
    """The model of tests/golden/samplers*.safetensors."""

    def output(x, t, c):
        return (
            torch.tanh(0.7 * x + c[:, :, None, None])
            * torch.cos(t.float() / 1000)[:, None, None, None]
        )

    return ClosedFormModel(output, parameterization)


def table_model() -> ClosedFormModel:
    """A model for which upstream's results, calls and random state are known as a table."""

    def output(x, t, c):
        wave = 0.05 * torch.sin(t / 100).reshape(-1, 1, 1, 1)
        return 0.3 * x + wave + 0.02 * c.mean((1, 2)).reshape(-1, 1, 1, 1)

    return ClosedFormModel(output)


def sample_table_row(sampler_class, n_steps: int, eta: float = 0.0):
    """Run a row of that table: the model, the result, and the random number drawn next."""
    model = table_model()
    torch.manual_seed(0)
    latents, _ = sampler_class(model).sample(
        S=n_steps,
        batch_size=1,
        shape=(1, 4, 4),
        conditioning=torch.ones(1, 2, 3),
        eta=eta,
        x_T=torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4),
        unconditional_guidance_scale=7.5,
        unconditional_conditioning=torch.zeros(1, 2, 3),
        verbose=False,
    )
    return model, latents, torch.randn(1).item()


def sample_golden(sampler_class, golden, n_steps: int, parameterization: str = "eps"):
    """The latents that a golden file's inputs give, with guidance."""
    latents, _ = sampler_class(golden_model(parameterization)).sample(
        S=n_steps,
        batch_size=2,
        shape=(4, 8, 8),
        conditioning=golden["cond"],
        x_T=golden["x_T"],
        unconditional_guidance_scale=7.5,
        unconditional_conditioning=golden["uncond"],
        verbose=False,
    )
    return latents
