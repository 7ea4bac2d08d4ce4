from itertools import pairwise

import numpy as np
import pytest
import torch

from ldm.errors import InputError
from ldm.models.diffusion.schedule import (
    BETA_SCHEDULES,
    ddim_coefficients,
    dpm_coefficients,
    make_beta_schedule,
    make_ddim_timesteps,
    original_coefficients,
    rescale_zero_terminal_snr,
    schedule_buffers,
    sigma_coefficients,
    variational_weights,
)

BETAS = make_beta_schedule("linear", 1000, 0.00085, 0.0120)
BUFFERS = schedule_buffers(BETAS)
ALPHA_BAR = BUFFERS["alphas_cumprod"]


def test_stable_diffusion_constants():
    for t, value in {0: 0.99915, 1: 0.9982960278, 981: 0.0057755, 999: 0.0046600985}.items():
        assert ALPHA_BAR[t].item() == pytest.approx(value, rel=1e-5)
    sigma = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()
    assert sigma[0].item() == pytest.approx(0.029167158, rel=2e-5)
    assert sigma[-1].item() == pytest.approx(14.614641229, rel=1e-5)


def test_upscaler_constants():
    alpha_bar = schedule_buffers(make_beta_schedule("linear", 1000, 1e-4, 0.02))["alphas_cumprod"]
    assert alpha_bar[-1].item() == pytest.approx(0.00073341, rel=1e-4)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_betas_are_float64_and_sensible(name):
    betas = make_beta_schedule(name, 100)
    assert betas.dtype == np.float64
    assert betas.shape == (100,)
    assert (betas > 0).all()
    assert (betas < 1).all()
    assert (np.diff(betas) > -1e-12).all()


def test_cosine_schedule_follows_the_paper():
    t = np.arange(1, 101) / 100
    expected = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    expected /= np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    for name in ("cosine", "squaredcos_cap_v2"):
        alpha_bar = np.cumprod(1 - make_beta_schedule(name, 100))
        np.testing.assert_allclose(alpha_bar[:-1], expected[:-1], rtol=1e-9)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="beta_schedule 'line': choose from linear, cosine"):
        make_beta_schedule("line", 10)
    with pytest.raises(InputError, match="ddim_discretize 'even'"):
        make_ddim_timesteps("even", 10, 1000)


def test_buffers_are_consistent():
    alpha_bar = np.cumprod(1 - BETAS)
    assert len(BUFFERS) == 12
    assert all(b.dtype == torch.float32 and b.shape == (1000,) for b in BUFFERS.values())
    assert BUFFERS["alphas_cumprod_prev"][0] == 1
    assert torch.equal(BUFFERS["alphas_cumprod_prev"][1:], ALPHA_BAR[:-1])
    x0, noise = np.random.default_rng(0).normal(size=(2, 1000))
    x = BUFFERS["sqrt_alphas_cumprod"] * x0 + BUFFERS["sqrt_one_minus_alphas_cumprod"] * noise
    back = BUFFERS["sqrt_recip_alphas_cumprod"] * x - BUFFERS["sqrt_recipm1_alphas_cumprod"] * noise
    np.testing.assert_allclose(back, x0, atol=1e-4)
    np.testing.assert_allclose(
        BUFFERS["log_one_minus_alphas_cumprod"], np.log(1 - alpha_bar), rtol=1e-6
    )


def test_posterior_is_bayes_rule():
    # q(x_{t-1} | x_t, x_0) from the product of two normals
    t, alpha_bar = 500, np.cumprod(1 - BETAS)
    prior_mean, prior_variance = np.sqrt(alpha_bar[t - 1]), 1 - alpha_bar[t - 1]  # for x_0 = 1
    precision = 1 / prior_variance + (1 - BETAS[t]) / BETAS[t]
    assert BUFFERS["posterior_variance"][t] == pytest.approx(1 / precision, rel=1e-5)
    assert BUFFERS["posterior_mean_coef1"][t] == pytest.approx(
        prior_mean / prior_variance / precision, rel=1e-5
    )
    assert BUFFERS["posterior_mean_coef2"][t] == pytest.approx(
        np.sqrt(1 - BETAS[t]) / BETAS[t] / precision, rel=1e-5
    )
    assert BUFFERS["posterior_log_variance_clipped"][0] == pytest.approx(np.log(1e-20))
    mixed = schedule_buffers(BETAS, v_posterior=1.0)["posterior_variance"]
    np.testing.assert_allclose(mixed, BETAS, rtol=1e-6)


