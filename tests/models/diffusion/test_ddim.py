import pytest
import torch
from closed_form import GaussianModel, golden_model, sample_table_row, table_model
from golden_util import load_golden

from ldm.models.diffusion.ddim import DDIMSampler, ddim_step
from ldm.models.diffusion.schedule import StepCoefficients

SHAPE = (4, 8, 8)
CLOSE = {"atol": 3e-5, "rtol": 1e-6}  # values reach 35


@pytest.fixture(scope="module")
def golden():
    return load_golden("samplers")[0]


def guidance(golden):
    return {
        "unconditional_guidance_scale": 7.5,
        "unconditional_conditioning": golden["uncond"],
        "verbose": False,
    }


@pytest.mark.parametrize("n_steps", [10, 50])
def test_latents_equal_upstreams(golden, n_steps):
    latents, _ = DDIMSampler(golden_model()).sample(
        S=n_steps,
        batch_size=2,
        shape=SHAPE,
        conditioning=golden["cond"],
        x_T=golden["x_T"],
        **guidance(golden),
    )
    torch.testing.assert_close(latents, golden[f"ddim_{n_steps}"], **CLOSE)


def test_noise_is_drawn_in_upstreams_order(golden):
    torch.manual_seed(11)
    latents, _ = DDIMSampler(golden_model()).sample(
        10, 2, SHAPE, golden["cond"], eta=1.0, x_T=golden["x_T"], **guidance(golden)
    )
    torch.testing.assert_close(latents, golden["ddim_eta1_10_seed11"], **CLOSE)


@pytest.mark.parametrize("n_steps", [10, 50])
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_image_to_image_equals_upstreams(golden, n_steps, strength):
    sampler = DDIMSampler(golden_model())
    sampler.make_schedule(n_steps)
    t = int(strength * n_steps)
    z = sampler.stochastic_encode(golden["x0"], torch.tensor([t] * 2), noise=golden["noise"])
    name = f"img2img_{n_steps}_{strength}"
    torch.testing.assert_close(z, golden[f"{name}_encoded"], **CLOSE)
    latents = sampler.decode(z, golden["cond"], t, **guidance(golden))
    torch.testing.assert_close(latents, golden[f"{name}_decoded"], **CLOSE)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_parameterizations_equal_upstreams(parameterization):
    golden, _ = load_golden("samplers_dpm")
    latents, _ = DDIMSampler(golden_model(parameterization)).sample(
        10, 2, SHAPE, golden["cond"], x_T=golden["x_T"], **guidance(golden)
    )
    torch.testing.assert_close(latents, golden[f"ddim_{parameterization}_10"], **CLOSE)


@pytest.mark.parametrize(
    ("n_steps", "eta", "calls", "first", "row", "total", "next_number"),
    [
        (10, 0.0, 10, [901, 801], [-4.804765, -4.282414, -3.760065], -14.19422, 0.131826),
        (30, 0.0, 31, [991, 958], [-6.526515, -5.811709, -5.096904], -18.64743, -0.742993),
        (50, 0.0, 50, [981, 961], [-6.190698, -5.514187, -4.83768], -17.87022, 0.119027),
        (10, 1.0, 10, [901, 801], [-7.286759, -6.25833, -2.000681], -13.67416, 0.131826),
    ],
)
def test_upstreams_table(n_steps, eta, calls, first, row, total, next_number):
    model, latents, drawn = sample_table_row(DDIMSampler, n_steps, eta)
    assert len(model.calls) == calls
    assert model.calls[:2] == first
    assert model.calls[-1] == 1
    assert latents[0, 0, 0, :3].tolist() == pytest.approx(row, abs=1e-5)
    assert latents.sum().item() == pytest.approx(total, abs=1e-4)
    assert drawn == pytest.approx(next_number, abs=1e-6)


