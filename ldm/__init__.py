"""Latent diffusion models with token merging built into the attention."""
