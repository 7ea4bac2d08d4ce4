"""Building blocks of the networks."""
