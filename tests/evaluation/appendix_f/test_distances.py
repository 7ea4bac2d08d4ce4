import math

import pytest
import torch

from ldm.evaluation.appendix_f.distances import high_frequency_ratio, psnr, ssim


def test_psnr_is_the_definition():
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    values = psnr(x + 0.02, x)
    assert values.tolist() == pytest.approx([10 * math.log10(4 / 0.02**2)] * 2, rel=1e-3)
    assert psnr(x, x).tolist() == [100.0, 100.0]


def test_ssim_orders_distances():
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    near, far = x + 0.05 * torch.randn_like(x), x + 0.5 * torch.randn_like(x)
    assert ssim(x, x).item() == pytest.approx(1, abs=1e-5)
    assert ssim(x, x) > ssim(near, x) > ssim(far, x)


def test_high_frequencies_are_lost_by_blur_and_added_by_noise():
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    assert high_frequency_ratio(x, x).item() == pytest.approx(1)
    assert high_frequency_ratio(blurred, x) < 0.5
    assert high_frequency_ratio(x + torch.randn_like(x), x) > 1.5
