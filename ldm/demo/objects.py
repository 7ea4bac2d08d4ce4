"""Where the objects in a picture of the demo's world are, and how many.

A small network learns from renders with and without their object which part of a picture that is;
connected parts are then counted. Trees that overlap count as one, in samples as in renders.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from kornia.contrib import connected_components
from torch import Tensor, nn

from ldm.demo.classifier import disturb
from ldm.demo.rendered import scene_of, stacked
from ldm.demo.scenes import Scene, render

SIDE = 128  # pixels at which pictures are judged
SMALLEST = 12  # cells of 2x2 pixels that an object has at least
N_PASSES = 256  # each lets a part's number spread by one cell
SEED = 23  # of the renders that the network learns from


def object_mask(scene: Scene, seed: tuple[int, ...], size: int = SIDE) -> tuple[Tensor, Tensor]:
    """A render and where its object is: (3, size, size) in [-1, 1] and (size/2, size/2) in 0 .. 1.

    Args:
        scene: what to show.
        seed: of everything that it leaves open.
        size: of the picture, a side, in pixels.
    """
    both = [
        render(each, np.random.default_rng(seed), size)
        for each in (scene, replace(scene, object="none"))
    ]
    shown, bare = stacked(both)
    differs = ((shown - bare).abs().amax(dim=0) > 0.12).float()
    return shown, F.avg_pool2d(differs[None], 2)[0].round()


class ObjectFinder(nn.Module):
    """Pictures (B, 3, 128, 128) -> scores (B, 64, 64), above 0 where there is an object."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_block(3, 16, 2), _block(16, 16, 1))
        self.coarse = nn.Sequential(_block(16, 32, 2), _block(32, 64, 2), _block(64, 64, 1))
        self.last = nn.Sequential(_block(80, 32, 1), nn.Conv2d(32, 1, 3, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Find."""
        fine = self.fine(pictures)
        coarse = F.interpolate(self.coarse(fine), scale_factor=4.0, mode="bilinear")
        return self.last(torch.cat([fine, coarse], dim=1)).squeeze(1)


def _block(n_in: int, n_out: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(n_out), nn.SiLU())


def train_finder(n_steps: int = 150, batch_size: int = 16) -> ObjectFinder:
    """A network that has seen ``n_steps * batch_size`` renders of all scenes, each once."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        finder = ObjectFinder()
        optimizer = torch.optim.AdamW(finder.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, n_steps)
        for step in range(n_steps):
            indices = range(step * batch_size, (step + 1) * batch_size)
            pairs = [object_mask(scene_of(i, SEED, "all"), (SEED, i)) for i in indices]
            pictures = disturb(torch.stack([picture for picture, _ in pairs]))
            masks = torch.stack([mask for _, mask in pairs])
            loss = F.binary_cross_entropy_with_logits(finder(pictures), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return finder.eval().requires_grad_(False)


def count_objects(finder: ObjectFinder, pictures: Tensor) -> list[int]:
    """How many separate objects each of the pictures (n, 3, H, W) shows."""
    small = F.interpolate(pictures.float(), (SIDE, SIDE), mode="area")
    found = torch.cat([finder(part) > 0 for part in small.split(64)])
    return [count_parts(mask.numpy()) for mask in found]


def count_parts(mask: np.ndarray) -> int:
    """Connected parts of at least ``SMALLEST`` cells, touching at an edge or a corner."""
    labels = connected_components(torch.from_numpy(mask)[None, None].float(), N_PASSES)
    sizes = labels[labels > 0].unique(return_counts=True)[1]
    return int((sizes >= SMALLEST).sum())
