"""How far a picture is from another one of the same noise."""

from __future__ import annotations

import torch
from kornia.metrics import ssim as ssim_map
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, from fine to coarse
_WINDOW = 11  # pixels; of SSIM


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture (B, C, H, W) in [-1, 1], in dB, (B,).

    Identical ones have 100.
    """
    mse = (pictures.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / mse.clamp(min=4e-10))).float()  # the range is 2


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each picture, (B,); pictures (B, 3, H, W) in [-1, 1].

    Source: Wang et al. 2004, with their 11 x 11 window.
    """
    a, b = (((p.float() + 1) / 2).clamp(0, 1) for p in (pictures, reference))
    return ssim_map(a, b, window_size=_WINDOW).mean(dim=(1, 2, 3))


def ms_ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Multi-scale structural similarity of each picture, (B,); pictures (B, 3, H, W) in [-1, 1].

    Pictures that are too small for all five scales (below 176 pixels) are compared at the finer
    ones, whose weights are then scaled to a sum of 1.

    Source: Wang et al. 2003.
    """
    side = min(pictures.shape[-2:])
    n = max(n for n in range(1, 6) if n == 1 or side // (n - 1) ** 2 >= _WINDOW)
    weights = tuple(weight / sum(MS_SSIM_WEIGHTS[:n]) for weight in MS_SSIM_WEIGHTS[:n])
    a, b = (((p.float() + 1) / 2).clamp(0, 1) for p in (pictures, reference))
    result = multiscale_structural_similarity_index_measure(
        a, b, data_range=1.0, betas=weights, reduction="none"
    )
    assert isinstance(result, Tensor)
    return result.reshape(len(pictures))


def high_frequencies(pictures: Tensor) -> Tensor:
    """Energy above half the Nyquist frequency of each picture's grey values, (B,)."""
    spectrum = torch.fft.fft2(pictures.float().mean(dim=1)).abs().square()
    fy = torch.fft.fftfreq(pictures.shape[2], device=pictures.device).abs()[:, None]
    fx = torch.fft.fftfreq(pictures.shape[3], device=pictures.device).abs()
    return (spectrum * (torch.maximum(fy, fx) > 0.25)).sum(dim=(1, 2))


def high_frequency_ratio(pictures: Tensor, reference: Tensor) -> Tensor:
    """`high_frequencies`, relative to the reference's, (B,).

    Below 1 fine texture was lost, above 1 something was added.
    """
    return high_frequencies(pictures) / high_frequencies(reference).clamp(min=1e-12)


DISTANCES = {
    "psnr_db": psnr,
    "ssim": ssim,
    "ms_ssim": ms_ssim,
    "high_frequency_ratio": high_frequency_ratio,
}


def distances(picture: Tensor, reference: Tensor) -> dict[str, float]:
    """All of them, for one picture (1, 3, H, W) in [-1, 1], so that its company cannot matter."""
    return {name: measure(picture, reference).item() for name, measure in DISTANCES.items()}
