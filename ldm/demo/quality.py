"""How good the demo's pictures are, beyond what its classifier finds in them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.demo.classifier import AttributeClassifier
from ldm.demo.rendered import RenderedScenes
from ldm.demo.scenes import Split
from ldm.evaluation.appendix_f.distances import high_frequencies, psnr
from ldm.evaluation.appendix_f.statistics import FrechetDistance, Statistics
from ldm.models.diffusion.ddpm import LatentDiffusion

RENDER_SEED = 22  # of fresh held-out renders; nothing is trained or drawn from it


def renders(
    n: int,
    size: int,
    cache_dir: str | None = None,
    seed: int = RENDER_SEED,
    split: Split = "held_out",
) -> Tensor:
    """Renders, by default fresh held-out ones, (n, 3, size, size) in [-1, 1].

    Args:
        n: how many.
        size: a side, in pixels.
        cache_dir: where they are kept, or None.
        seed, split: of the set, see RenderedScenes.
    """
    data = RenderedScenes(n, size, seed, split, flip=False, cache_dir=cache_dir)
    drawn = [torch.from_numpy(data[i]["image"]).movedim(-1, 0) for i in range(n)]
    return torch.stack(drawn)


@torch.no_grad()
def reconstructions(model: LatentDiffusion, pictures: Tensor) -> Tensor:
    """What the first stage makes of pictures (n, 3, H, W), float32 on the CPU, in [-1, 1]."""
    stage = model.first_stage_model
    place = next(stage.parameters())
    made = [
        stage.decode(stage.encode(part.to(place)).mode()).float().clamp(-1, 1).cpu()
        for part in pictures.split(16)
    ]
    return torch.cat(made)


def first_stage_quality(model: LatentDiffusion, size: int, n: int = 64) -> dict[str, float]:
    """Of reconstructed held-out renders: ``psnr_db``, and ``high_frequencies`` relative to them.

    Args:
        model: the demo model.
        size: of the pictures, a side, in pixels.
        n: how many pictures.
    """
    pictures = renders(n, size)
    made = reconstructions(model, pictures)
    energy = [high_frequencies(each).mean().item() for each in (made, pictures)]
    return {
        "psnr_db": psnr(made, pictures).mean().item(),
        "worst_psnr_db": psnr(made, pictures).min().item(),
        "high_frequencies": energy[0] / energy[1],
    }


@torch.no_grad()
def features(classifier: AttributeClassifier, pictures: Tensor) -> Tensor:
    """What the classifier's heads read of pictures (n, 3, H, W): (n, k)."""
    return torch.cat([classifier.features(part) for part in pictures.split(64)])


def frechet(classifier: AttributeClassifier, pictures: Tensor, real: Tensor) -> float:
    """Fréchet distance of pictures to renders in the classifier's features."""
    reference = Statistics.of(features(classifier, real))
    return FrechetDistance(reference)(features(classifier, pictures))


def told_apart(samples: Tensor, real: Tensor, n_steps: int = 400) -> float:
    """How often a small network, trained on four fifths of them, is right about the others.

    0.5 is a toss of a coin: it cannot tell samples from renders.

    Args:
        samples: (n, 3, H, W) in [-1, 1].
        real: renders, likewise.
        n_steps: of training, with 32 pictures each.
    """
    generator = torch.Generator().manual_seed(0)
    pictures = F.interpolate(torch.cat([samples, real]).float(), (128, 128), mode="area")
    labels = torch.cat([torch.zeros(len(samples)), torch.ones(len(real))])
    order = torch.randperm(len(labels), generator=generator)
    n_held = max(len(labels) // 5, 1)
    held, used = order[:n_held], order[n_held:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = _judge()
        optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3)
        for chosen in _batches(used, n_steps, generator):
            loss = F.binary_cross_entropy_with_logits(
                judge(pictures[chosen]).flatten(), labels[chosen]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        judge.eval()
        is_right = (judge(pictures[held]).flatten() > 0) == (labels[held] > 0.5)
    return is_right.float().mean().item()


def _judge() -> nn.Module:
    layers: list[nn.Module] = []
    for n_in, n_out in ((3, 24), (24, 48), (48, 96), (96, 96)):
        layers += [nn.Conv2d(n_in, n_out, 3, 2, 1), nn.BatchNorm2d(n_out), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 1))


def _batches(indices: Tensor, n: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(n):
        yield indices[torch.randint(len(indices), (32,), generator=generator)]
