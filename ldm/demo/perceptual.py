"""What the demo's classifier sees in a picture, for the first stage's perceptual term."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.demo.classifier import load_classifier, with_position


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
        x, maps = with_position(pictures), []
        for layer in self.trunk:
            x = layer(x)
            maps.append(x)
        return maps
