"""Lightning around the models: what a training run adds to them."""
