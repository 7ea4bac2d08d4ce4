"""Files of weights: read, named, loaded, converted, added to."""
