"""What a training run needs around a model."""
