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


def in_training(model: Any) -> pl.LightningModule:
    """What Lightning trains for a model of a configuration.

    Args:
        model: a LatentDiffusion, an AutoencoderKL, or a module that `Training` can train; a
            LightningModule is returned as it is.

    Raises:
        InputError: nothing here can train it.
    """
    if isinstance(model, pl.LightningModule):
        return model
    if isinstance(model, LatentDiffusion):
        return DiffusionTraining(model)
    if isinstance(model, AutoencoderKL):
        return AutoencoderTraining(model)
    if not (hasattr(model, "terms") and hasattr(model, "optimizer")):
        raise InputError(f"model.target: a {type(model).__name__} cannot be trained")
    return Training(model)
