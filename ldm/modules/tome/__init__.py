"""Token merging: matching, configuration, and what happens in a forward pass."""
