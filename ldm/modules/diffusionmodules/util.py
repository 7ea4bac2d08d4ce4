"""Small parts that the U-Net and the transformer share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of the diffusion step: ``[cos(t f_i), sin(t f_i)]``, cosines first.

    The frequencies are ``f_i = max_period ** (-i / (dim / 2))`` for ``i`` in ``0 .. dim/2 - 1``.

    Args:
        timesteps: diffusion steps t, (B,); fractions are allowed.
        dim: length of the embedding; even.
        max_period: the longest wavelength is ``2 pi max_period`` steps.

    Returns:
        The embedding, (B, dim), float32.

    Source: Ho et al. 2020 (arXiv 2006.11239), appendix B, after Vaswani et al. 2017.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * index / half)
    phase = timesteps[:, None].float() * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation that is summed up in float32 whatever the types of input and weights.

    The sum of squares of a half-precision activation overflows or loses digits. PyTorch's kernels
    for half types take their sums in float32 themselves, so there nothing is copied; on processors
    bfloat16 is copied all the same, for the pictures that it has always made.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (B, C, ...), over groups of channels."""
        is_native = x.dtype == torch.float16 or x.device.type != "cpu"
        if is_native and x.dtype == self.weight.dtype:
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """The normalisation of the residual blocks: 32 groups, eps 1e-5."""
    return GroupNorm32(32, channels)


def zero_module(module: ModuleT) -> ModuleT:
    """Set every parameter of a module to zero, in place, and return the module."""
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def checkpoint(function: Callable[..., Any], *inputs: Any, enabled: bool) -> Any:
    """Call ``function(*inputs)``; if enabled, recompute it in the backward pass.

    This trades time for the memory of the activations. Where no gradient is recorded it is a plain
    call. The random state is restored for the recomputation, so dropout agrees with the first pass.
    """
    if enabled and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
