import math

import numpy as np
import pytest
import torch

from ldm.evaluation.appendix_f import statistics
from ldm.evaluation.appendix_f.statistics import FrechetDistance, Statistics, bootstrap


def sqrtm_form(features, reference):
    """The distance as it is usually computed: by a square root of a k x k matrix."""
    linalg = pytest.importorskip("scipy.linalg")
    own = Statistics.of(features)
    root = linalg.sqrtm((own.covariance @ reference.covariance).numpy()).real
    shift = (own.mean - reference.mean).square().sum().item()
    both = own.covariance.trace() + reference.covariance.trace()
    return shift + both.item() - 2 * np.trace(root)


def eigenvalue_form(features, reference):
    own = Statistics.of(features)
    values = np.linalg.eigvals((own.covariance @ reference.covariance).numpy())
    shift = (own.mean - reference.mean).square().sum()
    both = own.covariance.trace() + reference.covariance.trace()
    return (shift + both).item() - 2 * np.sqrt(values.astype(complex)).real.sum()


@pytest.mark.parametrize("form", [sqrtm_form, eigenvalue_form])
@pytest.mark.parametrize("n", [12, 60])  # fewer pictures than features, and more
def test_the_distance_is_that_of_other_forms(form, n):
    mixed = torch.randn(20, 20).double()
    features, others = torch.randn(n, 20).double() @ mixed, torch.randn(400, 20).double() @ mixed
    reference = Statistics.of(others + 0.3)
    # a square root of a matrix without full rank is good to half of the digits
    assert FrechetDistance(reference)(features) == pytest.approx(
        form(features, reference), rel=1e-5
    )


def test_a_set_is_not_away_from_itself_and_a_wider_one_by_its_width():
    x = torch.randn(4000, 3).double() * torch.tensor([1.0, 2.0, 3.0])
    own = Statistics.of(x)
    assert FrechetDistance(own)(x) == pytest.approx(0, abs=1e-6)
    wider = FrechetDistance(own)((x - own.mean) * 2 + own.mean)
    assert wider == pytest.approx(own.covariance.trace().item(), rel=1e-3)  # (2s - s)^2


def test_a_resample_is_the_set_with_its_repetitions(monkeypatch):
    groups = torch.randn(5, 2, 3).double()
    reference = Statistics(torch.zeros(3).double(), torch.eye(3).double())
    monkeypatch.setattr(statistics, "N_RESAMPLES_FRECHET", 1)
    # a single resample is moved onto the value itself, so it is compared before that
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(5, (5,), generator=generator)
    plain = FrechetDistance(reference)(groups[draw].flatten(0, 1))
    counts = torch.bincount(draw, minlength=5).double().repeat_interleave(2)
    weighted = FrechetDistance(reference)._of_sums(groups.flatten(0, 1))(counts)
    assert weighted == pytest.approx(plain, rel=1e-9)
    assert len(draw.unique()) < 5


@pytest.mark.parametrize("n", [6, 40])
def test_an_interval_of_95_percent_covers_the_mean_as_often(n):
    generator = torch.Generator().manual_seed(0)
    n_trials, hits = 400, 0
    for _ in range(n_trials):
        estimate = bootstrap(torch.randn(n, generator=generator), n_resamples=600)
        hits += estimate.low <= 0 <= estimate.high
    assert 0.92 <= hits / n_trials <= 0.98


def test_an_interval_of_a_frechet_distance_covers_its_mean_as_often(monkeypatch):
    monkeypatch.setattr(statistics, "N_RESAMPLES_FRECHET", 100)
    generator = torch.Generator().manual_seed(0)
    reference = Statistics(torch.full((3,), 0.5).double(), torch.eye(3).double())
    distance = FrechetDistance(reference)

    def sample():
        return torch.randn(40, 1, 3, generator=generator).double()

    expected = sum(distance(sample().flatten(0, 1)) for _ in range(600)) / 600
    n_trials = 80
    estimates = [distance.estimate(sample()) for _ in range(n_trials)]
    hits = sum(one.low <= expected <= one.high for one in estimates)
    assert 0.89 <= hits / n_trials <= 0.99
    assert all(one.low <= one.mean <= one.high for one in estimates)


def test_intervals_of_nothing_of_one_and_of_equal_values():
    constant = bootstrap(torch.ones(5))
    assert (constant.low, constant.high) == (1, 1)
    assert bootstrap(torch.ones(1)).mean == 1
    assert math.isnan(bootstrap(torch.empty(0)).mean)
