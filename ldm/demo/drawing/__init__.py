"""How a scene is drawn: canvas, palette, sky, land and the objects on it."""
