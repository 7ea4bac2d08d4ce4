import pytest
import torch
from closed_form import sample_golden, sample_table_row
from golden_util import load_golden

from ldm.models.diffusion.plms import ADAMS_BASHFORTH, PLMSSampler


@pytest.mark.parametrize("n_steps", [10, 50])
def test_latents_equal_upstreams(n_steps):
    golden, _ = load_golden("samplers")
    latents = sample_golden(PLMSSampler, golden, n_steps)
    torch.testing.assert_close(latents, golden[f"plms_{n_steps}"], atol=3e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("n_steps", "first", "row", "total", "next_number"),
    [
        (10, [901, 801, 801], [-4.444287, -3.96138, -3.478474], -13.15987, -0.646152),
        (50, [981, 961, 961], [-6.076242, -5.412956, -4.749675], -17.62602, -1.449731),
    ],
)
def test_upstreams_table(n_steps, first, row, total, next_number):
    model, latents, drawn = sample_table_row(PLMSSampler, n_steps)
    assert len(model.calls) == n_steps + 1
    assert model.calls[:3] == first
    assert model.calls[-1] == 1
    assert latents[0, 0, 0, :3].tolist() == pytest.approx(row, abs=1e-5)
    assert latents.sum().item() == pytest.approx(total, abs=1e-4)
    assert drawn == pytest.approx(next_number, abs=1e-6)


@pytest.mark.parametrize("order", ADAMS_BASHFORTH)
def test_weights_extrapolate_polynomials(order):
    # from values at 0, -1, -2, ... the mean over [0, 1], exactly up to degree order - 1
    weights = torch.tensor(ADAMS_BASHFORTH[order], dtype=torch.float64)
    points = -torch.arange(order, dtype=torch.float64)
    for degree in range(order):
        assert (weights * points**degree).sum() == pytest.approx(1 / (degree + 1))
