import pytest
import torch
from closed_form import ClosedFormModel, GaussianModel

from ldm.models.diffusion.guidance import (
    check_batch_size,
    concat_conditioning,
    eps_from_output,
    noise_predictor,
    sampling_run,
)


def context_model():
    """A model whose output is its context."""
    return ClosedFormModel(lambda x, t, c: c.expand_as(x))


def test_guidance_is_one_batch_with_the_unconditional_half_first():
    seen = []

    def output(x, t, c):
        seen.append((x.shape[0], t.tolist(), c.flatten().tolist()))
        return c.expand_as(x)

    denoise = noise_predictor(
        ClosedFormModel(output), torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 1.0), 7.5
    )
    eps = denoise(torch.zeros(2, 4, 2, 2), 41, 0.5)
    assert seen == [(4, [41] * 4, [1.0, 1.0, 3.0, 3.0])]
    assert (eps == 1 + 7.5 * (3 - 1)).all()


@pytest.mark.parametrize(("unconditional", "scale"), [(None, 7.5), (torch.zeros(2, 1, 1, 1), 1.0)])
def test_without_guidance_there_is_one_pass(unconditional, scale):
    model = context_model()
    c = torch.full((2, 1, 1, 1), 3.0)
    eps = noise_predictor(model, c, unconditional, scale)(torch.zeros(2, 4, 2, 2), 5, 0.5)
    assert model.rows == [2]
    assert (eps == 3).all()


def test_guidance_below_one_and_zero_are_guidance():
    model = context_model()
    denoise = noise_predictor(model, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0.0)
    assert (denoise(torch.zeros(1, 4, 2, 2), 5, 0.5) == 0).all()
    assert model.rows == [2]


def test_half_precision_output_is_combined_in_the_latents_precision():
    model = ClosedFormModel(lambda x, t, c: c.expand_as(x).half())
    c, u = torch.full((1, 1, 1, 1), 1.001), torch.ones(1, 1, 1, 1)
    eps = noise_predictor(model, c, u, 7.5)(torch.zeros(1, 4, 2, 2), 5, 0.5)
    assert eps.dtype == torch.float32
    expected = 1 + 7.5 * (c.half().float() - 1)
    torch.testing.assert_close(eps, expected.expand_as(eps))


def test_conditionings_are_joined_entry_by_entry():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(concat_conditioning(a, b), torch.cat([a, b]))
    joined = concat_conditioning({"c_concat": [a, a], "c_adm": a}, {"c_concat": [b, b], "c_adm": b})
    assert joined.keys() == {"c_concat", "c_adm"}
    for entry in [*joined["c_concat"], joined["c_adm"]]:
        assert torch.equal(entry, torch.cat([a, b]))
    with pytest.raises(ValueError, match="differ in keys"):
        concat_conditioning({"c_concat": [a]}, {"c_crossattn": [b]})
    with pytest.raises(ValueError, match="argument 2 is longer"):
        concat_conditioning([a], [b, b])


def test_rows_must_match_the_batch():
    c = torch.zeros(3, 2)
    for conditioning in (None, c, [c, c], {"c_concat": [c], "c_adm": c}):
        check_batch_size(conditioning, 3)
    for conditioning in (c, [c], {"c_concat": [c]}):
        with pytest.raises(ValueError, match="3 rows, but the batch size is 2"):
            check_batch_size(conditioning, 2)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_noise_follows_from_every_parameterization(parameterization):
    x = torch.randn(2, 4, 2, 2)
    reference = GaussianModel("eps").predict(x, torch.tensor([300]), None)
    model = GaussianModel(parameterization)
    output = model.predict(x, torch.tensor([300]), None)
    eps = eps_from_output(output, x, model.level(300), parameterization)
    torch.testing.assert_close(eps, reference)


def test_unknown_parameterization_is_refused():
    with pytest.raises(ValueError, match="'w'"):
        eps_from_output(torch.zeros(1), torch.zeros(1), 0.5, "w")


def test_a_model_hears_of_the_begin_and_the_end_of_a_run_if_it_wants_to():
    model, ended = context_model(), []
    with sampling_run(model, True):  # a model without end_run
        assert model.n_runs == 1
        assert model.is_guided
    model.end_run = lambda: ended.append(1)
    with sampling_run(model, False):
        assert not ended
        assert not model.is_guided
    assert (model.n_runs, ended) == (2, [1])
    with pytest.raises(KeyError), sampling_run(model, False):
        raise KeyError
    assert ended == [1, 1]
    with sampling_run(object(), False):
        pass
