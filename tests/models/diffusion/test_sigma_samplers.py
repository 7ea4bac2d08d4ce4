"""Heun, DPM++ SDE, UniPC and LCM against the rules as their authors publish them."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from closed_form import GaussianModel, golden_model

from ldm.models.diffusion.dpmpp_sde import DPMppSDESampler
from ldm.models.diffusion.heun import HeunSampler
from ldm.models.diffusion.lcm import LCMSampler
from ldm.models.diffusion.schedule import sigma_coefficients, time_of
from ldm.models.diffusion.unipc import UniPCSampler

SHAPE = (4, 8, 8)
CLOSE = {"atol": 5e-4, "rtol": 5e-4}

both_models = pytest.mark.parametrize("make_model", [GaussianModel, golden_model])
every_schedule = pytest.mark.parametrize("schedule", ["uniform", "karras", "sgm_uniform"])


def run(sampler_class, model, schedule, n_steps=8):
    """A run, its sigmas from the highest to 0, a function for its x_0, and all noise it drew."""
    sampler, drawn = sampler_class(model), []
    sampler.make_schedule(n_steps, schedule)
    generator = torch.Generator().manual_seed(3)

    def source(shape):
        drawn.append(torch.randn(shape, generator=generator))
        return drawn[-1]

    noise = torch.randn(2, *SHAPE)
    context = torch.zeros(2, 1)
    latents = sampler.decode(noise, context, n_steps, verbose=False, noise_source=source)
    steps = sampler.steps[::-1]
    sigmas = [((1 - c.alpha_bar) / c.alpha_bar) ** 0.5 for c in steps] + [0.0]
    calls = model.calls[:]

    def denoised(x, sigma):
        t = torch.full((len(x),), time_of(model.alphas_cumprod, sigma))
        return x - sigma * model.function(x / (1 + sigma**2) ** 0.5, t, context)

    return latents, noise / steps[0].signal, sigmas, denoised, drawn, calls


@every_schedule
@both_models
def test_heun_is_k_diffusion_s(make_model, schedule):
    latents, x, sigmas, denoised, drawn, calls = run(HeunSampler, make_model(), schedule)
    for sigma, end in pairwise(sigmas):
        d = (x - denoised(x, sigma)) / sigma
        if end == 0:
            x = x + d * (end - sigma)
        else:
            x_2 = x + d * (end - sigma)
            d_2 = (x_2 - denoised(x_2, end)) / end
            x = x + (d + d_2) / 2 * (end - sigma)
    torch.testing.assert_close(latents, x, **CLOSE)
    assert len(calls) == 15
    assert drawn == []


@every_schedule
@both_models
def test_dpmpp_sde_is_k_diffusion_s(make_model, schedule):
    latents, x, sigmas, denoised, drawn, calls = run(DPMppSDESampler, make_model(), schedule)
    noises = iter(drawn)

    def ancestral(sigma_from, sigma_to):
        variance = sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2
        up = min(sigma_to, variance**0.5)
        return (sigma_to**2 - up**2) ** 0.5, up

    for sigma, end in pairwise(sigmas):
        x0 = denoised(x, sigma)
        if end == 0:
            x = x + (x - x0) / sigma * (end - sigma)
            continue
        t, t_next = -math.log(sigma), -math.log(end)
        s = t + (t_next - t) / 2
        first, second = next(noises), next(noises)
        # increments of a Brownian motion along sigma, each with variance 1
        middle = math.exp(-s)
        both = (sigma - middle) ** 0.5 * first + (middle - end) ** 0.5 * second
        both = both / (sigma - end) ** 0.5
        down, up = ancestral(sigma, middle)
        x_2 = down / sigma * x - math.expm1(t + math.log(down)) * x0 + up * first
        down, up = ancestral(sigma, end)
        x_0_2 = denoised(x_2, middle)
        x = down / sigma * x - math.expm1(t + math.log(down)) * x_0_2 + up * both
    torch.testing.assert_close(latents, x, **CLOSE)
    assert len(calls) == 15
    assert next(noises, None) is None


@every_schedule
@both_models
def test_unipc_is_that_of_diffusers(make_model, schedule):
    model = make_model()
    latents, x, sigmas, denoised, drawn, calls = run(UniPCSampler, model, schedule)
    theirs = diffusers.UniPCMultistepScheduler(solver_order=2, solver_type="bh2")
    theirs.set_timesteps(8)
    theirs.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    x = x / (1 + sigmas[0] ** 2) ** 0.5
    for i, t in enumerate(theirs.timesteps):
        signal = (1 + sigmas[i] ** 2) ** -0.5
        eps = (x / signal - denoised(x / signal, sigmas[i])) / sigmas[i]
        x = theirs.step(eps, t, x.double()).prev_sample.float()
    torch.testing.assert_close(latents, x, **CLOSE)
    assert len(calls) == 8
    assert drawn == []


@every_schedule
@both_models
def test_lcm_is_multistep_consistency_sampling(make_model, schedule):
    latents, x, sigmas, denoised, drawn, calls = run(LCMSampler, make_model(), schedule, 4)
    noises = iter(drawn)
    for sigma, end in pairwise(sigmas):
        x = denoised(x, sigma)
        if end > 0:
            x = x + end * next(noises)
    torch.testing.assert_close(latents, x, **CLOSE)
    assert len(calls) == 4
    assert len(drawn) == 3


@pytest.mark.parametrize(("sampler_class", "gain"), [(HeunSampler, 3), (UniPCSampler, 3)])
def test_the_second_order_is_reached(sampler_class, gain):
    errors = []
    for n_steps in (20, 40):
        model = GaussianModel()
        sampler = sampler_class(model)
        sampler.make_schedule(n_steps, "karras")
        mean, std = model.moments(sampler.steps[-1].alpha_bar)
        x = mean + std * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
        exact = model.flow(x, sampler.steps[-1].alpha_bar, 1.0)
        drawn = sampler.decode(x, None, n_steps, verbose=False)
        errors.append((drawn - exact).abs().max().item())
    assert errors[1] < errors[0] / gain, errors


def test_dpmpp_sde_has_the_data_s_statistics():
    model = GaussianModel(mean=0.8, std=0.5)
    torch.manual_seed(0)
    latents, _ = DPMppSDESampler(model).sample(30, 8, (4, 16, 16), verbose=False)
    assert latents.mean() == pytest.approx(0.8, abs=0.05)
    assert latents.std() == pytest.approx(0.5, abs=0.05)


def test_sgm_uniform_spacing_is_that_of_the_web_uis():
    steps = sigma_coefficients(GaussianModel().alphas_cumprod, 5, "sgm_uniform")
    assert [c.t for c in steps[::-1]] == pytest.approx(torch.linspace(999, 0, 6)[:-1].tolist())
    assert steps[0].alpha_bar_prev == 1
