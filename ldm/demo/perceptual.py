"""What the demo's classifier sees in a picture, for the first stage's perceptual term."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.demo.classifier import load_classifier


class AttributeFeatures(nn.Module):
    """Feature maps of the classifier's convolutions, at the pictures' own size.

    Args:
        path: its weights; by default those that are shipped.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.trunk = load_classifier(path).trunk

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> maps at a quarter of the size and below."""
        ramps = [torch.linspace(-1.0, 1.0, n, device=pictures.device) for n in pictures.shape[-2:]]
        position = torch.stack(torch.meshgrid(*ramps, indexing="ij")).to(pictures.dtype)
        x = torch.cat([pictures, position.expand(len(pictures), -1, -1, -1)], dim=1)
        maps = []
        for layer in self.trunk:
            x = layer(x)
            maps.append(x)
        return maps
