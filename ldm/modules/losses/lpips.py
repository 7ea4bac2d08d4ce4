"""LPIPS (Zhang et al. 2018, arXiv 1801.03924): a distance in the features of VGG-16.

Its weights are the user's; they are not part of this project.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.files import open_state_dict
from ldm.errors import InputError

# VGG-16's convolutions as its `features` number them, by the slice that ends in the map used.
_SLICES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
_PREFIXES = ("", "loss.perceptual_loss.", "perceptual_loss.")


class LPIPS(nn.Module):
    """Distance of pictures in [-1, 1]; state-dict names are upstream's."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = _Vgg()
        for n, convolutions in enumerate(_SLICES):
            self.add_module(f"lin{n}", _Linear(convolutions[-1][2]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B,)."""
        maps_x, maps_y = (self.net(self.scaling_layer(pictures)) for pictures in (x, y))
        total = torch.zeros(len(x), device=x.device)
        for n, (a, b) in enumerate(zip(maps_x, maps_y, strict=True)):
            difference = F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)
            weighted = self.get_submodule(f"lin{n}")(difference.square())
            total = total + weighted.mean((1, 2, 3))
        return total

    @classmethod
    def load(cls, path: str | Path) -> LPIPS:
        """A network with the weights of a file.

        Args:
            path: .ckpt or .safetensors, of an LPIPS network or of a first stage that was trained
                with one (names below ``loss.perceptual_loss.``).

        Raises:
            InputError: there is no such file, or it lacks a weight.
        """
        weights = open_state_dict(path)
        network = cls()
        wanted = network.state_dict()
        for prefix in _PREFIXES:
            if all(prefix + name in weights for name in wanted):
                network.load_state_dict({name: weights[prefix + name] for name in wanted})
                return network
        missing = next(name for name in wanted if name not in weights)
        raise InputError(f"{path} is no LPIPS network with its VGG-16: it has no {missing}")


class _Scaling(nn.Module):
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for n, convolutions in enumerate(_SLICES, 1):
            part = nn.Sequential()
            if n > 1:
                part.add_module(str(convolutions[0][0] - 1), nn.MaxPool2d(2))
            for number, n_in, n_out in convolutions:
                part.add_module(str(number), nn.Conv2d(n_in, n_out, 3, padding=1))
                part.add_module(str(number + 1), nn.ReLU())
            self.add_module(f"slice{n}", part)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for n in range(1, len(_SLICES) + 1):
            x = self.get_submodule(f"slice{n}")(x)
            maps.append(x)
        return maps


class _Linear(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
