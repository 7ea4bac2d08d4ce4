"""What the samplers have in common."""

import math

import pytest
import torch
from closed_form import ClosedFormModel, GaussianModel, golden_model

from ldm.errors import InputError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMpp2MSampler, DPMSolverSampler
from ldm.models.diffusion.dpmpp_sde import DPMppSDESampler
from ldm.models.diffusion.euler import EulerAncestralSampler, EulerSampler, SigmaSampler
from ldm.models.diffusion.heun import HeunSampler
from ldm.models.diffusion.lcm import LCMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.unipc import UniPCSampler

SAMPLERS = [
    DDIMSampler,
    PLMSSampler,
    DPMSolverSampler,
    EulerSampler,
    EulerAncestralSampler,
    DPMpp2MSampler,
    HeunSampler,
    DPMppSDESampler,
    UniPCSampler,
    LCMSampler,
]
NOISY = (EulerAncestralSampler, DPMppSDESampler, LCMSampler)
DETERMINISTIC = [sampler for sampler in SAMPLERS if sampler not in NOISY]
SHAPE = (4, 8, 8)

every_sampler = pytest.mark.parametrize("sampler_class", SAMPLERS)


def run(sampler_class, model, n_steps=20, batch_size=2, **kwargs):
    sampler = sampler_class(model)
    if "x_T" in kwargs:  # then all the other noise is given as well
        torch.manual_seed(0)
    return sampler.sample(n_steps, batch_size, SHAPE, verbose=False, **kwargs)


def start(sampler_class, model, n_steps):
    """Latents with the right statistics for the first step, and their alpha_bar."""
    sampler = sampler_class(model)
    sampler.make_schedule(n_steps)
    alpha_bar = sampler.steps[-1].alpha_bar
    mean, std = model.moments(alpha_bar)
    generator = torch.Generator().manual_seed(0)
    return mean + std * torch.randn((2, *SHAPE), generator=generator), alpha_bar


def end_level(sampler_class, model):
    """alpha_bar of a sampler's results: the samplers in sigma go all the way."""
    in_sigma = issubclass(sampler_class, (SigmaSampler, DPMpp2MSampler))
    return 1.0 if in_sigma else model.level(0)


@pytest.mark.parametrize("sampler_class", DETERMINISTIC)
def test_gaussian_data_is_sampled_exactly_in_the_limit(sampler_class):
    model = GaussianModel()
    errors = []
    for n_steps in (25, 50):
        x_T, alpha_bar = start(sampler_class, model, n_steps)
        latents, _ = run(sampler_class, model, n_steps, x_T=x_T)
        exact = model.flow(x_T, alpha_bar, end_level(sampler_class, model))
        errors.append((latents - exact).abs().max().item())
    # DPM-Solver's times are evenly spaced, so its last step is a long one in terms of noise
    limit, gain = {
        DDIMSampler: (0.1, 1.7),
        PLMSSampler: (0.01, 2.5),
        DPMSolverSampler: (0.1, 1.4),
        EulerSampler: (0.12, 1.7),
        DPMpp2MSampler: (0.1, 1.4),
        HeunSampler: (0.02, 1.7),
        UniPCSampler: (0.1, 1.4),
    }[sampler_class]
    assert errors[1] < limit
    assert errors[1] < errors[0] / gain


@every_sampler
@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_every_parameterization_gives_the_same_picture(sampler_class, parameterization):
    x_T, _ = start(sampler_class, GaussianModel(), 20)
    expected, _ = run(sampler_class, GaussianModel(), x_T=x_T)
    latents, _ = run(sampler_class, GaussianModel(parameterization), x_T=x_T)
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)


@every_sampler
def test_seed_decides_the_picture(sampler_class):
    pictures = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pictures.append(run(sampler_class, GaussianModel())[0])
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


@pytest.mark.parametrize("sampler_class", DETERMINISTIC)
def test_noise_source_gives_all_noise_and_no_more_than_is_used(sampler_class):
    shapes = []

    def source(shape):
        shapes.append(tuple(shape))
        return torch.full(shape, 0.5)

    before = torch.get_rng_state()
    latents, _ = run(sampler_class, GaussianModel(), noise_source=source)
    assert shapes == [(2, *SHAPE)]
    assert torch.equal(before, torch.get_rng_state())
    expected, _ = run(sampler_class, GaussianModel(), x_T=torch.full((2, *SHAPE), 0.5))
    assert torch.equal(latents, expected)
    shapes.clear()
    x0, mask = torch.zeros(2, *SHAPE), torch.ones(2, 1, 8, 8)
    before = torch.get_rng_state()
    run(sampler_class, GaussianModel(), x0=x0, mask=mask, noise_source=source)
    assert len(shapes) == (21 if sampler_class.redraws_mask_noise else 2)
    assert set(shapes) == {(2, *SHAPE)}
    assert torch.equal(before, torch.get_rng_state())