def test_variational_weights():
    variance = BUFFERS["posterior_variance"][500].item()
    expected = BETAS[500] ** 2 / (2 * variance * (1 - BETAS[500]) * (1 - ALPHA_BAR[500].item()))
    weights = variational_weights(BETAS, "eps")
    assert weights[500] == pytest.approx(expected, rel=1e-4)
    assert weights[0] == weights[1]
    assert torch.isfinite(weights).all()
    assert (variational_weights(BETAS, "v") == 1).all()
    a = ALPHA_BAR[500].item()
    of_pictures = variational_weights(BETAS, "x0")
    assert of_pictures[500] == pytest.approx(0.5 * a**0.5 / (2 - a), rel=1e-5)
    assert of_pictures[0] == of_pictures[1]


@pytest.mark.parametrize("v_posterior", [0.25, 1.0])
def test_variational_weights_are_those_of_the_posterior_in_force(v_posterior):
    variance = schedule_buffers(BETAS, v_posterior)["posterior_variance"].double().numpy()
    expected = BETAS**2 / (2 * variance * (1 - BETAS) * (1 - np.cumprod(1 - BETAS)))
    weights = variational_weights(BETAS, "eps", v_posterior)
    np.testing.assert_allclose(weights[1:], expected[1:], rtol=1e-5)
    assert weights[0] == weights[1]


