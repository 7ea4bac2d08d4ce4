"""Training pictures: rendered scenes and folders of pictures."""
