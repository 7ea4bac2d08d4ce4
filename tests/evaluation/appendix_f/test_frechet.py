import pytest
import torch

from ldm.evaluation.appendix_f.features import reference_from
from ldm.evaluation.appendix_f.frechet import FrechetDistance, Statistics


class _Wide:
    name, width = "test", 3

    def __call__(self, picture):
        raise AssertionError("statistics are read, not computed")


def test_the_distance_of_gaussians_is_the_closed_form(tmp_path):
    scale = torch.tensor([1.0, 2.0, 3.0])
    x = torch.randn(4000, 3).double() * scale
    reference = Statistics(torch.tensor([1.0, 0.0, 0.0]).double(), torch.diag(scale**2).double())
    reference.save(tmp_path / "there.npz")
    distance = FrechetDistance(reference_from(tmp_path / "there.npz", _Wide()))
    own = Statistics.of(x)
    shift = (own.mean - reference.mean).square().sum().item()
    assert distance(x) == pytest.approx(shift, abs=0.02)  # the covariances are nearly the same
    assert FrechetDistance(own)(x) == pytest.approx(0, abs=1e-6)
    wider = FrechetDistance(own)((x - own.mean) * 2 + own.mean)
    assert wider == pytest.approx(own.covariance.trace().item(), rel=1e-3)  # (2s - s)^2


def test_the_interval_contains_the_distance():
    x = torch.randn(40, 2, 4).double()
    reference = Statistics(torch.full((4,), 0.5).double(), torch.eye(4).double())
    estimate = FrechetDistance(reference).estimate(x)
    assert estimate.low < estimate.mean < estimate.high
    assert FrechetDistance(reference).estimate(x) == estimate
