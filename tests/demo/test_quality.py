"""Measures of the demo's pictures."""

import pytest
import torch

from ldm.demo import quality
from ldm.demo.classifier import load_classifier
from ldm.evaluation.appendix_f.distances import high_frequencies


def test_high_frequencies_are_lost_in_a_blur():
    pictures = quality.renders(2, 64)
    assert pictures.shape == (2, 3, 64, 64)
    blurred = torch.nn.functional.avg_pool2d(pictures, 3, 1, 1)
    assert (high_frequencies(blurred) < 0.5 * high_frequencies(pictures)).all()


def test_the_distance_of_renders_to_renders_is_small():
    classifier = load_classifier()
    a, b = quality.renders(80, 128).chunk(2)
    assert quality.frechet(classifier, a, a) == pytest.approx(0, abs=1e-3)
    near, far = (quality.frechet(classifier, x, a) for x in (b, -b))
    assert 0 < near < far


def test_pictures_that_differ_are_told_apart():
    a, b = torch.rand(30, 3, 64, 64), torch.rand(30, 3, 64, 64) * 0.5
    random = torch.get_rng_state()
    assert quality.told_apart(a, b, 40) > 0.8
    assert torch.equal(torch.get_rng_state(), random)