def test_upstreams_image_to_image_row():
    model = table_model()
    sampler = DDIMSampler(model)
    sampler.make_schedule(10)
    torch.manual_seed(0)
    z = sampler.stochastic_encode(torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4), torch.tensor([7]))
    expected = [-1.364953, -1.352203, -0.449984, -0.587455]
    assert z[0, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    latents = sampler.decode(z, torch.ones(1, 2, 3), 7, 5.0, torch.zeros(1, 2, 3), verbose=False)
    expected = [-2.366111, -2.345627, -0.896178, -1.11703]
    assert latents[0, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert len(model.calls) == 7
    assert model.calls[0] == 601


def test_ancestral_sampling_has_the_data_statistics():
    model = GaussianModel(mean=0.8, std=0.5)
    torch.manual_seed(0)
    latents, _ = DDIMSampler(model).sample(100, 8, (4, 16, 16), eta=1.0, verbose=False)
    assert latents.mean() == pytest.approx(0.8, abs=0.05)
    assert latents.std() == pytest.approx(0.5, abs=0.05)


def test_temperature_and_dropout_act_on_the_added_noise():
    def std(**kwargs):
        torch.manual_seed(0)
        model = GaussianModel(mean=0.0, std=0.5)
        return DDIMSampler(model).sample(50, 4, SHAPE, eta=1.0, verbose=False, **kwargs)[0].std()

    assert std(temperature=0.5) < 0.8 * std()
    assert std(noise_dropout=0.9) > 1.1 * std(temperature=0.0)


def test_step_is_the_papers_equation():
    a, a_prev, sigma = 0.3, 0.6, 0.2
    c = StepCoefficients(
        t=500,
        alpha_bar=a,
        alpha_bar_prev=a_prev,
        signal=a**0.5,
        noise=(1 - a) ** 0.5,
        signal_prev=a_prev**0.5,
        direction=(1 - a_prev - sigma**2) ** 0.5,
        sigma=sigma,
    )
    x0, eps, noise = torch.randn(3, 1, 4, 2, 2)
    x = a**0.5 * x0 + (1 - a) ** 0.5 * eps
    x_prev, predicted = ddim_step(x, eps, c, noise)
    torch.testing.assert_close(predicted, x0, atol=1e-5, rtol=1e-5)
    expected = a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps + sigma * noise
    torch.testing.assert_close(x_prev, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="needs noise"):
        ddim_step(x, eps, c)


def encoded_as_written(model, x, steps, cond):
    """Stable Diffusion 2's formula, with its count where the step belongs."""
    for i, c in enumerate(steps):
        a, b = c.alpha_bar, c.alpha_bar_prev
        eps = model.apply_model(x, torch.full((len(x),), i), cond)
        noise = a**0.5 * ((1 / a - 1) ** 0.5 - (1 / b - 1) ** 0.5) * eps
        x = (a / b) ** 0.5 * x + noise
    return x


@pytest.mark.parametrize("originals", [False, True])
def test_inversion_is_upstreams_formula(golden, originals):
    model, x0, cond = golden_model(), golden["x0"], golden["cond"]
    sampler = DDIMSampler(model)
    sampler.make_schedule(10)
    steps = sampler._steps(originals)[:7]
    got, found = sampler.encode(x0, cond, 7, originals, verbose=False)
    torch.testing.assert_close(got, encoded_as_written(model, x0, steps, cond), **CLOSE)
    assert found["x_encoded"] is got
    assert "intermediates" not in found
    assert torch.equal(sampler.encode(x0, cond, 0, verbose=False)[0], x0)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_noise_found_by_inversion_draws_the_picture_again(parameterization):
    model = GaussianModel(parameterization=parameterization)
    torch.manual_seed(0)
    x0 = torch.randn(2, *SHAPE)
    errors = []
    for n_steps in (20, 100, 500):
        sampler = DDIMSampler(model)
        sampler.encodes_as_upstream = False
        sampler.make_schedule(n_steps)
        n = len(sampler.steps)
        noise, _ = sampler.encode(x0, None, n, verbose=False)
        drawn = sampler.decode(noise, None, n, verbose=False)
        errors.append((drawn - x0).square().mean().sqrt().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 0.02


def test_inversion_with_guidance_keeps_what_is_asked_for(golden):
    sampler = DDIMSampler(golden_model())
    sampler.make_schedule(10)
    seen = []
    got, found = sampler.encode(
        golden["x0"],
        golden["cond"],
        8,
        return_intermediates=3,
        callback=seen.append,
        **guidance(golden),
    )
    assert seen == list(range(8))
    assert found["intermediate_steps"] == [0, 2, 4, 6, 7]
    assert len(found["intermediates"]) == 5
    assert torch.equal(found["intermediates"][-1], got)
    assert not torch.equal(got, sampler.encode(golden["x0"], golden["cond"], 8, verbose=False)[0])
    for n in (-1, 11):
        with pytest.raises(ValueError, match=f"t_enc is {n}, but the schedule has 10 steps"):
            sampler.encode(golden["x0"], golden["cond"], n)
    with pytest.raises(ValueError, match="rows"):
        sampler.encode(golden["x0"][:1], golden["cond"], 2)
