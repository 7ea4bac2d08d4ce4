import math

import pytest
import torch
from closed_form import GaussianModel, golden_model, sample_golden, sample_table_row
from golden_util import load_golden

from ldm.models.diffusion.dpm_solver import (
    DPMpp2MSampler,
    DPMSolverSampler,
    dpm_step,
    half_log_snr,
)
from ldm.models.diffusion.schedule import dpm_coefficients


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("n_steps", [10, 20])
def test_latents_equal_upstreams(parameterization, n_steps):
    golden, _ = load_golden("samplers_dpm")
    latents = sample_golden(DPMSolverSampler, golden, n_steps, parameterization)
    expected = golden[f"dpm_{parameterization}_{n_steps}"]
    torch.testing.assert_close(latents, expected, atol=4e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("n_steps", "times", "row", "total"),
    [
        (5, [999, 799.2, 199.8], [-6.999485, -6.224228, -5.448972], -18.96093),
        (10, [999, 899.1, 99.9], [-6.648768, -5.920152, -5.191534], -18.94625),
        (20, [999, 949.05, 49.95], [-6.548252, -5.830098, -5.111943], -18.59348),
    ],
)
def test_upstreams_table(n_steps, times, row, total):
    model, latents, drawn = sample_table_row(DPMSolverSampler, n_steps)
    assert len(model.calls) == n_steps
    assert [*model.calls[:2], model.calls[-1]] == pytest.approx(times)
    assert latents[0, 0, 0, :3].tolist() == pytest.approx(row, abs=1e-5)
    assert latents.sum().item() == pytest.approx(total, abs=1e-4)
    assert drawn == pytest.approx(1.540996, abs=1e-6)  # nothing was drawn


def test_half_log_snr():
    assert half_log_snr(0.5) == pytest.approx(0)
    assert half_log_snr(0.9) == pytest.approx(math.log((0.9 / 0.1) ** 0.5))


def test_first_order_step_is_the_deterministic_ddim_step():
    alpha_bar = GaussianModel().alphas_cumprod
    c = dpm_coefficients(alpha_bar, 10)[6]
    x0, eps = torch.randn(2, 1, 4, 2, 2)
    x = c.signal * x0 + c.noise * eps
    expected = c.signal_prev * x0 + (1 - c.alpha_bar_prev) ** 0.5 * eps
    torch.testing.assert_close(dpm_step(x, x0, c), expected, atol=1e-5, rtol=1e-5)


def test_last_of_few_steps_is_of_first_order():
    # with two steps every step is of first order, as in deterministic DDIM along the same times
    model = GaussianModel()
    x = torch.randn(1, 4, 2, 2)
    latents, _ = DPMSolverSampler(model).sample(2, 1, (4, 2, 2), x_T=x, verbose=False)
    for c in dpm_coefficients(model.alphas_cumprod, 2)[::-1]:
        eps = model.predict(x, torch.tensor([c.t]), None)
        x0 = (x - c.noise * eps) / c.signal
        x = c.signal_prev * x0 + (1 - c.alpha_bar_prev) ** 0.5 * eps
    torch.testing.assert_close(latents, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["uniform", "karras"])
@pytest.mark.parametrize("make_model", [GaussianModel, golden_model])
@pytest.mark.parametrize("n_steps", [1, 2, 12, 20])
def test_dpmpp_2m_is_k_diffusion_s(make_model, schedule, n_steps):
    model = make_model()
    sampler = DPMpp2MSampler(model)
    sampler.make_schedule(n_steps, schedule)
    noise = torch.randn(2, 4, 8, 8)
    latents = sampler.decode(noise, torch.zeros(2, 1), n_steps, verbose=False)
    x, old, h_last = noise / sampler.steps[-1].signal, None, None
    for c in sampler.steps[::-1]:
        sigma, sigma_next = (((1 - a) / a) ** 0.5 for a in (c.alpha_bar, c.alpha_bar_prev))
        t = torch.full((2,), c.t)
        denoised = x - sigma * model.function(x / (1 + sigma**2) ** 0.5, t, torch.zeros(2, 1))
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        estimate = denoised
        if old is not None and sigma_next > 0:
            r = h_last / h
            estimate = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x = sigma_next / sigma * x - math.expm1(-h) * estimate
        old, h_last = denoised, h
    torch.testing.assert_close(latents, x, atol=3e-4, rtol=3e-4)
    assert len(model.calls) == n_steps
