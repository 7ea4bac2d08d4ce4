"""The embedding of the diffusion step, normalisation and gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules.util import (
    GroupNorm32,
    checkpoint,
    normalization,
    timestep_embedding,
    zero_module,
)


def test_timestep_embedding_equals_upstreams() -> None:
    embedding = timestep_embedding(torch.tensor([981]), 320)
    assert embedding.shape == (1, 320)
    expected = torch.tensor([0.679957, -0.798429, 0.733252])
    torch.testing.assert_close(embedding[0, [0, 1, 160]], expected, rtol=0, atol=1e-6)


def test_timestep_embedding_is_cosines_then_sines() -> None:
    assert timestep_embedding(torch.tensor([0]), 6).tolist() == [[1, 1, 1, 0, 0, 0]]


def test_timestep_embedding_takes_fractions() -> None:
    whole, fraction = timestep_embedding(torch.tensor([949.0, 949.05]), 32)
    assert 1e-3 < (whole - fraction).abs().max() < 0.06
    assert fraction.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None])
def test_group_norm_survives_half_precision(
    dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> None:
    # The mean square of these values, 4e6, is beyond float16.
    x = (2000 * torch.randn(2, 64, 4, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    norm = normalization(64).to(weight_dtype or dtype)
    assert isinstance(norm, GroupNorm32)
    assert (norm.num_groups, norm.eps) == (32, 1e-5)
    y = norm(x)
    assert y.dtype == dtype
    expected = nn.functional.group_norm(x.double(), 32)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-3)


def test_group_norm_is_the_plain_one_in_float32() -> None:
    x = torch.randn(2, 64, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normalization(64)(x), nn.GroupNorm(32, 64)(x))


def test_zero_module() -> None:
    module = zero_module(nn.Conv2d(3, 4, 3))
    assert not any(parameter.any() for parameter in module.parameters())


def test_checkpoint_recomputes_and_gives_the_same_gradient() -> None:
    calls = []
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def function(x: torch.Tensor, absent: None) -> torch.Tensor:
        calls.append(absent)
        return torch.tanh(x @ weight)

    gradients = []
    for enabled in (False, True):
        calls.clear()
        weight.grad = None
        checkpoint(function, torch.ones(2, 3), None, enabled=enabled).sum().backward()
        gradients.append(weight.grad)
        assert len(calls) == 1 + enabled
    assert torch.equal(*gradients)


def test_checkpoint_is_a_plain_call_without_gradients() -> None:
    with torch.no_grad():
        assert checkpoint(lambda x: x, "as it is", enabled=True) == "as it is"
