"""Training of the first stage."""

import pytest
import torch

from ldm.models.autoencoder import AutoencoderKL
from ldm.training.autoencoder import AutoencoderTraining
from tests.tiny_models import FIRST_STAGE


@pytest.fixture
def tiny():
    loss = {"target": "ldm.models.autoencoder.ReconstructionLoss"}
    return AutoencoderTraining(AutoencoderKL(**{**FIRST_STAGE["params"], "lossconfig": loss}), 1e-3)


def test_training_lowers_the_loss(tiny):
    batch = {"image": torch.rand(2, 16, 16, 3) * 2 - 1}
    optimizer = tiny.configure_optimizers()
    losses = []
    for _ in range(8):
        loss = tiny.terms(batch, "train", 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_logged_pictures(tiny):
    drawn = tiny.log_images({"image": torch.zeros(6, 16, 16, 3)}, N=2)
    assert {k: tuple(v.shape) for k, v in drawn.items()} == {
        "inputs": (2, 3, 16, 16),
        "reconstructions": (2, 3, 16, 16),
    }