def test_timesteps_are_upstreams_wherever_those_exist():
    n_corrected = 0
    for n in range(1, 1001):
        steps = make_ddim_timesteps("uniform", n, 1000)
        upstream = [i + 1 for i in range(0, 1000, 1000 // n)]
        assert (np.diff(steps) > 0).all()
        assert steps[0] >= 0
        assert steps[-1] <= 999
        if upstream[-1] <= 999:
            assert steps.tolist() == upstream
        else:
            assert len(steps) == n
            n_corrected += 1
    assert n_corrected == 5 + 11 + 83 + 500  # 3 9 27 36 37, 101 .. 111, 251 .. 333, 501 ..


def test_timesteps_in_particular():
    assert make_ddim_timesteps("uniform", 3, 1000).tolist() == [1, 334, 667]
    assert make_ddim_timesteps("uniform", 1000, 1000).tolist() == list(range(1000))
    quad = make_ddim_timesteps("quad", 10, 1000)
    assert quad[0] == 1
    assert quad[-1] in (800, 801)
    assert (np.diff(np.diff(quad)) > 0).all()


@pytest.mark.parametrize("n_steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(n_steps):
    with pytest.raises(InputError, match=f"{n_steps} sampling steps: .* from 1 to 1000"):
        make_ddim_timesteps("uniform", n_steps, 1000)


def test_ddim_coefficients():
    timesteps = make_ddim_timesteps("uniform", 10, 1000)
    steps = ddim_coefficients(ALPHA_BAR, timesteps, eta=0.5)
    assert [c.t for c in steps] == timesteps.tolist()
    assert steps[0].alpha_bar_prev == ALPHA_BAR[0].item()
    for c, nxt in pairwise(steps):
        assert nxt.alpha_bar_prev == c.alpha_bar
    for c in steps:
        variance = (1 - c.alpha_bar_prev) / (1 - c.alpha_bar) * (1 - c.alpha_bar / c.alpha_bar_prev)
        assert c.sigma == pytest.approx(0.5 * variance**0.5, rel=1e-5)
        assert c.signal**2 == pytest.approx(c.alpha_bar)
        assert c.noise**2 == pytest.approx(1 - c.alpha_bar)
        total = c.signal_prev**2 + c.direction**2 + c.sigma**2
        assert total == pytest.approx(1, rel=1e-6)
    assert all(c.sigma == 0 for c in ddim_coefficients(ALPHA_BAR, timesteps))


def test_original_coefficients_end_without_noise():
    steps = original_coefficients(ALPHA_BAR, BUFFERS["alphas_cumprod_prev"], eta=1.0)
    assert len(steps) == 1000
    assert steps[0].alpha_bar_prev == 1
    assert steps[0].direction == 0
    ancestral = BUFFERS["posterior_variance"][700].sqrt().item()
    assert steps[700].sigma == pytest.approx(ancestral, rel=1e-3)


def test_dpm_times_are_fractions_from_last_to_first():
    steps = dpm_coefficients(ALPHA_BAR, 20)
    assert [c.t for c in steps[::-1]][:3] == pytest.approx([999, 949.05, 899.1])
    assert steps[0].alpha_bar_prev == pytest.approx(ALPHA_BAR[0].item())
    assert steps[-1].alpha_bar == pytest.approx(ALPHA_BAR[999].item())
    between = dpm_coefficients(ALPHA_BAR, 2)[0]
    middle = (ALPHA_BAR[499] * ALPHA_BAR[500]).sqrt().item()  # halfway in the logarithm
    assert between.t == 499.5
    assert between.alpha_bar == pytest.approx(middle, rel=1e-5)
    with pytest.raises(InputError, match="0 sampling steps"):
        dpm_coefficients(ALPHA_BAR, 0)


def sigma(alpha_bar):
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


@pytest.mark.parametrize("spacing", ["uniform", "karras"])
@pytest.mark.parametrize("n_steps", [1, 2, 20, 1200])
def test_sigma_steps_go_from_the_most_noise_to_none(spacing, n_steps):
    steps = sigma_coefficients(ALPHA_BAR, n_steps, spacing, eta=1.0)
    assert len(steps) == n_steps
    assert steps[-1].t == pytest.approx(999)
    assert steps[-1].alpha_bar == pytest.approx(ALPHA_BAR[999].item())
    assert (steps[0].alpha_bar_prev, steps[0].direction, steps[0].sigma) == (1, 0, 0)
    if n_steps > 1:
        assert steps[0].t == pytest.approx(0, abs=1e-6)
    for c, above in pairwise(steps):
        assert above.t > c.t
        assert above.alpha_bar_prev == c.alpha_bar


def test_karras_spacing_is_published_for_stable_diffusion():
    # the formula of Karras et al. with rho 7, between the sigmas 0.0292 and 14.6146 of SD 1
    steps = sigma_coefficients(ALPHA_BAR, 10, "karras")[::-1]
    highest, lowest = 14.6146, 0.0292
    for i, c in enumerate(steps):
        root = highest ** (1 / 7) + i / 9 * (lowest ** (1 / 7) - highest ** (1 / 7))
        assert sigma(c.alpha_bar) == pytest.approx(root**7, rel=2e-3)
    # its time is the one at which the model's own noise is that strong
    c = steps[5]
    low = int(c.t)
    share = c.t - low
    between = (
        sigma(ALPHA_BAR[low].item()) ** (1 - share) * sigma(ALPHA_BAR[low + 1].item()) ** share
    )
    assert 0 < share < 1
    assert sigma(c.alpha_bar) == pytest.approx(between, rel=1e-4)


def test_uniform_sigma_steps_are_evenly_spaced_in_time():
    steps = sigma_coefficients(ALPHA_BAR, 5)
    assert [c.t for c in steps] == pytest.approx([0, 249.75, 499.5, 749.25, 999])


def test_unknown_sigma_spacings_are_refused():
    with pytest.raises(InputError, match="0 sampling steps"):
        sigma_coefficients(ALPHA_BAR, 0)
    with pytest.raises(InputError, match="schedule 'quad': choose from uniform, karras"):
        sigma_coefficients(ALPHA_BAR, 5, "quad")


def test_a_rescaled_schedule_ends_in_noise_alone():
    betas = make_beta_schedule("linear", 1000, 0.00085, 0.0120)
    rescaled = rescale_zero_terminal_snr(betas)
    before, after = np.cumprod(1 - betas), np.cumprod(1 - rescaled)
    assert after[-1] == 0
    assert after[0] == pytest.approx(before[0])
    assert (np.diff(after) < 0).all()
    # sqrt(alpha_bar) is an affine function of what it was
    slope = np.diff(np.sqrt(after)) / np.diff(np.sqrt(before))
    assert slope == pytest.approx(np.full(999, slope[0]), rel=1e-6)
    buffers = schedule_buffers(rescaled)
    assert not any(buffer.isnan().any() for buffer in buffers.values())
