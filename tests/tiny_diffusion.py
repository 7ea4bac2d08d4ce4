"""A latent diffusion model of a few layers, for what does not need Stable Diffusion's structure."""

import torch
from torch import nn

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import allow_module

allow_module(__name__)
WIDTH = 8
CAPTIONS = ["red", "green", "blue", "red"]


class TinyUNet(nn.Module):
    """Two convolutions, the step and the mean of the context."""

    def __init__(self, in_channels=4, out_channels=4):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, WIDTH, 3, padding=1)
        self.step = nn.Linear(2, WIDTH)
        self.context = nn.Linear(WIDTH, WIDTH)
        self.conv_out = nn.Conv2d(WIDTH, out_channels, 3, padding=1)
        self.seen = {}

    def forward(self, x, timesteps, context=None, y=None):
        self.seen = {"x": x, "context": context, "y": y}
        angle = timesteps.float() / 1000
        h = self.step(torch.stack([angle.cos(), angle.sin()], 1))
        if context is not None:
            h = h + self.context(context.mean(1))
        return self.conv_out(torch.tanh(self.conv_in(x) + h[:, :, None, None]))


class TinyFirstStage(nn.Module):
    """Four channels from each 2 x 2 pixels, at eight times the scale."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 2, stride=2)
        self.decoder = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def encode(self, x):
        return DiagonalGaussianDistribution(self.encoder(x))

    def decode(self, z):
        return self.decoder(z)


class TinyText(nn.Module):
    """One vector for each word that the tests use."""

    WORDS = ("", "red", "green", "blue")

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(self.WORDS), WIDTH)

    def encode(self, captions):
        return self.embedding(torch.tensor([[self.WORDS.index(c)] for c in captions]))


def target(cls):
    """A configuration of one of these classes."""
    return {"target": f"{__name__}.{cls.__name__}"}


def build(**changes):
    """The model, with some arguments changed."""
    arguments = {
        "first_stage_config": target(TinyFirstStage),
        "cond_stage_config": target(TinyText),
        "unet_config": target(TinyUNet),
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "first_stage_key": "image",
        "cond_stage_key": "caption",
        "conditioning_key": "crossattn",
        "scale_factor": 0.5,
    }
    torch.manual_seed(0)
    return LatentDiffusion(**{**arguments, **changes})