@every_sampler
def test_mask_keeps_what_it_marks(sampler_class):
    model = GaussianModel()
    torch.manual_seed(0)
    x0 = model.mean + model.std * torch.randn(2, *SHAPE)
    x_T = torch.randn(2, *SHAPE)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    latents, _ = run(sampler_class, model, 50, x_T=x_T, x0=x0, mask=mask)
    free, _ = run(sampler_class, model, 50, x_T=x_T)
    assert (latents - x0)[..., :4].abs().max() < 1.0
    assert (latents - x0)[..., :4].std() < 0.3 * model.std
    if sampler_class in DETERMINISTIC:  # else the mask's noise shifts the stream of the steps'
        assert torch.equal(latents[..., 4:], free[..., 4:])
    with pytest.raises(ValueError, match="a mask needs x0"):
        run(sampler_class, model, mask=mask)


@every_sampler
def test_full_strength_starts_from_noise_alone(sampler_class):
    model = GaussianModel()
    sampler = sampler_class(model)
    sampler.make_schedule(10)
    noise = torch.randn(2, *SHAPE)
    z = sampler.stochastic_encode(torch.ones(2, *SHAPE), torch.tensor([10, 10]), noise=noise)
    assert torch.equal(z, noise)
    torch.manual_seed(0)
    latents = sampler.decode(z, None, 10, verbose=False)
    torch.manual_seed(0)
    assert torch.equal(latents, run(sampler_class, model, 10, x_T=noise)[0])


@every_sampler
def test_encode_adds_more_noise_for_more_steps(sampler_class):
    sampler = sampler_class(GaussianModel())
    sampler.make_schedule(10)
    x0, noise = torch.ones(11, *SHAPE), torch.zeros(11, *SHAPE)
    signal = sampler.stochastic_encode(x0, torch.arange(11), noise=noise)[:, 0, 0, 0]
    assert (signal.diff() < 0).all()
    one = sampler.stochastic_encode(x0, 4, noise=noise)
    assert (one == signal[4]).all()
    torch.manual_seed(0)
    drawn = sampler.stochastic_encode(torch.zeros(1, *SHAPE), 10)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randn(1, *SHAPE))


@pytest.mark.parametrize(
    "sampler_class", [PLMSSampler, DPMSolverSampler, EulerSampler, DPMpp2MSampler]
)
@pytest.mark.parametrize("t", [1, 5, 9])
def test_decode_begins_where_encode_ended(sampler_class, t):
    model = GaussianModel()
    sampler = sampler_class(model)
    sampler.make_schedule(10, "karras" if sampler_class is DPMpp2MSampler else "uniform")
    torch.manual_seed(0)
    x0 = model.mean + model.std * torch.randn(2, *SHAPE)
    z = sampler.stochastic_encode(x0, t)
    start_level = sampler.steps[t - 1].alpha_bar
    latents = sampler.decode(z, None, t, verbose=False)
    exact = model.flow(z, start_level, end_level(sampler_class, model))
    limit = {DPMSolverSampler: 0.3, EulerSampler: 0.4}.get(sampler_class, 0.15)
    assert (latents - exact).abs().max() < limit
    assert len(model.calls) == t + (sampler_class is PLMSSampler)


@every_sampler
def test_decode_of_no_steps_changes_nothing(sampler_class):
    sampler = sampler_class(GaussianModel())
    sampler.make_schedule(10)
    z = torch.randn(1, *SHAPE)
    assert torch.equal(sampler.decode(z, None, 0, verbose=False), z)


@every_sampler
def test_original_steps(sampler_class):
    model = GaussianModel()
    sampler = sampler_class(model)
    torch.manual_seed(0)
    x0 = model.mean + model.std * torch.randn(2, *SHAPE)
    z = sampler.stochastic_encode(x0, 30, use_original_steps=True)
    latents = sampler.decode(z, None, 30, use_original_steps=True, verbose=False)
    assert len(model.calls) in (30, 31, 59)  # some take two a step
    assert max(model.calls) < 31
    if sampler_class in DETERMINISTIC:
        assert (latents - x0).std() < (z - x0).std() + 0.05
    assert latents.mean() == pytest.approx(model.mean, abs=0.1)


@every_sampler
def test_positions_outside_the_schedule_are_refused(sampler_class):
    sampler = sampler_class(GaussianModel())
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="make_schedule first"):
        sampler.stochastic_encode(x, 1)
    sampler.make_schedule(10)
    for t in (-1, 11):
        with pytest.raises(ValueError, match="the schedule has 10 steps"):
            sampler.stochastic_encode(x, t)
        with pytest.raises(ValueError, match="the schedule has 10 steps"):
            sampler.decode(x, None, t)


