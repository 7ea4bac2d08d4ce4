"""Euler and Euler ancestral against the rules as k-diffusion publishes them, in terms of sigma."""

import pytest
import torch
from closed_form import GaussianModel, golden_model

from ldm.models.diffusion.euler import EulerAncestralSampler, EulerSampler

SHAPE = (4, 8, 8)


def in_sigma(model, x, c):
    """Predicted x_0 of latents x with noise of that sigma on top, and the step's two sigmas."""
    sigma, sigma_next = (((1 - a) / a) ** 0.5 for a in (c.alpha_bar, c.alpha_bar_prev))
    eps = model.function(x / (1 + sigma**2) ** 0.5, torch.full((len(x),), c.t), torch.zeros(2, 1))
    return x - sigma * eps, sigma, sigma_next


@pytest.mark.parametrize("schedule", ["uniform", "karras"])
@pytest.mark.parametrize("make_model", [GaussianModel, golden_model])
def test_euler_is_k_diffusion_s(make_model, schedule):
    model = make_model()
    sampler = EulerSampler(model)
    sampler.make_schedule(12, schedule)
    noise = torch.randn(2, *SHAPE)
    latents = sampler.decode(noise, torch.zeros(2, 1), 12, verbose=False)
    x = noise / sampler.steps[-1].signal
    for c in sampler.steps[::-1]:
        denoised, sigma, sigma_next = in_sigma(model, x, c)
        d = (x - denoised) / sigma
        x = x + d * (sigma_next - sigma)
    torch.testing.assert_close(latents, x, atol=2e-4, rtol=2e-4)
    assert len(model.calls) == 12


@pytest.mark.parametrize("schedule", ["uniform", "karras"])
@pytest.mark.parametrize("make_model", [GaussianModel, golden_model])
def test_euler_ancestral_is_k_diffusion_s(make_model, schedule):
    model = make_model()
    sampler = EulerAncestralSampler(model)
    sampler.make_schedule(12, schedule)
    noises = torch.randn(12, 2, *SHAPE)
    ours, theirs = iter(noises[1:]), iter(noises[1:])
    latents = sampler.decode(
        noises[0], torch.zeros(2, 1), 12, noise_source=lambda shape: next(ours), verbose=False
    )
    x = noises[0] / sampler.steps[-1].signal
    for c in sampler.steps[::-1]:
        denoised, sigma, sigma_next = in_sigma(model, x, c)
        up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
        down = (sigma_next**2 - up**2) ** 0.5
        x = x + (x - denoised) / sigma * (down - sigma)
        if sigma_next > 0:
            x = x + up * next(theirs)
    torch.testing.assert_close(latents, x, atol=2e-4, rtol=2e-4)
    assert next(ours, None) is None  # 11 draws: the last step adds no noise


def test_euler_ancestral_draws_from_the_distribution():
    model = GaussianModel()
    torch.manual_seed(0)
    latents, _ = EulerAncestralSampler(model).sample(100, 8, (4, 16, 16), verbose=False)
    assert latents.mean().item() == pytest.approx(model.mean, abs=0.03)
    assert latents.std().item() == pytest.approx(model.std, abs=0.05)
    other, _ = EulerAncestralSampler(model).sample(100, 8, (4, 16, 16), verbose=False)
    assert not torch.equal(latents, other)


def test_euler_draws_nothing_but_where_it_starts():
    torch.manual_seed(0)
    EulerSampler(GaussianModel()).sample(5, 1, SHAPE, verbose=False)
    drawn = torch.randn(1)
    torch.manual_seed(0)
    torch.randn(1, *SHAPE)
    assert torch.equal(drawn, torch.randn(1))


def test_eta_does_not_outlive_or_precede_the_schedule():
    sampler = EulerAncestralSampler(GaussianModel())
    original = sampler._steps(use_original_steps=True)
    assert original[500].sigma > 0
    sampler.make_schedule(5)
    assert sampler.steps[3].sigma > 0
