"""Latent diffusion models with token merging built into the attention."""

__version__ = "0.2.0"