@every_sampler
def test_each_run_is_announced_to_the_model(sampler_class):
    model = GaussianModel()
    sampler = sampler_class(model)
    sampler.sample(4, 1, SHAPE, verbose=False)
    assert (model.n_runs, model.is_guided) == (1, False)
    guidance = {
        "unconditional_conditioning": torch.zeros(1),
        "unconditional_guidance_scale": 2.0,
    }
    sampler.decode(torch.zeros(1, *SHAPE), torch.zeros(1), 2, verbose=False, **guidance)
    assert (model.n_runs, model.is_guided) == (2, True)
    guidance["unconditional_guidance_scale"] = 1.0
    sampler.decode(torch.zeros(1, *SHAPE), torch.zeros(1), 2, verbose=False, **guidance)
    assert (model.n_runs, model.is_guided) == (3, False)


@every_sampler
def test_callbacks_and_intermediate_results(sampler_class):
    numbers, pictures = [], []
    x_T = torch.randn(2, *SHAPE)
    latents, kept = run(
        sampler_class,
        GaussianModel(),
        10,
        x_T=x_T,
        callback=numbers.append,
        img_callback=lambda predicted, i: pictures.append((i, predicted)),
        log_every_t=4,
    )
    assert numbers == list(range(10))
    assert [i for i, _ in pictures] == numbers
    # x_T; then the first step, and those with 8, 4 and 0 steps left
    assert [len(kept[name]) for name in ("x_inter", "pred_x0")] == [5, 5]
    assert kept["x_inter"][0] is x_T
    assert torch.equal(kept["x_inter"][-1], latents)
    assert torch.equal(kept["pred_x0"][1], pictures[0][1])


