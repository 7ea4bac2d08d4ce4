"""Convolutional and U-Net blocks."""
