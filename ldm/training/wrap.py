"""Which training belongs to a model."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from ldm.errors import InputError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.diffusion import DiffusionTraining
from ldm.training.module import Training


def in_training(model: Any, learning_rate: float = 1e-4) -> pl.LightningModule:
    """What Lightning trains for a model of a configuration.

    Args:
        model: a LatentDiffusion, an AutoencoderKL, or a module that `Training` can train; a
            LightningModule is returned as it is.
        learning_rate: of the optimiser.

    Raises:
        InputError: nothing here can train it.
    """
    if isinstance(model, pl.LightningModule):
        model.learning_rate = learning_rate  # type: ignore[assignment]
        return model
    if isinstance(model, LatentDiffusion):
        return DiffusionTraining(model, learning_rate)
    if isinstance(model, AutoencoderKL):
        return AutoencoderTraining(model, learning_rate)
    if not (hasattr(model, "terms") and hasattr(model, "optimizer")):
        raise InputError(f"model.target: a {type(model).__name__} cannot be trained")
    return Training(model, learning_rate)
