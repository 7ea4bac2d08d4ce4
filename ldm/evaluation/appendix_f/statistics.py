"""How sure an average is, and how far a set of pictures is from another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ldm.util import written_whole

N_RESAMPLES = 2000
N_RESAMPLES_FRECHET = 200  # each is an eigenvalue problem
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean with the bounds of its 95 % bootstrap confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Tensor, n_resamples: int = N_RESAMPLES) -> Estimate:
    """Mean of values (n,) and its confidence interval, by resampling them.

    Source: Efron 1979; percentiles expanded for small n, Hesterberg 2015 (arXiv 1411.5279) 4.4.
    """
    values = values.flatten().double()
    if len(values) == 0:
        return Estimate(math.nan, math.nan, math.nan)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(values), (n_resamples, len(values)), generator=generator)
    low, high = _bounds(values[draws].mean(dim=1), len(values))
    return Estimate(values.mean().item(), low, high)


def _bounds(resampled: Tensor, n: int) -> tuple[float, float]:
    """The bounds of an interval, from the results of resampling n values."""
    tail = NormalDist().cdf(-_expansion(n) * _Z)
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(resampled.double(), levels).tolist()
    return low, high


def _expansion(n: int) -> float:
    """By how much an interval of n resampled values is too narrow.

    Their variance is (n - 1) / n of the sample's, and its estimate calls for Student's t with
    n - 1 degrees of freedom (by Cornish and Fisher's expansion) rather than a normal distribution.
    """
    if n < 2:
        return 1.0
    f, z = n - 1, _Z
    t = z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
    return t / z * math.sqrt(n / f)


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
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            np.savez(file, mu=self.mean.numpy(), sigma=self.covariance.numpy())


@dataclass(frozen=True)
class FrechetDistance:
    """Fréchet distance of features to a reference.

    |m - m'|^2 + tr(S + S' - 2 (S S')^1/2), where the last trace is that of the square root of a
    symmetric matrix: of X S' X^T for n centred features X with S = X^T X, which is n x n, or of
    S'^1/2 S S'^1/2, which is k x k; whichever is smaller.

    Attributes:
        reference: of the reference pictures.

    Source: Heusel et al. 2017 (arXiv 1706.08500).
    """

    reference: Statistics

    def __call__(self, features: Tensor) -> float:
        """The distance of pictures with features (n, k); n is at least 2."""
        return self._of_sums(features.double())(torch.ones(len(features), dtype=torch.float64))

    def estimate(self, groups: Tensor) -> Estimate:
        """The distance and the bounds of its 95 % bootstrap interval.

        A resample has fewer different pictures, which raises its distance; the interval is moved
        by as much as that is on average.

        Args:
            groups: features (n_groups, n, k); whole groups are resampled.
        """
        n_groups, n = groups.shape[:2]
        distance = self._of_sums(groups.flatten(0, 1).double())
        value = distance(torch.ones(n_groups * n, dtype=torch.float64))
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(N_RESAMPLES_FRECHET):
            draw = torch.randint(n_groups, (n_groups,), generator=generator)
            counts = torch.bincount(draw, minlength=n_groups).double()
            found.append(distance(counts.repeat_interleave(n)))
        resampled = torch.tensor(found, dtype=torch.float64)
        low, high = _bounds(resampled - resampled.mean() + value, n_groups)
        return Estimate(value, low, high)

    def _of_sums(self, features: Tensor) -> Callable[[Tensor], float]:
        """The distance of features (n, k) as a function of how often each counts, (n,)."""
        mean, covariance = self.reference.mean, self.reference.covariance
        variances, axes = torch.linalg.eigh(covariance)
        root = (axes * variances.clamp(min=0).sqrt()) @ axes.T
        rotated = features @ root  # X S'^1/2: both forms are products of it

        def distance(counts: Tensor) -> float:
            used = counts > 0
            counts, n = counts[used], counts.sum()
            weights = (counts / (n - 1)).sqrt()[:, None]
            own_mean = counts @ features[used] / n
            trace = (weights * (features[used] - own_mean)).square().sum()
            rows = weights * (rotated[used] - counts @ rotated[used] / n)
            product = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
            overlap = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
            shift = (own_mean - mean).square().sum()
            return (shift + trace + covariance.trace() - 2 * overlap).item()

        return distance
