"""A small network that reads a rendered scene's attributes off a picture.

It answers whether a sampled picture shows what its caption says, and its features give the demo
model a Fréchet distance that means something for these pictures (Inception was trained on photos).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kornia.geometry.transform import resize
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from ldm.checkpoint.files import open_state_dict
from ldm.config import shipped
from ldm.demo.scenes import ATTRIBUTES
from ldm.errors import InputError, escaped

WEIGHTS = "models/demo/classifier/attributes.safetensors"


class AttributeClassifier(nn.Module):
    """Convolutions at a quarter of the size and below, pooled, with one head per attribute.

    Pictures are (B, 3, H, W) in [-1, 1]; those of another size than `size` are resized first.

    Args:
        widths: channels at a quarter of the size, an eighth, and so on.
        n_features: length of the feature vector.
        size: edge length at which pictures are judged, in pixels.
        first_stage_key: the batch's key for pictures (B, H, W, 3).
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128),
        n_features: int = 64,
        size: int = 128,
        first_stage_key: str = "image",
    ) -> None:
        super().__init__()
        self.size = size
        self.first_stage_key = first_stage_key
        self.monitor = "val/loss"
        self.trunk = nn.Sequential(
            _convolution(5, widths[0], kernel=7, stride=4),
            *(
                _convolution(n_in, n_out, kernel=3, stride=2)
                for n_in, n_out in itertools.pairwise(widths)
            ),
            _convolution(widths[-1], widths[-1], kernel=3, stride=1),
        )
        self.project = nn.Linear(2 * widths[-1], n_features)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(n_features, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def features(self, pictures: Tensor) -> Tensor:
        """Returns what the heads read: (B, n_features)."""
        if pictures.shape[-2:] != (self.size, self.size):
            pictures = resize(pictures, (self.size, self.size), "bilinear", antialias=True)
        maps = self.trunk(with_position(pictures))
        pooled = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)
        return F.silu(self.project(pooled))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Returns scores (B, n_values) of each attribute's values, in `ATTRIBUTES` order."""
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict_attributes(self, pictures: Tensor) -> list[dict[str, str]]:
        """Returns the likeliest value of every attribute, one dictionary per picture."""
        best = {name: scores.argmax(dim=1).tolist() for name, scores in self(pictures).items()}
        return [
            {name: ATTRIBUTES[name][indices[i]] for name, indices in best.items()}
            for i in range(len(pictures))
        ]

    def terms(self, batch: dict[str, Any], split: str) -> dict[str, Tensor]:
        """Returns the sum of the attributes' cross entropies as ``loss``, and their accuracies.

        In training the pictures are disturbed.
        """
        pictures = batch[self.first_stage_key].movedim(-1, 1)
        if split == "train":
            pictures = disturb(pictures)
        terms = {"loss": torch.zeros((), device=pictures.device)}
        for name, scores in self(pictures).items():
            labels = [ATTRIBUTES[name].index(value) for value in batch["scene"][name]]
            target = torch.tensor(labels, device=pictures.device)
            terms["loss"] = terms["loss"] + F.cross_entropy(scores, target)
            terms[name] = (scores.argmax(dim=1) == target).float().mean()
        return terms

    def optimizer(self, learning_rate: float, n_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Returns AdamW with one rise and fall of the learning rate over the whole run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=1e-2)
        return optimizer, OneCycleLR(optimizer, learning_rate, n_steps)


def with_position(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) with where a pixel is as two more channels, (B, 5, H, W).

    Pooling would forget on which side the light stands.
    """
    ramps = [torch.linspace(-1.0, 1.0, n, device=pictures.device) for n in pictures.shape[-2:]]
    position = torch.stack(torch.meshgrid(*ramps, indexing="ij")).to(pictures.dtype)
    return torch.cat([pictures, position.expand(len(pictures), -1, -1, -1)], dim=1)


def _convolution(n_in: int, n_out: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(n_out),
        nn.SiLU(),
    )


def disturb(pictures: Tensor) -> Tensor:
    """Blurs, tints and adds noise to pictures (B, 3, H, W), each by its own amount.

    A classifier trained on clean renders alone would judge the first stage's blur, not the scene.
    """

    def amount(low: float, high: float, channels: int = 1) -> Tensor:
        drawn = torch.rand(len(pictures), channels, 1, 1, device=pictures.device)
        return low + (high - low) * drawn

    padded = F.pad(pictures, (2, 2, 2, 2), mode="reflect")
    blurred = F.avg_pool2d(F.avg_pool2d(padded, 3, 1), 3, 1)
    pictures = pictures + amount(-0.3, 1.0).clamp(min=0.0) * (blurred - pictures)
    pictures = pictures * amount(0.88, 1.12) * amount(0.95, 1.05, 3) + amount(-0.08, 0.08)
    return pictures + amount(-0.05, 0.12).clamp(min=0.0) * torch.randn_like(pictures)


def export_classifier(checkpoint: str | Path, path: str | Path) -> None:
    """Writes the weights of a training run's checkpoint as half-precision safetensors."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    kept = {k: v.half() for k, v in state.items() if v.is_floating_point()}
    save_file(kept, str(path))


def load_classifier(path: str | Path | None = None) -> AttributeClassifier:
    """Returns the trained classifier, ready to judge, on the CPU in float32.

    Args:
        path: weights written by `export_classifier`; None takes those shipped with the project.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    path = shipped(WEIGHTS) if path is None else Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no classifier weights; train them with configs/demo/classifier.yaml"
        )
    model, stored = AttributeClassifier(), open_state_dict(path)
    own = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    shapes = {name: entry.shape for name, entry in stored.entries.items()}
    if shapes != {name: tuple(value.shape) for name, value in own.items()}:
        raise InputError(f"{escaped(path)} holds other weights than those of the classifier")
    stored.require_weights(stored)
    model.load_state_dict({k: stored[k].float() for k in stored}, strict=False)
    return model.eval().requires_grad_(False)