@every_sampler
def test_conditionings_of_every_kind(sampler_class):
    def output(x, t, c):
        if isinstance(c, dict):
            c = c["c_crossattn"][0]
        return 0.1 * x + (c[0] if isinstance(c, list) else c)[:, :, None, None]

    c, u = torch.full((2, 1), 0.02), torch.zeros(2, 1)
    results = [
        run(
            sampler_class,
            ClosedFormModel(output),
            x_T=torch.ones(2, *SHAPE),
            conditioning=pack(c),
            unconditional_conditioning=pack(u),
            unconditional_guidance_scale=3.0,
        )[0]
        for pack in (lambda v: v, lambda v: [v], lambda v: {"c_crossattn": [v], "c_concat": [v]})
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    guided = {"unconditional_conditioning": u[:1], "unconditional_guidance_scale": 3.0}
    with pytest.raises(ValueError, match=r"unconditional conditioning has 1 rows, and .* 2"):
        run(sampler_class, ClosedFormModel(output), conditioning=c, **guided)
    with pytest.raises(ValueError, match="x_T has 1 rows, but the batch size is 2"):
        run(sampler_class, ClosedFormModel(output), conditioning=c, x_T=torch.ones(1, *SHAPE))
    with pytest.raises(ValueError, match="2 rows, but the batch size is 3"):
        run(sampler_class, ClosedFormModel(output), batch_size=3, conditioning=c)


@every_sampler
def test_predictions_can_be_corrected_and_quantized(sampler_class):
    class Corrector:
        def modify_score(self, model, eps, x, t, c, factor):
            return eps * factor

    class FirstStage:
        def quantize(self, latents):
            return latents.round(), None, None

    x_T = torch.randn(2, *SHAPE)
    model = GaussianModel()
    doubled = ClosedFormModel(lambda x, t, c: 2 * model.predict(x, t, c))
    expected, _ = run(sampler_class, doubled, x_T=x_T)
    latents, _ = run(
        sampler_class,
        model,
        x_T=x_T,
        score_corrector=Corrector(),
        corrector_kwargs={"factor": 2},
    )
    assert torch.equal(latents, expected)
    model.first_stage_model = FirstStage()
    _, kept = run(sampler_class, model, x_T=x_T, quantize_x0=True)
    assert torch.equal(kept["pred_x0"][-1], kept["pred_x0"][-1].round())


@every_sampler
def test_progress_bar_is_shown_on_request(sampler_class, capsys):
    sampler_class(GaussianModel()).sample(3, 1, SHAPE, verbose=False)
    assert capsys.readouterr().err == ""
    sampler_class(GaussianModel()).sample(3, 1, SHAPE, verbose=True)
    shown = capsys.readouterr()
    assert sampler_class.name in shown.err
    assert "3/3" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("sampler_class", [c for c in SAMPLERS if c is not DDIMSampler])
def test_eta_is_a_setting_of_ddim_alone(sampler_class):
    with pytest.raises(InputError, match=r"eta is 0\.5, but it must be 0"):
        run(sampler_class, GaussianModel(), eta=0.5)


def test_negative_eta_is_refused():
    with pytest.raises(InputError, match="eta is -1, but it must be at least 0"):
        run(DDIMSampler, GaussianModel(), eta=-1)


@pytest.mark.parametrize("eta", [1.2, math.nan])
def test_an_eta_that_gives_no_numbers_is_refused(eta):
    with pytest.raises(InputError, match=rf"eta {eta}: a step would add more noise than it leaves"):
        DDIMSampler(GaussianModel()).make_schedule(50, ddim_eta=eta)


@every_sampler
@pytest.mark.parametrize("n_steps", [1, 2, 3, 7, 30, 333])
def test_any_number_of_steps_works(sampler_class, n_steps):
    model = golden_model()
    latents, _ = run(sampler_class, model, n_steps, conditioning=torch.zeros(2, 1))
    assert torch.isfinite(latents).all()


@every_sampler
def test_impossible_step_counts_are_refused_in_one_line(sampler_class):
    with pytest.raises(InputError, match="0 sampling steps"):
        run(sampler_class, GaussianModel(), 0)


@every_sampler
@pytest.mark.parametrize("t", [1, 3, 9])
def test_the_noise_that_is_added_is_that_of_the_first_step_taken(sampler_class, t):
    model = ClosedFormModel(lambda x, t, c: x)
    sampler = sampler_class(model)
    sampler.make_schedule(10)
    sampler.encodes_as_upstream = False
    z = sampler.stochastic_encode(torch.zeros(1, *SHAPE), t, noise=torch.ones(1, *SHAPE))
    sampler.decode(z, None, t, verbose=False)
    expected = (1 - model.level(model.calls[0])) ** 0.5
    assert z.unique().item() == pytest.approx(expected, abs=2e-4)
    x0 = torch.randn(1, *SHAPE)
    assert torch.equal(sampler.stochastic_encode(x0, 0), x0)


@every_sampler
def test_a_schedule_that_ends_in_noise_alone(sampler_class):
    class Model(GaussianModel):
        zero_snr = True

    model = Model("v", mean=0.8, std=0.5)
    assert model.alphas_cumprod[-1] == 0
    torch.manual_seed(0)
    # so many, as most of the schedule's last step is noise
    latents, _ = sampler_class(model).sample(100, 8, (4, 16, 16), verbose=False)
    assert latents.isfinite().all()
    assert latents.mean() == pytest.approx(0.8, abs=0.06)
    if sampler_class is not LCMSampler:  # which gives the mean of all pictures at once
        assert latents.std() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_little_noise_is_added_in_half_types_too(dtype):
    sampler = DDIMSampler(GaussianModel())
    sampler.make_schedule(50)
    x0, noise = torch.zeros(3, *SHAPE, dtype=dtype), torch.ones(3, *SHAPE)
    z = sampler.stochastic_encode(x0, torch.tensor([0, 1, 5]), noise=noise)
    assert z.dtype == dtype
    expected = (1 - sampler.model.alphas_cumprod[[1, 21, 101]]).sqrt()
    torch.testing.assert_close(z[:, 0, 0, 0].float(), expected, atol=0, rtol=0.004)


@every_sampler
def test_a_schedule_of_one_scale_is_that_scale(sampler_class):
    model = golden_model()
    cond, negative = torch.ones(2, 4), torch.zeros(2, 4)
    known = {"conditioning": cond, "unconditional_conditioning": negative}
    x_T = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    n = 6
    steps = sampler_class(model)
    steps.make_schedule(n)
    scales = [3.0] * len(steps.steps)
    once, _ = run(sampler_class, model, n, x_T=x_T, unconditional_guidance_scale=3.0, **known)
    each, _ = run(sampler_class, model, n, x_T=x_T, ucg_schedule=scales, **known)
    assert torch.equal(once, each)
    changed, _ = run(sampler_class, model, n, x_T=x_T, ucg_schedule=[9.0, *scales[1:]], **known)
    assert not torch.equal(changed, each)
    with pytest.raises(InputError, match="ucg_schedule has 2 scales"):
        run(sampler_class, model, n, ucg_schedule=[1.0, 2.0], **known)


def test_each_step_has_its_own_scale_and_two_halves():
    class Recorder:
        def modify_score(self, model, eps, x, t, c):
            found.append(eps.mean().item())
            return eps

    found = []
    halves = torch.cat([torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)])
    model = ClosedFormModel(lambda x, t, c: halves)
    cond = torch.ones(1, 3, 8)
    scales = [1.0, 5.0, 0.0, 2.0]
    known = {"conditioning": cond, "unconditional_conditioning": cond}
    run(DDIMSampler, model, 4, 1, ucg_schedule=scales, score_corrector=Recorder(), **known)
    assert found == scales
    assert model.rows == [2] * 4
    assert model.is_guided
