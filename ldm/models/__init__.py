"""Trainable models: the first stage and the diffusion model."""
