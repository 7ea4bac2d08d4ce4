"""The Fréchet distance between sets of pictures, from features that were computed before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.evaluation.metrics import Estimate


class _AsTheyAre(nn.Module):
    """Takes features where pictures are expected."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.num_features = n_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance:
    """Fréchet distance (Heusel et al. 2017) to a reference, as torchmetrics computes it.

    Args:
        reference: features of the reference pictures, (n, k).
    """

    def __init__(self, reference: Tensor) -> None:
        self._metric = FrechetInceptionDistance(
            feature=_AsTheyAre(reference.shape[1]), reset_real_features=False, sync_on_compute=False
        )
        self._metric.update(reference.double(), real=True)

    def __call__(self, features: Tensor) -> float:
        """The distance of pictures with features (n, k); n is at least 2."""
        self._metric.reset()
        self._metric.update(features.double(), real=False)
        return self._metric.compute().item()

    def estimate(self, groups: Tensor, n_resamples: int = 200, seed: int = 0) -> Estimate:
        """The distance and the bounds of its 95 % bootstrap interval.

        A resample has fewer different pictures, which raises its distance; the interval is moved
        by as much as that is on average.

        Args:
            groups: features (n_groups, n, k); whole groups are resampled.
            n_resamples: how often.
            seed: of the resampling.
        """
        value = self(groups.flatten(0, 1))
        generator = torch.Generator().manual_seed(seed)
        n = len(groups)
        draws = torch.randint(n, (n_resamples, n), generator=generator)
        found = torch.tensor([self(groups[draw].flatten(0, 1)) for draw in draws]).double()
        bounds = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64))
        low, high = (bounds - found.mean() + value).tolist()
        return Estimate(value, low, high)
