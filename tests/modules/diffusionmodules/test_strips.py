"""Large maps in strips: the result of the whole map, with less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules import strips
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.strips import in_strips
from tests.golden_util import fill_parameters

CONFIG = {
    "ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "resolution": 32, "in_channels": 3,
    "out_ch": 3, "z_channels": 4, "attn_resolutions": [16],
}  # fmt: skip


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let strips begin at small maps; the result lists the rows that layers were called with."""
    rows: list[int] = []
    convolve = nn.Conv2d.forward

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        rows.append(x.shape[2])
        return convolve(self, x)

    monkeypatch.setattr(strips, "LARGE", 100)
    monkeypatch.setattr(strips, "STRIP", 1000)
    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    return rows


def inputs(part: type[nn.Module]) -> Tensor:
    """A map of an uneven size whose statistics change from top to bottom."""
    x = torch.randn(2, 3, 36, 24) if part is Encoder else torch.randn(2, 4, 9, 6)
    return x + torch.linspace(-3, 3, x.shape[2])[:, None]


@pytest.mark.parametrize("part", [Encoder, Decoder])
@torch.no_grad()
def test_encoder_and_decoder_give_what_they_give_of_the_whole(
    part: type[nn.Module], small_strips: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = fill_parameters(part(**CONFIG), 0).eval(), inputs(part)
    found = module(x)
    assert min(small_strips) <= 6
    small_strips.clear()
    monkeypatch.setattr(strips, "LARGE", 10**9)
    expected = module(x)
    assert max(small_strips) >= 36
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_statistics_of_a_strip_alone_would_show(small_strips: list[int]) -> None:
    """The comparison above notices seams."""
    norm, x = nn.GroupNorm(4, 8), torch.randn(1, 8, 64, 6) + torch.linspace(-3, 3, 64)[:, None]
    whole = norm(x)
    torch.testing.assert_close(in_strips(lambda x: x, x, norm=norm), whole, atol=1e-5, rtol=1e-4)
    assert (in_strips(norm, x) - whole).abs().max() > 0.5


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@torch.no_grad()
def test_statistics_are_exact_far_from_zero(mean: float, small_strips: list[int]) -> None:
    norm = nn.GroupNorm(2, 4, eps=1e-6, affine=False)
    x = mean + torch.randn(1, 4, 200, 30)
    exact = F.group_norm(x.double(), 2, eps=1e-6).float()
    torch.testing.assert_close(
        in_strips(lambda x: x, x, norm=norm), exact, atol=1e-4 + 1e-6 * mean, rtol=0
    )


@torch.no_grad()
def test_half_precision_is_as_exact_as_of_the_whole(small_strips: list[int]) -> None:
    norm = fill_parameters(nn.GroupNorm(4, 8), 0)
    x = torch.randn(1, 8, 64, 6).bfloat16()
    exact = norm(x.float())
    found = in_strips(lambda x: x, x, norm=norm.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 1.5 * (norm(x) - exact).abs().max()


@pytest.mark.parametrize("scale", [1, 2, 0.5])
@torch.no_grad()
def test_a_second_map_comes_along(scale: float, small_strips: list[int]) -> None:
    x, y = torch.randn(2, 2, 3, 30, 8)

    def layer(x: Tensor, y: Tensor) -> Tensor:
        return F.interpolate(x - y, scale_factor=scale, mode="nearest")

    assert torch.equal(in_strips(layer, x, y, scale=scale), layer(x, y))


def test_with_gradients_a_map_stays_whole(small_strips: list[int]) -> None:
    seen: list[int] = []
    x = torch.randn(1, 4, 64, 8, requires_grad=True)
    in_strips(lambda x: seen.append(x.shape[2]) or x, x).sum().backward()
    assert seen == [64]
    assert (x.grad == 1).all()
