"""Measuring what merging costs and gains."""
