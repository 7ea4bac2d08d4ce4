"""Large feature maps worked on in strips of rows, with the result that the whole map would give.

Normalisation takes its statistics from the whole map, and a strip comes with the neighbouring rows
that its convolution looks at, so there are no seams to hide. What is saved is the memory between
the input of a layer and its output; as many maps of the size of a picture would not fit beside
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

LARGE = 2**26  # elements; the largest map of Stable Diffusion's decoder at 512 x 512 pixels
STRIP = 2**24  # elements of a strip, about
HALO = 2  # rows that a strip has besides its own, on each side; even, as a layer may halve them


def in_strips(
    layer: Callable[..., Tensor],
    x: Tensor,
    other: Tensor | None = None,
    norm: nn.GroupNorm | None = None,
    scale: float = 1,
) -> Tensor:
    """Apply a layer to a map: in strips where the map is large and there are no gradients.

    Args:
        layer: called with x, normalised, and the other map, if there is one; a row of its result
            depends on the rows within ``HALO`` of it.
        x: (B, C, h, w).
        other: a map of the same size.
        norm: applied to x.
        scale: size of the result relative to x: 1, 2 or 0.5.

    Returns: (B, C', h * scale, w * scale).
    """
    h = x.shape[2]
    n_elements = max(int(x.numel() * max(1, scale) ** 2), 0 if other is None else other.numel())
    if n_elements <= LARGE or torch.is_grad_enabled():
        # no variable and no tuple holds the normalised map while the layer runs: it can be freed
        if other is None:
            return layer(x if norm is None else norm(x))
        return layer(x if norm is None else norm(x), other)
    rows = max(HALO, h * STRIP // n_elements // HALO * HALO)
    normalized = (lambda strip: strip) if norm is None else _whole_norm(norm, x, rows)
    out: Tensor | None = None
    for start in range(0, h, rows):
        end = min(h, start + rows)
        first, last = max(0, start - HALO), min(h, end + HALO)
        beside = [] if other is None else [other[:, :, first:last]]
        part = layer(normalized(x[:, :, first:last]), *beside)
        if out is None:
            out = _like(part, int(h * scale))
        own, offset = slice(int(start * scale), int(end * scale)), int((start - first) * scale)
        out[:, :, own] = part[:, :, offset : offset + own.stop - own.start]
    assert out is not None
    return out


def _like(part: Tensor, h: int) -> Tensor:
    """An empty map of h rows, otherwise as a strip of it is, its layout in memory too."""
    is_last = part.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (*part.shape[:2], h, part.shape[3]),
        dtype=part.dtype,
        device=part.device,
        memory_format=torch.channels_last if is_last else torch.contiguous_format,
    )


def _whole_norm(norm: nn.GroupNorm, x: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """A group norm for strips of a map, (B, C, h, w), with the statistics of all of it.

    Mean and variance of the strips are joined after Chan et al. 1979, in float32.
    """
    n_groups, n_channels = norm.num_groups, x.shape[1]
    means, variances, sizes = [], [], []
    for strip in x.split(rows, dim=2):
        values = strip.float().unflatten(1, (n_groups, -1)).flatten(2)  # B, groups, elements
        mean = values.mean(2, keepdim=True)
        distance = torch.linalg.vector_norm(values - mean, dim=2, keepdim=True)
        means.append(mean)
        variances.append(distance**2 / values.shape[2])
        sizes.append(values.shape[2])
    weights = torch.tensor(sizes, device=x.device) / sum(sizes)
    mean = (torch.stack(means, -1) * weights).sum(-1, keepdim=True)
    between = (torch.stack(means, -1) - mean) ** 2
    variance = ((torch.stack(variances, -1) + between) * weights).sum(-1)
    factor = (variance + norm.eps).rsqrt().expand(-1, -1, n_channels // n_groups).flatten(1)
    shift = -mean.squeeze(-1).expand(-1, -1, n_channels // n_groups).flatten(1) * factor
    if norm.affine:
        factor = factor * norm.weight.float()
        shift = shift * norm.weight.float() + norm.bias.float()
    factor, shift = factor[:, :, None, None], shift[:, :, None, None]  # B, C, 1, 1
    return lambda strip: torch.addcmul(shift, strip.float(), factor).to(x.dtype)
