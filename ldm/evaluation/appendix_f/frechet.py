"""The Fréchet distance between sets of pictures, from features that were computed before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.evaluation.appendix_f.metrics import Estimate

# An eigenvalue problem for each resample: long features can afford few of them.
N_RESAMPLES = {64: 200, 2048: 10}


@dataclass(frozen=True)
class Statistics:
    """What a Fréchet distance knows of a set of pictures.

    Attributes:
        mean: of the features, (k,) float64.
        covariance: likewise, (k, k).
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of features (n, k)."""
        features = features.double()
        return cls(features.mean(dim=0), features.T.cov())

    def save(self, path: Path) -> None:
        """Write them in the form of pytorch-fid (.npz), whole or not at all."""
        part = path.with_name(f".{path.name}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, mu=self.mean.numpy(), sigma=self.covariance.numpy())
        part.replace(path)


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
        reference: of the reference pictures.
    """

    def __init__(self, reference: Statistics) -> None:
        mean, covariance = reference.mean, reference.covariance
        self.width = len(mean)
        self._metric = FrechetInceptionDistance(
            feature=_AsTheyAre(self.width), reset_real_features=False, sync_on_compute=False
        )
        n = 2  # sums of so many pictures that have this mean and this covariance
        self._metric.real_features_sum = mean * n
        self._metric.real_features_cov_sum = covariance * (n - 1) + n * torch.outer(mean, mean)
        self._metric.real_features_num_samples = torch.tensor(n)

    def __call__(self, features: Tensor) -> float:
        """The distance of pictures with features (n, k); n is at least 2."""
        self._metric.reset()
        self._metric.update(features.double(), real=False)
        return self._metric.compute().item()

    def estimate(self, groups: Tensor, seed: int = 0) -> Estimate:
        """The distance and the bounds of its 95 % bootstrap interval.

        A resample has fewer different pictures, which raises its distance; the interval is moved
        by as much as that is on average.

        Args:
            groups: features (n_groups, n, k); whole groups are resampled.
            seed: of the resampling.
        """
        value = self(groups.flatten(0, 1))
        generator = torch.Generator().manual_seed(seed)
        n_resamples = next((n for k, n in N_RESAMPLES.items() if self.width <= k), 10)
        draws = torch.randint(len(groups), (n_resamples, len(groups)), generator=generator)
        found = torch.tensor([self(groups[draw].flatten(0, 1)) for draw in draws]).double()
        bounds = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64))
        low, high = (bounds - found.mean() + value).tolist()
        return Estimate(value, low, high)
